"""`python -m benchmarks.cost`: what attention costs a network in time and memory, forward and in training."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.command import make_parser, run_command
from benchmarks.speed.run import environment, images, threads
from benchmarks.speed.timing import Call, Sample, Spread, alternate, ratio
from sparse_sr_attn import EDSR, attach, create_model
from sparse_sr_attn.blocks.attention_config import default_config
from sparse_sr_attn.cli.common import (
    UsageError,
    add_device,
    add_options,
    build_host,
    find_device,
    import_modules,
    options,
    show,
    table,
)
from sparse_sr_attn.data.atomic import check_writable, write_json
from sparse_sr_attn.layers.build import find_layer
from sparse_sr_attn.testing.memory import new_memory

DESCRIPTION = """\
Measure time and memory of networks with attention relative to the same networks without, alternating in one process.

examples:
  python -m benchmarks.cost
  python -m benchmarks.cost --size 128 --rounds 15
  python -m benchmarks.cost --attention LCoA GMSA NLSA ENLA --json cost.json
  python -m benchmarks.cost --host their_network.py:Net --set dim=48 --attention LCoA GMSA
  python -m benchmarks.cost --device cuda

bfloat16 is autocast. A training step is forward and backward of an L1 loss, without the optimizer."""

NETWORKS: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
    "EDSR, 64 channels, 16 blocks": (lambda: _edsr(64, 16), None),
    "+ LCoA every 4, share 4": (lambda: _edsr(64, 16, default_config("LCoA")), "EDSR, 64 channels, 16 blocks"),
    "+ GMSA every 4, share 4": (lambda: _edsr(64, 16, default_config("GMSA")), "EDSR, 64 channels, 16 blocks"),
    "EDSR, 48 channels, 10 blocks": (lambda: _edsr(48, 10), None),
    "LCoAN-light": (lambda: create_model("LCoAN-light", upscale=2), "EDSR, 48 channels, 10 blocks"),
    "EDSR-LCoA": (lambda: create_model("EDSR-LCoA", upscale=2), "EDSR, 48 channels, 10 blocks"),
    "EDSR, 49 channels, 10 blocks": (lambda: _edsr(49, 10), "EDSR, 48 channels, 10 blocks"),
    "EDSR, 48 channels, 16 blocks": (lambda: _edsr(48, 16), "EDSR, 48 channels, 10 blocks"),
    "EDSR, 32 channels, 6 blocks": (lambda: _edsr(32, 6), None),
    "+ LCoA every 2, share 3": (
        lambda: _edsr(32, 6, {"type": "LCoA", "every": 2, "share": 3}),
        "EDSR, 32 channels, 6 blocks",
    ),
}
"""Each network, and the one without attention that it is compared with."""

Networks = Mapping[str, tuple[Callable[[], nn.Module], str | None]]


def _edsr(num_feat: int, num_block: int, attention: dict[str, Any] | None = None) -> nn.Module:
    return EDSR(num_feat=num_feat, num_block=num_block, upscale=2, img_range=1.0, attention=attention)


def with_each(attention: Sequence[str]) -> Networks:
    """Return an EDSR of 64 channels and 16 blocks, and the same with each kind of attention after every 4th block."""
    plain = next(iter(NETWORKS))
    found = {plain: NETWORKS[plain]}
    for name in attention:
        config = default_config(name)
        found[f"+ {name} every 4, share {config['share']}"] = (partial(_edsr, 64, 16, config), plain)
    return found


def hosted(arguments: argparse.Namespace, attention: Sequence[str]) -> Networks:
    """Return the network of `--host`, and the same with each kind of attention where `attach` places it."""
    import_modules(arguments)
    given = options(arguments)

    def build(layer: str | None = None) -> nn.Module:
        model = cast(nn.Module, build_host(arguments, given))
        return model if layer is None else attach(model, arguments.body, layer)

    name = arguments.host.rpartition(":")[2]
    return {name: (build, None), **{f"+ {layer}": (partial(build, layer), name) for layer in attention}}


@dataclass(frozen=True)
class Case:
    """A column of the table.

    Attributes:
        training: a training step instead of a forward without gradients.
        half: under bfloat16 autocast.
        batch: number of images.
        side: of an image, in pixels.
    """

    training: bool
    half: bool
    batch: int
    side: int

    def __str__(self) -> str:
        """Return the head of the column."""
        what = f"training step, {self.batch} × {self.side}²" if self.training else f"forward, {self.side}²"
        return f"{what}, {'bfloat16' if self.half else 'float32'}"

    def call(self, build: Callable[[], nn.Module], device: torch.device) -> Call:
        """Return what is timed."""
        torch.manual_seed(0)
        network = build().to(device).train(self.training)
        x = images(self.batch, self.side).to(device)

        def run() -> Tensor:
            with self.precision(device):
                output: Tensor = network(x)
            return output

        def step() -> None:
            network.zero_grad()
            run().float().abs().mean().backward()

        return step if self.training else torch.no_grad()(run)

    def precision(self, device: torch.device) -> AbstractContextManager[object]:
        """Return the context of a forward."""
        return torch.autocast(device.type, torch.bfloat16) if self.half else nullcontext()


@dataclass(frozen=True)
class Cost:
    """What one network costs in one case.

    Attributes:
        samples: of its time.
        peak: its peak of new memory in bytes.
    """

    samples: Sequence[Sample]
    peak: int


def measure(
    networks: Networks, cases: Sequence[Case], device: torch.device, rounds: int
) -> dict[str, dict[Case, Cost]]:
    """Return the costs of all networks in all cases."""
    costs: dict[str, dict[Case, Cost]] = {name: {} for name in networks}
    for case in cases:
        calls = {name: case.call(build, device) for name, (build, _) in networks.items()}
        for name, samples in alternate(calls, device, rounds=rounds, shortest=0.02).items():
            costs[name][case] = Cost(samples, new_memory(calls[name], device).peak)
    return costs


def record(networks: Networks, costs: Mapping[str, Mapping[Case, Cost]]) -> list[dict[str, Any]]:
    """Return a row for each network, for JSON.

    A row has the name, the number of parameters, the network without attention and, for each case, time and memory:
    milliseconds (median and quartiles) and MiB or, beside a network without attention, relative to it.
    """
    rows = []
    for name, (build, without) in networks.items():
        row = {"name": name, "without": without, "parameters": sum(p.numel() for p in build().parameters())}
        times, memory = {}, {}
        for case, cost in costs[name].items():
            if without is None:
                times[str(case)] = asdict(Spread.of([1000 * each.busy for each in cost.samples]))
                memory[str(case)] = cost.peak / 2**20
            else:
                plain = costs[without][case]
                times[str(case)] = asdict(ratio(cost.samples, plain.samples))
                memory[str(case)] = cost.peak / plain.peak
        rows.append({**row, "times": times, "memory": memory})
    return rows


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the times as a table."""
    cells = [
        [
            row["name"],
            *(
                f"{time['median']:.0f} ms"
                if row["without"] is None
                else f"{time['median']:.2f} ({time['q1']:.2f}–{time['q3']:.2f})×"
                for time in row["times"].values()
            ),
        ]
        for row in rows
    ]
    return table(["", *rows[0]["times"]], cells)


