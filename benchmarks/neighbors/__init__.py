"""Chunks on a ring against the nearest chunks: what they capture, and the time they take.

`python -m benchmarks.neighbors` measures it, for `docs/benchmarks.md`.
"""
