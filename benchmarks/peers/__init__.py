"""Adapters that let `python -m benchmarks.speed --peer` call code of other projects, which is not part of this one."""
