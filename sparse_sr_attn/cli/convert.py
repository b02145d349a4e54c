"""`sparse-sr convert`: weights under other names and in other files."""

import argparse
from pathlib import Path

from sparse_sr_attn.checkpoints.convert import convert_weights, unsaid_options, write_weights
from sparse_sr_attn.cli.common import UsageError, add_options, load, name, say, show

DESCRIPTION = """\
Rewrite weights: under our names (BasicSR's, for EDSR and RCAN) or under those that the network was released with
(EDSR-PyTorch's for EDSR and RCAN, the authors' for LCoAN and ELAN), as .pth or .safetensors. Anything that load_model
knows is read. What is written has been read back, and every weight was the same.

  sparse-sr convert net_g_latest.pth net.safetensors
  sparse-sr convert edsr_baseline_x2.pt EDSR_Mx2.pth                    from EDSR-PyTorch to BasicSR
  sparse-sr convert net_g_latest.pth lcoan_x2.pt --names released       for the authors' code"""
EPILOG = """\
The averaged weights are taken where a file has both. A .pth with our names has them under `params`, as BasicSR wants
them; one with released names has them bare."""

_SUFFIXES = (".safetensors", ".pth", ".pt")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("weights", type=Path, metavar="FROM", help="file to read")
    parser.add_argument("output", type=Path, metavar="TO", help=f"file to write, {', '.join(_SUFFIXES)}")
    parser.add_argument(
        "--names",
        choices=["ours", "released"],
        default="ours",
        help="under which names to write (default: %(default)s)",
    )
    add_options(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there already")


def run(arguments: argparse.Namespace) -> int:
    """Convert the file; return the exit status.

    Raises:
        UsageError: the output cannot be such a file.
        CheckpointError: weights cannot be read, converted or written.
    """
    if arguments.output.suffix not in _SUFFIXES:
        raise UsageError(f"TO must end in {', '.join(_SUFFIXES)}, got {name(arguments.output)}")
    model = load(arguments)
    state = convert_weights(model, arguments.names)
    unsaid = unsaid_options(model, state)
    ours = arguments.names == "ours"
    write_weights(state, arguments.output, nested=ours, overwrite=arguments.overwrite)
    show(f"{name(arguments.weights)} -> {name(arguments.output)}: {type(model).__name__}, {len(state)} keys")
    if unsaid:
        say(f"note: these weights do not tell {', '.join(unsaid)}; tell it to whoever reads them")
    return 0
