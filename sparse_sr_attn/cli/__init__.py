"""The commands of `sparse-sr` that need no BasicSR: one module each, with `add_arguments` and `run`."""
