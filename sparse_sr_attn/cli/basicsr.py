"""What `sparse-sr train` and `sparse-sr test` share: their arguments, and the call of the BasicSR integration."""

import argparse
import importlib
import importlib.util
import sys
from pathlib import Path

from sparse_sr_attn.cli.common import UsageError, say
from sparse_sr_attn.errors import SparseSRError

_INSTALL = (
    "BasicSR is not installed, but `sparse-sr {command}` needs it. After torch and torchvision, run:\n"
    "  python -m pip install --no-build-isolation basicsr==1.4.2\n"
    "(Python 3.10 to 3.12; with a CPU build of torch add `-c constraints-cpu.txt`, or pip installs another torch)"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that both commands have."""
    parser.add_argument("-opt", "--opt", required=True, metavar="FILE", help="option file (YAML, as in BasicSR)")
    parser.add_argument(
        "--force_yml",
        nargs="+",
        action="extend",
        metavar="NAME=VALUE",
        help="override options of the file, e.g. train:total_iter=1000 num_gpu=0",
    )
    parser.add_argument("--debug", action="store_true", help="BasicSR's debug mode: log and validate often")
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm"],
        default="none",
        help="how processes are started, for several GPUs (default: %(default)s)",
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    """Run the command in the integration, with the BasicSR of the working directory if that is a fork."""
    _prefer_fork(Path.cwd())
    if importlib.util.find_spec("basicsr") is None:
        raise SparseSRError(_INSTALL.format(command=arguments.command))
    getattr(importlib.import_module("sparse_sr_attn_basicsr.commands"), arguments.command)(arguments)
    return 0


def _prefer_fork(folder: Path) -> None:
    """Import the BasicSR of a fork if the working directory is one, with a note."""
    package = folder / "basicsr"
    if not (package / "utils" / "registry.py").is_file():
        return
    if not (package / "__init__.py").is_file():
        raise UsageError(f"{package} must have an __init__.py (it may be empty), or Python imports another BasicSR")
    present = getattr(sys.modules.get("basicsr"), "__file__", None)
    if present is not None and Path(present).resolve().parent != package.resolve():
        raise UsageError(f"the BasicSR of this folder cannot be used, because {present} is already imported")
    if str(folder) != next(iter(sys.path), None):
        sys.path.insert(0, str(folder))
    say(f"note: using the BasicSR of this folder, {package}")
