"""The experiments of the LCoA and ELAN papers, repeated: `python -m benchmarks.paper`."""
