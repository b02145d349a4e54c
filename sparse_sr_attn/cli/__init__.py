"""The commands of `sparse-sr`: one module each, with `DESCRIPTION`, `EPILOG`, `add_arguments` and `run`."""
