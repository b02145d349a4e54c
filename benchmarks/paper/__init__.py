"""The experiments of the LCoA and ELAN papers, repeated: `sparse-sr paper`."""
