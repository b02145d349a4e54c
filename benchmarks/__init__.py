"""Benchmarks: time, memory and the floor of attention layers and networks, ours and others'.

`sparse-sr bench` runs them; `docs/benchmarks.md` says what the figures mean. `bench.memory` is of use to tests.
"""
