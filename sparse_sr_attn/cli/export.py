"""`sparse-sr export`: a network as a checked ONNX file."""

import argparse
import sys
from pathlib import Path

from sparse_sr_attn.checkpoints.foreign import network_name
from sparse_sr_attn.cli.common import (
    UsageError,
    add_options,
    add_output,
    check_new,
    check_suffix,
    load,
    name,
    require,
    say,
    show,
)
from sparse_sr_attn.inference.onnx import TOLERANCE, export_onnx

DESCRIPTION = """\
Export a network to ONNX: from `image`, (1, c, height, width) in 0..1, to `upscaled`, for any height and width. The file
is written only if onnxruntime gives the same images as the network, at sizes that differ from that of the export.

examples:
  sparse-sr export net_g_latest.pth -o net.onnx
  sparse-sr export net_g_latest.pth -o net.onnx --size 270 480 --size 1 1"""
EPILOG = f"""\
A token between two clusters may be assigned to either by rounding, which changes the image there ("as it is"). So the
check compares images under the clusters that onnxruntime found ("under one pattern", at most {TOLERANCE}), and tokens
in other clusters must have been ties."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("weights", type=Path, metavar="WEIGHTS", help="file to read, .pth or .safetensors")
    add_output(parser, "file to write, .onnx")
    add_options(parser)
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        action="append",
        metavar=("HEIGHT", "WIDTH"),
        help="check at this size instead of the default four; can be given several times",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")


def run(arguments: argparse.Namespace) -> int:
    """Export the network; return the exit status."""
    require("onnx", "onnxruntime", "onnxscript")
    check_suffix(arguments.output, ".onnx")
    sizes = [(height, width) for height, width in arguments.size or []]
    if any(min(size) < 1 for size in sizes):
        raise UsageError("--size must be HEIGHT and WIDTH, each >= 1")
    model = load(arguments)
    check_new(arguments.output, arguments)
    if sys.stderr.isatty():
        say(f"exporting {network_name(model)}; a deep network takes minutes")
    for found in export_onnx(model, arguments.output, overwrite=arguments.overwrite, sizes=sizes):
        moved = f"{found.num_moved} of {found.num_tokens} tokens moved" if found.num_tokens else "no clusters"
        show(
            f"{found.height:>5} x {found.width:<5} largest difference {found.under_one_pattern:.1e} under one pattern, "
            f"{found.as_is:.1e} as it is ({moved})"
        )
    show(f"{name(arguments.weights)} -> {name(arguments.output)}")
    return 0
