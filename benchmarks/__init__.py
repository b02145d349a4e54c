"""Benchmarks behind the figures in the documentation; not part of the installed package.

python -m benchmarks.speed      time and memory of layers and networks
python -m benchmarks.cost       what attention costs a network
python -m benchmarks.capture    how much of dense attention the keys of a pattern capture
python -m benchmarks.neighbors  chunks on a ring against the nearest chunks
python -m benchmarks.launches   kernels that a GPU launches
python -m benchmarks.results    the runs of docs/benchmarks-cpu.md
python -m benchmarks.paper      the comparisons of the papers
python -m benchmarks.weights    the trained weights and the networks they are compared with
"""
