"""The runs of `benchmarks.speed` whose tables are in docs/benchmarks-cpu.md."""
