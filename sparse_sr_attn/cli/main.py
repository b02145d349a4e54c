"""The command `sparse-sr`.

Exit status: 0 done; 1 something failed; 2 the command line or the options are invalid, and nothing was done; 130
interrupted. The `run` of a command returns 0 or 1, or raises `UsageError` or `ConfigError` (2) or another error (1).
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from functools import partial

import sparse_sr_attn
from sparse_sr_attn.cli.common import exit_status
from sparse_sr_attn.registry import suggestion

COMMANDS = {
    "train": "train a network from an option file, with BasicSR",
    "test": "test a trained network from an option file, with BasicSR",
    "prepare": "make pairs of high- and low-resolution images for training and validation",
    "upscale": "upscale images, or all images in folders",
    "demo": "serve a local web page to try a network on images",
    "list": "list layers, networks, presets and trained weights, with source and number of parameters",
    "inspect": "draw the clusters of an image, or where a pixel attends",
    "convert": "convert weights to other names, or to .safetensors",
    "export": "export a network to ONNX, for images of any size, checked with onnxruntime",
    "evaluate": "PSNR and SSIM of upscaled images, as in papers, and of bicubic interpolation",
}
"""Modules of `sparse_sr_attn.cli`, each imported when it is called; `--version` and `--help` need no torch."""
_EPILOG = """\
examples:
  sparse-sr upscale photo.jpg
  sparse-sr train -opt train.yml
  sparse-sr list LCoA

`sparse-sr COMMAND --help` shows the options of a command and examples. train and test run BasicSR; they write
experiments/, results/ and tb_logger/ to the working directory."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `sparse-sr`.

    Args:
        argv: the arguments, without the program's name; `None` for those of the process.

    Returns:
        The exit status.
    """
    try:
        arguments = _parse(sys.argv[1:] if argv is None else argv)
    except SystemExit as stop:  # argparse has printed help or an error
        return stop.code if isinstance(stop.code, int) else 2
    command = importlib.import_module(f"sparse_sr_attn.cli.{arguments.command}")
    return exit_status(
        partial(command.run, arguments),
        options=getattr(arguments, "opt", "--set"),
        interrupted="interrupted; `--auto_resume` resumes from the last saved state, or starts over if there is none"
        if arguments.command == "train"
        else "interrupted",
    )


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    argv = argv or ["--help"]
    parser, called = _parsers(argv)
    arguments, rest = parser.parse_known_args(argv)
    if rest:
        shown = [action for action in called._actions if action.help != argparse.SUPPRESS]
        options = [option for action in shown for option in action.option_strings]
        wrong = next((each.partition("=")[0] for each in rest if each.startswith("-")), None)
        called.error(f"unrecognized arguments: {' '.join(rest)}" + (suggestion(wrong, options) if wrong else ""))
    return arguments


def _parsers(argv: Sequence[str]) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """Return the parser, and that of the command that is called: no other command has its arguments."""
    name_called = next((argument for argument in argv if not argument.startswith("-")), None)
    parser = argparse.ArgumentParser(
        prog="sparse-sr",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Super-resolution networks with sparse attention: train, test, use, inspect, convert.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {sparse_sr_attn.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    called = parser
    if name_called is not None and name_called not in COMMANDS:
        parser.error(f"there is no command {name_called!r}{suggestion(name_called, list(COMMANDS))}")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name == name_called:
            called = command
            module = importlib.import_module(f"sparse_sr_attn.cli.{name}")
            command.description, command.epilog = module.DESCRIPTION, module.EPILOG
            module.add_arguments(command)
    return parser, called
