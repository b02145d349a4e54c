"""The command `sparse-sr`.

Exit status: 0 done; 1 something failed; 2 the command line or the options are wrong, and nothing was done; 130
interrupted.
"""

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence

from sparse_sr_attn.errors import ConfigError, SparseSRError

_INSTALL = (
    "BasicSR is not installed, and `sparse-sr {command}` runs it. After torch and torchvision:\n"
    "  python -m pip install --no-build-isolation basicsr==1.4.2\n"
    "(Python 3.10 to 3.12; beside a torch without CUDA add `-c constraints-cpu.txt`, or pip brings another torch. "
    "More in docs/basicsr.md)"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `sparse-sr`.

    Args:
        argv: the arguments, without the program's name; `None` for those of the process.

    Returns:
        The exit status.
    """
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed help or an error
        return stop.code if isinstance(stop.code, int) else 2
    if importlib.util.find_spec("basicsr") is None:
        _say(_INSTALL.format(command=arguments.command))
        return 1
    try:
        commands = importlib.import_module("sparse_sr_attn_basicsr.commands")
        getattr(commands, arguments.command)(arguments)
    except ConfigError as error:
        problems = [str(problem).replace("\n", "\n    ") for problem in error.problems]
        _say(f"{_count(len(problems))} in {arguments.opt}; nothing was run\n  " + "\n  ".join(problems))
        return 2
    except SparseSRError as error:
        _say(str(error))
        return 1
    except KeyboardInterrupt:
        _say(
            "interrupted; `--auto_resume` goes on from the last saved state"
            if arguments.command == "train"
            else "interrupted"
        )
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sparse-sr",
        description="Train and test super-resolution networks with sparse attention through BasicSR.",
        epilog="experiments/, results/ and tb_logger/ come to lie in the working directory.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    texts = {
        "train": "train a network as an option file says",
        "test": "test a trained network as an option file says",
    }
    for name, text in texts.items():
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
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
        if name == "train":
            command.add_argument(
                "--auto_resume",
                action="store_true",
                help="go on from the newest state in experiments/, if there is one",
            )
        else:
            command.set_defaults(auto_resume=False)
    return parser


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"sparse-sr: {text}", file=sys.stderr)


def _count(problems: int) -> str:
    return "1 problem" if problems == 1 else f"{problems} problems"
