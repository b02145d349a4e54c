"""`python -m benchmarks.launches`: how many kernels a GPU launches, counted without one."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.command import make_parser, run_command
from benchmarks.launches.counter import counted
from sparse_sr_attn import GMSA, CoA, LCoA, create_model
from sparse_sr_attn.cli.common import UsageError, show, table
from sparse_sr_attn.data.atomic import check_writable, write_json
from sparse_sr_attn.functional.backend import HAS_TRITON
from sparse_sr_attn.layers import LFE

DESCRIPTION = """\
Count the kernels that layers and networks launch on a GPU with Triton, on the meta device: no GPU is needed.

examples:
  python -m benchmarks.launches
  python -m benchmarks.launches --size 48 --json launches.json
  python -m benchmarks.launches --operators ELAN-light

Eager code in float32, one map, forward in evaluation, and forward and backward in training, without the optimizer. A
custom operator counts by what it launches. An operator of torch counts by a model, which no profiler has confirmed."""


@dataclass(frozen=True)
class Subject:
    """What is counted.

    Attributes:
        build: returns the module.
        channels: of its input.
        provider: returns the module whose state it reads.
        channels_last: whether its input is in channels-last memory.
    """

    build: Callable[[], nn.Module]
    channels: int
    provider: Callable[[], Any] | None = None
    channels_last: bool = False


SUBJECTS = {
    "LCoA": Subject(partial(LCoA, 64), 64),
    "CoA": Subject(partial(CoA, 64), 64, partial(LCoA, 64)),
    "GMSA": Subject(partial(GMSA, 60), 60, channels_last=True),
    "GMSA, shifted": Subject(partial(GMSA, 60, shift=True), 60, channels_last=True),
    "LFE": Subject(partial(LFE, 60), 60, channels_last=True),
    "LCoAN-light": Subject(partial(create_model, "LCoAN-light", upscale=2), 3),
    "ELAN-light": Subject(partial(create_model, "ELAN-light", upscale=2), 3),
}


@dataclass(frozen=True)
class Launches:
    """Counts of one subject, in all and by operator.

    Attributes:
        evaluation: of a forward in evaluation mode, without gradients.
        forward: of a forward in training.
        backward: of its backward.
        operators: of all three, by the name of the operator of torch or of the Triton kernel.
    """

    evaluation: int
    forward: int
    backward: int
    operators: dict[str, dict[str, int]]


def count(subject: Subject, side: int) -> Launches:
    """Return the launches of a subject for maps of this side."""
    module = subject.build().to("meta")
    layout = torch.channels_last if subject.channels_last else torch.contiguous_format
    x = torch.empty(1, subject.channels, side, side, device="meta").to(memory_format=layout)
    state: tuple[Any, ...] = ()
    if subject.provider is not None:
        with counted(), torch.no_grad():
            state = (subject.provider().to("meta").eval().attend(x),)
    operators = {}
    for _ in range(2):  # what is computed once and kept does not count: the second turn replaces the first
        with counted() as counts, torch.no_grad():
            module.eval()(x, *state)
        operators["evaluation"] = dict(counts)
        wanted = [_leaf(each) for each in state]
        with counted() as counts:
            output = module.train()(x.detach().requires_grad_(), *wanted)
        operators["forward"] = dict(counts)
        module.zero_grad()
        with counted() as counts:
            output.backward(torch.empty_like(output))
        operators["backward"] = dict(counts)
    return Launches(**{name: sum(each.values()) for name, each in operators.items()}, operators=operators)


def _leaf(state: Any) -> Any:
    """Return a state whose tensors want gradients, as if their provider learnt."""
    return torch.utils._pytree.tree_map_only(
        Tensor, lambda tensor: tensor.clone().requires_grad_(tensor.is_floating_point()), state
    )


def markdown(found: dict[str, Launches]) -> str:
    """Return the counts as a table."""
    rows = [[name, str(each.evaluation), f"{each.forward} + {each.backward}"] for name, each in found.items()]
    return table(["", "evaluation", "training, forward + backward"], rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add = parser.add_argument
    add("--size", type=int, default=96, metavar="N", help="side of the map (%(default)s)")
    add("--operators", metavar="NAME", help="count by operator for one of the rows")
    add("--json", type=Path, metavar="FILE", help="write all counts")


def run(arguments: argparse.Namespace) -> int:
    """Count and print; return the exit status.

    Raises:
        UsageError: an argument is wrong, or triton is not installed.
    """
    if arguments.size < 1:
        raise UsageError(f"--size must be >= 1, got {arguments.size}")
    if arguments.operators is not None and arguments.operators not in SUBJECTS:
        raise UsageError(f"--operators must be one of {', '.join(SUBJECTS)}, got {arguments.operators!r}")
    if not HAS_TRITON:
        raise UsageError(
            "this command counts launches of Triton kernels and needs the package triton: pip install triton"
        )
    if arguments.json is not None:
        check_writable(arguments.json)
    chosen = [arguments.operators] if arguments.operators else list(SUBJECTS)
    found = {name: count(SUBJECTS[name], arguments.size) for name in chosen}
    show(markdown(found))
    if arguments.operators:
        counts = found[arguments.operators].operators
        names = sorted({name for each in counts.values() for name in each}, key=lambda name: -_total(counts, name))
        cells = [[name, *(str(each.get(name, 0)) for each in counts.values())] for name in names]
        show("\n" + table(["", *counts], cells))
    if arguments.json is not None:
        document = {"size": arguments.size, "launches": {name: asdict(each) for name, each in found.items()}}
        write_json(arguments.json, document)
    return 0


def _total(counts: dict[str, dict[str, int]], name: str) -> int:
    return sum(each.get(name, 0) for each in counts.values())


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    return make_parser("launches", DESCRIPTION, "", add_arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    return run_command(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
