"""`python -m benchmarks.speed`: time, memory and the floor of layers and networks, ours and others'."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from benchmarks.command import make_parser, run_command
from benchmarks.speed.methods import LAYER_METHODS, NETWORK_METHODS
from benchmarks.speed.report import markdown, write_json, write_markdown, write_plot
from benchmarks.speed.run import run as measure
from benchmarks.speed.settings import DEFAULT_NETWORKS, DTYPES, Pass, Settings
from sparse_sr_attn.cli.common import (
    UsageError,
    add_device,
    find_device,
    name,
    require,
    say,
    show,
)
from sparse_sr_attn.config import read
from sparse_sr_attn.errors import ConfigError, SparseSRError

DESCRIPTION = """\
Measure time, memory and the floor of attention layers or networks, alternating in one process.

examples:
  python -m benchmarks.speed
  python -m benchmarks.speed --methods LCoA plain-LCoA --sizes 48 96 --passes forward forward+backward
  python -m benchmarks.speed --networks --methods ELAN-light plain-ELAN-light --sizes 64 128
  python -m benchmarks.speed --peer their/code.py:Attention:channels=64,reduction=4

Outputs are first compared with slow references; a wrong one gets no speed-up. Names that start with `plain-` are
stand-ins for released codes, written for this benchmark."""
EPILOG = f"""\
layers: {", ".join(LAYER_METHODS)}
networks: {", ".join(NETWORK_METHODS)}

Exit status 1: an output is wrong."""

_DEFAULT = Settings()
_SCALE_HELP = f"super-resolution factor of networks ({_DEFAULT.upscale})"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add = parser.add_argument
    add("--networks", action="store_true", help="measure networks on images instead of layers")
    add("--methods", nargs="+", metavar="NAME", help="what to measure; see below")
    add("--peer", action="append", default=[], metavar="FILE.py:CLASS[:NAME=VALUE,...]", help="measure your own code")
    add("--sizes", nargs="+", type=int, metavar="N", help="sides of the maps (48 96 128 256; of images 64 128)")
    add("--embed-dim", type=int, metavar="N", help=f"channels of the maps ({_DEFAULT.embed_dim})")
    add("--batch", type=int, metavar="N", help=f"number of maps ({_DEFAULT.batch})")
    add("--passes", nargs="+", choices=get_args(Pass), help="what to time (forward)")
    add_device(parser)
    add("--dtype", choices=DTYPES, help=f"precision of weights and maps ({_DEFAULT.dtype})")
    add("--threads", type=int, metavar="N", help=f"threads of torch on the CPU ({_DEFAULT.threads})")
    add("--channels-last", action="store_true", help="use maps in channels-last memory")
    add("--chunk-size", type=int, metavar="N", help=f"of LCoA, CoA and their stand-ins ({_DEFAULT.chunk_size})")
    add("--num-clusters", type=int, metavar="N", help=f"of the same ({_DEFAULT.num_clusters})")
    add("--reduction", type=int, metavar="N", help=f"of the same ({_DEFAULT.reduction})")
    add("-s", "--scale", dest="upscale", type=int, metavar="N", help=_SCALE_HELP)
    add("--rounds", type=int, metavar="N", help=f"samples of each method ({_DEFAULT.rounds})")
    add("--limit", type=float, metavar="S", help=f"skip methods that take more seconds per call ({_DEFAULT.limit:g})")
    add("--compile", action="store_true", help="also measure our methods compiled by torch.compile")
    add("--no-validity", dest="validity", action="store_false", help="do not check stand-ins against authors' figures")
    add("--allocators", action="store_true", help="measure again in a process with THP_MEM_ALLOC_ENABLE=1")
    add("--json", type=Path, metavar="FILE", help="write all results")
    add("--markdown", type=Path, metavar="FILE", help="write the tables that are printed")
    add("--plot", type=Path, metavar="FILE", help="draw time and memory against size (.png; needs matplotlib)")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print the tables and keep them; return the exit status.

    Raises:
        UsageError: the arguments are wrong.
        SparseSRError: matplotlib is missing, code from outside fails, or a file cannot be written.
    """
    arguments.device = str(find_device(arguments.device))
    settings = _settings(arguments)
    if arguments.plot:
        if arguments.plot.suffix != ".png":
            raise UsageError(f"--plot must end in .png, got {name(arguments.plot)}")
        require("matplotlib")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else some builds of torch tell of each start of its profiler
    try:
        found = measure(settings, _progress)
    except ConfigError as error:
        raise UsageError(str(error)) from error
    _progress("")
    show(markdown(found))
    documents, wrong = [found.as_json()], found.wrong()
    if arguments.allocators:
        show("\n## With THP_MEM_ALLOC_ENABLE=1\n")
        again = _with_huge_pages(settings)
        show(again["markdown"])
        documents.append(again["run"])
        wrong += again["wrong"]
    try:
        if arguments.markdown:
            write_markdown(found, arguments.markdown)
        if arguments.json:
            write_json(documents, arguments.json)
        if arguments.plot:
            write_plot(found, arguments.plot)
    except OSError as error:
        raise SparseSRError(f"cannot write: {error}") from error
    if wrong:
        say(f"wrong output: {', '.join(dict.fromkeys(wrong))}")
    return int(bool(wrong))


def _settings(arguments: argparse.Namespace) -> Settings:
    """Return what the arguments ask for; what they do not say is left to the defaults."""
    given = {key: value for key, value in vars(arguments).items() if key in asdict(_DEFAULT) and value is not None}
    if arguments.networks:
        given = {"what": "networks", "methods": DEFAULT_NETWORKS, "sizes": (64, 128), **given}
    try:
        return Settings(**read(Settings, {**given, "peers": arguments.peer}))
    except ConfigError as error:
        raise UsageError("\n".join(f"--{problem}".replace("_", "-", 1) for problem in error.problems)) from error


def _progress(text: str) -> None:
    """Show the progress on one line of a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _with_huge_pages(settings: Settings) -> Any:
    """Return what another process finds whose allocator asks for huge pages, which must be said before it starts.

    Raises:
        SparseSRError: it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.json"
        child = subprocess.run(  # noqa: S603  our own module
            [sys.executable, "-m", "benchmarks.speed.worker", str(file)],
            input=json.dumps(asdict(settings)),
            env={**os.environ, "THP_MEM_ALLOC_ENABLE": "1"},
            text=True,
            check=False,
        )
        if child.returncode:
            raise SparseSRError(f"the process with THP_MEM_ALLOC_ENABLE=1 failed with status {child.returncode}")
        return json.loads(file.read_text())


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    return make_parser("speed", DESCRIPTION, EPILOG, add_arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    return run_command(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