def memory_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the peaks of new memory as a table."""
    cells = [
        [
            row["name"],
            *(f"{peak:.0f} MiB" if row["without"] is None else f"{peak:.2f}×" for peak in row["memory"].values()),
        ]
        for row in rows
    ]
    return table(["peak of new memory", *rows[0]["memory"]], cells)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add = parser.add_argument
    add("--size", type=_positive, default=96, metavar="N", help="side of the image of a forward (%(default)s)")
    add("--patch", type=_positive, default=48, metavar="N", help="side of the patches of a training step (%(default)s)")
    add("--batch", type=_positive, default=4, metavar="N", help="number of patches (%(default)s)")
    add("--rounds", type=_positive, default=9, metavar="N", help="samples of each network (%(default)s)")
    add("--threads", type=_positive, default=1, metavar="N", help="threads of torch on the CPU (%(default)s)")
    add("--attention", nargs="+", metavar="LAYER", help="measure an EDSR, or the network of --host, with each of these")
    add("--body", metavar="PATH", help="with --host: the trunk, if `attach` does not find it")
    add("--json", type=Path, metavar="FILE", help="write all results")
    add_options(parser)
    add_device(parser)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be >= 1, got {text}")
    return number


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; return the exit status.

    Raises:
        UsageError: the device or the file cannot be used.
        SparseSRError: there is no such layer.
    """
    if arguments.json is not None:
        check_writable(arguments.json)
    attention = [find_layer(name).name for name in arguments.attention or ()]
    if arguments.host is not None:
        networks = hosted(arguments, attention or ["LCoA"])
    else:
        networks = with_each(attention) if attention else NETWORKS
    device = find_device(arguments.device)
    if not torch.amp.is_autocast_available(device.type):
        raise UsageError(f"--device must have autocast, got {device}")
    cases = [
        Case(training, half, *((arguments.batch, arguments.patch) if training else (1, arguments.size)))
        for training in (False, True)
        for half in (False, True)
    ]
    with threads(arguments.threads):
        found = record(networks, measure(networks, cases, device, arguments.rounds))
        machine = environment(device)
        show("\n".join(f"- {name}: {value}" for name, value in machine.items()) + "\n")
        show(markdown(found) + "\n\n" + memory_table(found))
    if arguments.json is not None:
        write_json(arguments.json, {"machine": machine, "networks": found})
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    return make_parser("cost", DESCRIPTION, "", add_arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    return run_command(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
