"""Measure the figures of docs/benchmarks-cpu.md.

    python -m benchmarks.results                 all runs, some minutes on an idle machine
    python -m benchmarks.results layers windows  some of them

Clone https://github.com/YigangZhao/LCoAN and https://github.com/xindongzhang/ELAN beside this repository first: their
code is measured, too. Tables are written into benchmarks/results/; `python docs/tables.py` puts them into the page.
"""

import argparse
import shlex
import sys
from pathlib import Path

from benchmarks.speed.__main__ import main as speed

FOLDER = Path(__file__).parent


def _peers(file: str, *names: str) -> list[str]:
    clone = {"lcoan": "../LCoAN", "elan": "../ELAN"}[file]
    return [part for name in names for part in ("--peer", f"benchmarks/peers/{file}.py:{name}:folder='{clone}'")]


_LCOAN = _peers("lcoan", "LCoA", "CoA")
_WINDOWS = ["--methods", "GMSA", "SharedGMSA", "--embed-dim", "60", *_peers("elan", "GMSA", "SharedGMSA")]
_ELAN = ["--networks", "--methods", "ELAN-light", "--sizes", "64", "128", *_peers("elan", "ELAN")]
_TRAINING = ["--passes", "forward+backward", "--sizes", "48", "96", "128", "--limit", "3"]

RUNS: dict[str, tuple[str, list[str]]] = {
    "layers": ("Cluster attention and others", ["--methods", "LCoA", "CoA", "ENLA", "NLSA", "SDPA", *_LCOAN]),
    "layers-channels-last": (
        "Cluster attention, channels last",
        ["--methods", "LCoA", "CoA", "--channels-last", *_LCOAN],
    ),
    "windows": ("Window attention", _WINDOWS),
    "windows-channels-last": ("Window attention, channels last", [*_WINDOWS, "--channels-last"]),
    "training": ("Training step", ["--methods", "LCoA", "GMSA", "NLSA", "SDPA", *_TRAINING]),
    "elan-light": ("ELAN-light ×4", _ELAN),
    "elan-light-bfloat16": ("ELAN-light ×4, bfloat16", [*_ELAN, "--dtype", "bfloat16"]),
}
"""Title and arguments of each run, by the name of its file."""


def command(name: str) -> str:
    """Return the command of a run."""
    return "python -m benchmarks.speed " + shlex.join([*RUNS[name][1], "--markdown", f"benchmarks/results/{name}.md"])


def main() -> int:
    """Measure; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *RUNS], metavar="RUN", help=f"{', '.join(RUNS)}; default: all")
    names = parser.parse_args().names or RUNS
    return max(speed([*RUNS[name][1], "--markdown", str(FOLDER / f"{name}.md")]) for name in names)


if __name__ == "__main__":
    sys.exit(main())
