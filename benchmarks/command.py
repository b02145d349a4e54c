"""What the commands of the benchmarks share."""

import argparse
from collections.abc import Callable, Sequence

from sparse_sr_attn.cli.common import exit_status


def make_parser(
    name: str, description: str, epilog: str, add_arguments: Callable[[argparse.ArgumentParser], None]
) -> argparse.ArgumentParser:
    """Return the parser of `python -m benchmarks.<name>`."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    return parser


def run_command(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int], argv: Sequence[str] | None
) -> int:
    """Run a command on its arguments, those of the process if `argv` is `None`; return the exit status."""
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has printed help or an error
        return stop.code if isinstance(stop.code, int) else 2
    return exit_status(lambda: run(arguments))
