"""The command `sparse-sr`.

Exit status: 0 done; 1 something failed; 2 the command line or the options are wrong, and nothing was done; 130
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
    "BasicSR is not installed, and `sparse-sr {command}` runs it. After torch and torchvision:\n"
    "  python -m pip install --no-build-isolation basicsr==1.4.2\n"
    "(Python 3.10 to 3.12; beside a torch without CUDA add `-c constraints-cpu.txt`, or pip brings another torch)"
)
_BASICSR = {
    "train": "train a network as an option file says",
    "test": "test a trained network as an option file says",
}
_OWN = {
    "prepare": "make pairs of high and low resolution to train and validate on",
    "upscale": "enlarge images, or all images of folders",
    "list": "show the layers, networks, presets and trained weights, with source and parameters",
    "inspect": "draw the clusters, where a pixel attends, or how alike layers attend",
    "convert": "rewrite weights under other names, or as .safetensors",
    "export": "write a network as ONNX, for images of any size, checked with onnxruntime",
    "evaluate": "PSNR and SSIM of upscaled pictures, as papers count them, and their row “bicubic”",
    "capture": "how much of dense attention the keys of sparse patterns capture, beside the best possible",
}
"""Modules of `sparse_sr_attn.cli`, each imported when it is called; `--version` and `--help` need no torch."""


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
        interrupted="interrupted; `--auto_resume` resumes from the last saved state, or starts anew if there is none"
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
    """Have Python import the BasicSR of a fork in whose folder the user stands, and say so.

    Raises:
        UsageError: it cannot be imported from there.
    """
    package = folder / "basicsr"
    if not (package / "utils" / "registry.py").is_file():
        return
    if not (package / "__init__.py").is_file():
        raise UsageError(f"{package} must have an __init__.py, may be an empty one, or Python imports another BasicSR")
    present = getattr(sys.modules.get("basicsr"), "__file__", None)
    if present is not None and Path(present).resolve().parent != package.resolve():
        raise UsageError(f"the BasicSR of this folder cannot be used, because that in {present} is imported already")
    if str(folder) != next(iter(sys.path), None):
        sys.path.insert(0, str(folder))
    say(f"note: BasicSR is that of this folder, {package}")


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser; of the commands it knows the arguments of the one that is called."""
    called = next((argument for argument in argv if not argument.startswith("-")), None)
    parser = argparse.ArgumentParser(
        prog="sparse-sr",
        description="Super-resolution networks with sparse attention: train, test, use, look into, convert.",
        epilog="`sparse-sr COMMAND --help` teaches each. Of train and test, which run BasicSR, experiments/, results/ "
        "and tb_logger/ come to lie in the working directory.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {sparse_sr_attn.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, text in _BASICSR.items():
        _add_basicsr_arguments(
            commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}."), training=name == "train"
        )
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
        help="options that go before those of the file, e.g. train:total_iter=1000 num_gpu=0",
    )
    command.add_argument("--debug", action="store_true", help="BasicSR's debug mode: log and validate often")
    command.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm"],
        default="none",
        help="for several GPUs: torchrun --nproc_per_node N -m sparse_sr_attn train -opt FILE --launcher pytorch",
    )
    command.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    if training:
        command.add_argument(
            "--auto_resume",
            action="store_true",
            help="go on from the newest state in experiments/, if there is one",
        )
    else:
        command.set_defaults(auto_resume=False)
