"""What attention costs a network: the time of networks with attention relative to the same networks without.

`python -m benchmarks.cost` measures it; `docs/benchmarks-method.md` says what the figures mean.
"""
