"""Time, memory and the floor of attention layers and networks, ours and others'.

`python -m benchmarks.speed` runs them; `docs/benchmarks-method.md` says what the figures mean.
"""
