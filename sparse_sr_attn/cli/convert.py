"""`sparse-sr convert`: weights under other names and in other files."""

import argparse
from pathlib import Path

from sparse_sr_attn.checkpoints.convert import at_img_range, convert_weights, unsaid_options, write_weights
from sparse_sr_attn.checkpoints.foreign import network_name
from sparse_sr_attn.cli.common import (
    UsageError,
    add_options,
    add_output,
    check_new,
    check_suffix,
    load,
    name,
    say,
    show,
)

DESCRIPTION = """\
Convert weights: to our names (BasicSR's, for EDSR and RCAN) or to those of the released code (EDSR-PyTorch's for EDSR
and RCAN, the authors' for LCoAN and ELAN), as .pth or .safetensors. Reads anything that load_model recognises. The
written file is read back, and all weights are compared.

examples:
  sparse-sr convert net_g_latest.pth -o net.safetensors
  sparse-sr convert edsr_baseline_x2.pt -o EDSR_Mx2.pth                     from EDSR-PyTorch to BasicSR
  sparse-sr convert net_g_latest.pth -o lcoan_x2.pt --names released        for the authors' code
  sparse-sr convert edsr_baseline_x2.pt -o edsr_1.pt --names released --img-range 1
                                                                            for EDSR-PyTorch's --rgb_range 1"""
EPILOG = """\
If a file also has averaged weights, these are used. A .pth with our names has the weights under `params`, as BasicSR
expects; one with released names is a bare state dict."""

_SUFFIXES = (".safetensors", ".pth", ".pt")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("weights", type=Path, metavar="WEIGHTS", help="file to read")
    add_output(parser, f"file to write, {', '.join(_SUFFIXES)}")
    parser.add_argument(
        "--names",
        choices=["ours", "released"],
        default="ours",
        help="names of the weights in the output (default: %(default)s)",
    )
    add_options(parser)
    parser.add_argument(
        "--img-range",
        type=float,
        metavar="R",
        help="scale the biases of an EDSR so that it gives the same image at this img_range; 1 for --rgb_range 1",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")


def run(arguments: argparse.Namespace) -> int:
    """Convert the file; return the exit status."""
    check_suffix(arguments.output, *_SUFFIXES)
    if arguments.img_range is not None and not 0 < arguments.img_range < float("inf"):
        raise UsageError(f"--img-range must be > 0 and finite, got {arguments.img_range:g}")
    model = load(arguments)
    check_new(arguments.output, arguments)
    if arguments.img_range is not None:
        model = at_img_range(model, arguments.img_range)
    state = convert_weights(model, arguments.names)
    unsaid = unsaid_options(model, state)
    ours = arguments.names == "ours"
    write_weights(state, arguments.output, nested=ours, overwrite=arguments.overwrite)
    show(f"{name(arguments.weights)} -> {name(arguments.output)}: {network_name(model)}, {len(state)} keys")
    if unsaid:
        say(f"note: the file does not record {', '.join(unsaid)}; pass it when you load the file")
    return 0
