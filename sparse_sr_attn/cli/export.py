"""`sparse-sr export`: a network as an ONNX file that has been checked."""

import argparse
import sys
from pathlib import Path

from sparse_sr_attn.cli.common import UsageError, add_options, load, name, require, say, show
from sparse_sr_attn.inference.onnx import TOLERANCE, export_onnx

DESCRIPTION = """\
Write a network as ONNX: `image`, (1, c, height, width) in 0..1, to `forward_body`, for any height and width.

  sparse-sr export net_g_latest.pth net.onnx
  sparse-sr export net_g_latest.pth net.onnx --size 270 480 --size 1 1

The file is written only if onnxruntime gives the same images as the network, at sizes that the export has not seen."""
EPILOG = f"""\
A token on the border of two clusters may fall to either side by rounding; the image differs there by what that changes
("as it is"). So images are compared under the clusters that onnxruntime found ("under one pattern", at most
{TOLERANCE}), and tokens that moved must have been on the border."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("weights", type=Path, metavar="FROM", help=".pth or .safetensors, as for upscale")
    parser.add_argument("output", type=Path, metavar="TO", help="file to write, .onnx")
    add_options(parser)
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        action="append",
        metavar=("HEIGHT", "WIDTH"),
        help="check at this size instead of the usual four; can be given several times",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there already")


def run(arguments: argparse.Namespace) -> int:
    """Export the network; return the exit status.

    Raises:
        UsageError: the output cannot be such a file, or a size is empty.
        SparseSRError: a package is missing, or weights cannot be read, or exported, or the check fails.
    """
    require("onnx", "onnxruntime", "onnxscript")
    if arguments.output.suffix != ".onnx":
        raise UsageError(f"TO must end in .onnx, got {name(arguments.output)}")
    sizes = [(height, width) for height, width in arguments.size or []]
    if any(min(size) < 1 for size in sizes):
        raise UsageError("--size must be HEIGHT and WIDTH, each >= 1")
    model = load(arguments)
    if sys.stderr.isatty():
        say(f"exporting {type(model).__name__}; a deep network takes minutes")
    for found in export_onnx(model, arguments.output, overwrite=arguments.overwrite, sizes=sizes):
        moved = f"{found.num_moved} of {found.num_tokens} tokens moved" if found.num_tokens else "no clusters"
        show(
            f"{found.height:>5} x {found.width:<5} largest difference {found.under_one_pattern:.1e} under one pattern, "
            f"{found.as_is:.1e} as it is ({moved})"
        )
    show(f"{name(arguments.weights)} -> {name(arguments.output)}")
    return 0
