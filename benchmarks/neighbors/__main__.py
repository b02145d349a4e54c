"""`python -m benchmarks.neighbors`: what chunks on a ring and the nearest chunks capture, and the time they take."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.capture import __main__ as capture
from benchmarks.command import make_parser, run_command
from benchmarks.speed.run import environment, features, threads
from benchmarks.speed.timing import Call, Spread, alternate, ratio
from sparse_sr_attn import LCoA
from sparse_sr_attn.cli.common import show, table
from sparse_sr_attn.data.atomic import check_writable, write_json

DESCRIPTION = """\
Compare chunks on a ring with the most similar chunks: the mass of dense attention that they capture
(`benchmarks.capture`), and the time of one LCoA of 64 channels on the CPU.

examples:
  python -m benchmarks.neighbors Urban25/
  python -m benchmarks.neighbors photos/ --limit 4 --rounds 5 --json neighbors.json"""


@dataclass(frozen=True)
class Variant:
    """A row of the table.

    Attributes:
        neighbors: the option `neighbors` of LCoA.
        num_adjacent: neighbours on one side.
        chunk_size: tokens of a chunk.
        num_clusters: number of clusters.
    """

    neighbors: str
    num_adjacent: int
    chunk_size: int
    num_clusters: int = 128

    @property
    def num_chunks(self) -> int:
        """The number of chunks that a token sees."""
        return 2 * self.num_adjacent + 1

    @property
    def num_keys(self) -> int:
        """The number of keys that a token sees if all chunks are full."""
        return self.num_chunks * self.chunk_size

    @property
    def pattern(self) -> str:
        """The name for `benchmarks.capture`."""
        return f"LCoA:num_clusters={self.num_clusters},num_adjacent={self.num_adjacent},neighbors={self.neighbors}"


VARIANTS = (
    Variant("ring", 1, 144),
    Variant("ring", 1, 144, num_clusters=64),
    Variant("ring", 1, 168, num_clusters=64),
    Variant("nearest", 3, 48),
    Variant("nearest", 4, 48),
    Variant("nearest", 8, 25),
    Variant("nearest", 13, 16),
)


def captured(variants: Sequence[Variant], images: Sequence[str], weights: str, limit: int) -> dict[int, dict[str, Any]]:
    """Return what `benchmarks.capture` finds for each number of keys."""
    found = {}
    for num_keys in dict.fromkeys(variant.num_keys for variant in variants):
        names = [variant.pattern for variant in variants if variant.num_keys == num_keys]
        options = ["--weights", weights, "--keys", str(num_keys), "--limit", str(limit), "--patterns", *names]
        found[num_keys] = capture.measure(capture.parser().parse_args([*images, *options]))
    return found


def call(variant: Variant, *, side: int, training: bool) -> Call:
    """Return what is timed: one LCoA on a feature map."""
    torch.manual_seed(0)
    layer = LCoA(
        64,
        neighbors=variant.neighbors,
        num_adjacent=variant.num_adjacent,
        chunk_size=variant.chunk_size,
        num_clusters=variant.num_clusters,
    ).train(training)
    x = features(1, 64, side).requires_grad_(training)

    def step() -> None:
        layer.zero_grad()
        layer(x).square().mean().backward()

    return step if training else torch.no_grad()(lambda: layer(x))


def measure(
    variants: Sequence[Variant], images: Sequence[str], weights: str, *, limit: int, side: int, rounds: int
) -> list[dict[str, Any]]:
    """Return a row for each variant, for JSON; the times are relative to the first."""
    masses = captured(variants, images, weights, limit)
    rows = []
    for variant in variants:
        found = masses[variant.num_keys]
        best = masses[variants[0].num_keys]["mean"]["best"]
        mass = {**found["mean"]["patterns"][variant.pattern], "best": best, "images": len(found["images"])}
        rows.append({**asdict(variant), **mass, "times": {}})
    for name, training in (("forward", False), ("forward+backward", True)):
        calls = {str(variant): call(variant, side=side, training=training) for variant in variants}
        samples = list(alternate(calls, torch.device("cpu"), rounds=rounds, shortest=0.02).values())
        for row, taken in zip(rows, samples, strict=True):
            milliseconds = Spread.of([1000 * each.busy for each in taken])
            row["times"][name] = {"ms": asdict(milliseconds), "relative": asdict(ratio(taken, samples[0]))}
    return rows


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as a table."""
    cells = [
        [
            row["neighbors"],
            f"{2 * row['num_adjacent'] + 1} of {row['chunk_size']}",
            f"{row['num_keys']:.0f}",
            str(row["num_clusters"]),
            f"{row['mass']:.3f}",
            f"{row['mass'] / row['best']:.2f}",
            *(f"{time['relative']['median']:.2f}" for time in row["times"].values()),
        ]
        for row in rows
    ]
    head = ["`neighbors`", "chunks seen", "keys", "clusters", "captured", "of the best", "time forward", "and backward"]
    return table(head, cells)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add = parser.add_argument
    add("input", nargs="+", metavar="IMAGE|FOLDER", help="high-resolution images")
    add("-w", "--weights", default="LCoAN-light_x2", metavar="FILE|NAME", help="whose features (%(default)s)")
    add("--limit", type=int, default=1000, metavar="N", help="use only the first N images")
    add("--size", type=int, default=96, metavar="N", help="side of the map that is timed (%(default)s)")
    add("--rounds", type=int, default=21, metavar="N", help="samples of each time (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="write all results")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; return the exit status.

    Raises:
        SparseSRError: images or weights cannot be used.
    """
    if arguments.json is not None:
        check_writable(arguments.json)
    with threads(1):
        rows = measure(
            VARIANTS,
            arguments.input,
            arguments.weights,
            limit=arguments.limit,
            side=arguments.size,
            rounds=arguments.rounds,
        )
        machine = environment(torch.device("cpu"))
    show(markdown(rows))
    if arguments.json is not None:
        document = {"machine": machine, "weights": arguments.weights, "size": arguments.size, "rows": rows}
        write_json(arguments.json, document)
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    return make_parser("neighbors", DESCRIPTION, "", add_arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    return run_command(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
