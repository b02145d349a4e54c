"""A run in a process of its own: `python -m benchmarks.speed.worker FILE`, settings as JSON on the standard input.

`python -m benchmarks.speed --allocators` starts it, because an allocator is chosen when a process begins.
"""

import json
import sys
from pathlib import Path

from benchmarks.speed.report import markdown
from benchmarks.speed.run import run
from benchmarks.speed.settings import Settings
from sparse_sr_attn.config import read


def main() -> None:
    """Write the tables and the figures into the file."""
    found = run(Settings(**read(Settings, json.load(sys.stdin))))
    document = {"markdown": markdown(found), "run": found.as_json(), "wrong": found.wrong()}
    Path(sys.argv[1]).write_text(json.dumps(document, default=str))


if __name__ == "__main__":
    main()
