"""The command `sparse-sr`.

Exit status: 0 done; 1 something failed; 2 the command line or the options are invalid, and nothing was done; 130
interrupted.
"""

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import sparse_sr_attn
from sparse_sr_attn.cli.common import UsageError, exit_status, say
from sparse_sr_attn.errors import SparseSRError

_INSTALL = (
    "BasicSR is not installed, but `sparse-sr {command}` needs it. After torch and torchvision, run:\n"
    "  python -m pip install --no-build-isolation basicsr==1.4.2\n"
    "(Python 3.10 to 3.12; with a CPU build of torch add `-c constraints-cpu.txt`, or pip installs another torch)"
)
_BASICSR = {
    "train": "train a network from an option file, with BasicSR",
    "test": "test a trained network from an option file, with BasicSR",
}
_EXAMPLES = {
    "train": """\
examples:
  sparse-sr train -opt train.yml
  sparse-sr train -opt train.yml --auto_resume                       resume from the newest saved state
  sparse-sr train -opt train.yml --force_yml train:total_iter=1000 num_gpu=0
  torchrun --nproc_per_node 4 -m sparse_sr_attn train -opt train.yml --launcher pytorch

experiments/ and tb_logger/ are written to the working directory.""",
    "test": """\
examples:
  sparse-sr test -opt test.yml
  sparse-sr test -opt test.yml --force_yml path:pretrain_network_g=net_g_latest.pth

results/ is written to the working directory.""",
}
_OWN = {
    "prepare": "make pairs of high- and low-resolution images for training and validation",
    "upscale": "upscale images, or all images in folders",
    "list": "list layers, networks, presets and trained weights, with source and number of parameters",
    "inspect": "draw the clusters, where a pixel attends, or the overlap of layers",
    "convert": "convert weights to other names, or to .safetensors",
    "export": "export a network to ONNX, for images of any size, checked with onnxruntime",
    "evaluate": "PSNR and SSIM of upscaled images, as in papers, and of bicubic interpolation",
    "capture": "measure how much of dense attention sparse patterns capture",
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
        arguments = _parser(sys.argv[1:] if argv is None else argv).parse_args(argv)
    except SystemExit as stop:  # argparse has printed help or an error
        return stop.code if isinstance(stop.code, int) else 2
    return exit_status(
        partial(_run, arguments),
        options=getattr(arguments, "opt", "--set"),
        interrupted="interrupted; `--auto_resume` resumes from the last saved state, or starts over if there is none"
        if arguments.command == "train"
        else "interrupted",
    )


def _run(arguments: argparse.Namespace) -> int:
    if arguments.command in _OWN:
        return importlib.import_module(f"sparse_sr_attn.cli.{arguments.command}").run(arguments)
    _prefer_fork(Path.cwd())
    if importlib.util.find_spec("basicsr") is None:
        raise SparseSRError(_INSTALL.format(command=arguments.command))
    getattr(importlib.import_module("sparse_sr_attn_basicsr.commands"), arguments.command)(arguments)
    return 0


def _prefer_fork(folder: Path) -> None:
    """Import the BasicSR of a fork if the working directory is one, with a note.

    Raises:
        UsageError: it cannot be imported.
    """
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


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser; it has the arguments of the command that is called only."""
    called = next((argument for argument in argv if not argument.startswith("-")), None)
    parser = argparse.ArgumentParser(
        prog="sparse-sr",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Super-resolution networks with sparse attention: train, test, use, inspect, convert.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {sparse_sr_attn.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, text in _BASICSR.items():
        command = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=_EXAMPLES[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_basicsr_arguments(command, training=name == "train")
    for name, text in _OWN.items():
        command = commands.add_parser(name, help=text, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name == called:
            module = importlib.import_module(f"sparse_sr_attn.cli.{name}")
            command.description, command.epilog = module.DESCRIPTION, module.EPILOG
            module.add_arguments(command)
    return parser


def _add_basicsr_arguments(command: argparse.ArgumentParser, *, training: bool) -> None:
    command.add_argument("-opt", "--opt", required=True, metavar="FILE", help="option file (YAML, as in BasicSR)")
    command.add_argument(
        "--force_yml",
        nargs="+",
        action="extend",
        metavar="NAME=VALUE",
        help="override options of the file, e.g. train:total_iter=1000 num_gpu=0",
    )
    command.add_argument("--debug", action="store_true", help="BasicSR's debug mode: log and validate often")
    command.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm"],
        default="none",
        help="how processes are started, for several GPUs (default: %(default)s)",
    )
    command.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    if training:
        command.add_argument(
            "--auto_resume",
            action="store_true",
            help="resume from the newest state in experiments/, if there is one",
        )
    else:
        command.set_defaults(auto_resume=False)
