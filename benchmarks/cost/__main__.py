"""`python -m benchmarks.cost`: what attention costs a network, in float32 and bfloat16, forward and in training."""

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.command import make_parser, run_command
from benchmarks.speed.run import environment, images
from benchmarks.speed.timing import Call, Sample, Spread, alternate, ratio
from sparse_sr_attn import EDSR, create_model
from sparse_sr_attn.cli.common import UsageError, add_device, find_device, show, table

DESCRIPTION = """\
Time networks with attention relative to the same networks without, alternating in one process.

examples:
  python -m benchmarks.cost
  python -m benchmarks.cost --size 128 --rounds 15
  python -m benchmarks.cost --device cuda

bfloat16 is autocast. A training step is forward and backward of an L1 loss, without the optimizer."""

NETWORKS: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
    "EDSR, 64 channels, 16 blocks": (lambda: _edsr(64, 16), None),
    "+ LCoA every 4, share 4": (lambda: _edsr(64, 16, "LCoA"), "EDSR, 64 channels, 16 blocks"),
    "+ GMSA every 4, share 4": (lambda: _edsr(64, 16, "GMSA"), "EDSR, 64 channels, 16 blocks"),
    "EDSR, 48 channels, 10 blocks": (lambda: _edsr(48, 10), None),
    "LCoAN-light": (lambda: create_model("LCoAN-light", upscale=2), "EDSR, 48 channels, 10 blocks"),
}
"""Each network, and the one without attention that it is compared with."""


def _edsr(num_feat: int, num_block: int, attention: str | None = None) -> nn.Module:
    config = None if attention is None else {"type": attention, "every": 4, "share": 4}
    return EDSR(num_feat=num_feat, num_block=num_block, upscale=2, img_range=1.0, attention=config)


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


def measure(cases: Sequence[Case], device: torch.device, rounds: int) -> dict[str, dict[Case, list[Sample]]]:
    """Return the samples of all networks in all cases."""
    samples: dict[str, dict[Case, list[Sample]]] = {name: {} for name in NETWORKS}
    for case in cases:
        calls = {name: case.call(build, device) for name, (build, _) in NETWORKS.items()}
        for name, found in alternate(calls, device, rounds=rounds, shortest=0.02).items():
            samples[name][case] = found
    return samples


def markdown(samples: dict[str, dict[Case, list[Sample]]]) -> str:
    """Return the table: milliseconds of networks without attention, and how many times longer others take."""
    rows = []
    for name, (_, without) in NETWORKS.items():
        row = [name]
        for case, found in samples[name].items():
            if without is None:
                row.append(f"{1000 * Spread.of([each.busy for each in found]).median:.0f} ms")
            else:
                spread = ratio(found, samples[without][case])
                row.append(f"{spread.median:.2f} ({spread.q1:.2f}–{spread.q3:.2f})×")
        rows.append(row)
    return table(["", *map(str, next(iter(samples.values())))], rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add = parser.add_argument
    add("--size", type=_positive, default=96, metavar="N", help="side of the image of a forward (%(default)s)")
    add("--patch", type=_positive, default=48, metavar="N", help="side of the patches of a training step (%(default)s)")
    add("--batch", type=_positive, default=4, metavar="N", help="number of patches (%(default)s)")
    add("--rounds", type=_positive, default=9, metavar="N", help="samples of each network (%(default)s)")
    add("--threads", type=_positive, default=1, metavar="N", help="threads of torch on the CPU (%(default)s)")
    add_device(parser)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be >= 1, got {text}")
    return number


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; return the exit status.

    Raises:
        UsageError: the device cannot be used.
    """
    device = find_device(arguments.device)
    if not torch.amp.is_autocast_available(device.type):
        raise UsageError(f"--device must have autocast, got {device}")
    cases = [
        Case(training, half, *((arguments.batch, arguments.patch) if training else (1, arguments.size)))
        for training in (False, True)
        for half in (False, True)
    ]
    before = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    try:
        show("\n".join(f"- {name}: {value}" for name, value in environment(device).items()) + "\n")
        show(markdown(measure(cases, device, arguments.rounds)))
    finally:
        torch.set_num_threads(before)
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    return make_parser("cost", DESCRIPTION, "", add_arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    return run_command(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
