r"""The floor: what the arithmetic of a method would take at the rates that this machine reaches in plain torch calls.

$$t = \frac{\mathrm{FLOP}}{\text{rate of a matrix product}} + \frac{\text{exponentials}}{\text{rate of a softmax}} +
\frac{\text{bytes}}{\text{rate of a copy}}$$

Nothing overlaps in this sum, and convolutions may be faster than `torch.matmul` is; a share above 100 % is possible.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from benchmarks.speed.timing import Call, Sample, Spread


@dataclass(frozen=True)
class Cost:
    """The arithmetic of one call.

    Attributes:
        flop: additions and multiplications of matrix products and convolutions.
        exp: exponentials.
        bytes: read and written, if each stage reads its input once and writes its output once.
        half_flop: additions and multiplications of bfloat16, in methods that are not of bfloat16 otherwise.
    """

    flop: float
    exp: float
    bytes: float
    half_flop: float = 0.0

    def times(self, factor: float) -> "Cost":
        """Return a multiple."""
        return Cost(self.flop * factor, self.exp * factor, self.bytes * factor, self.half_flop * factor)


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second of processor time.

    Attributes:
        flop: of `torch.matmul`, the faster of the shape of attention and of a square.
        exp: elements of a softmax in cache.
        bytes: read and written by a copy that no cache holds.
        half_flop: of `torch.matmul` of bfloat16.
    """

    flop: float
    exp: float
    bytes: float
    half_flop: float

    def floor(self, cost: Cost) -> float:
        """Return the seconds that the arithmetic takes at these rates."""
        return cost.flop / self.flop + cost.exp / self.exp + cost.bytes / self.bytes + cost.half_flop / self.half_flop


@dataclass(frozen=True)
class Yardstick:
    """A plain torch call whose rate is part of the floor.

    Attributes:
        rate: the rate it measures, a field of `Rates`; the fastest of several counts.
        amount: how much of that a call does.
        call: without arguments.
    """

    rate: str
    amount: float
    call: Call


def yardsticks(device: torch.device, dtype: torch.dtype, *, chunk_size: int, width: int) -> dict[str, Yardstick]:
    """Return calls by name, to be timed in the same rounds as the methods.

    Args:
        device: where.
        dtype: of the products; softmax is in float32 at least, as in the library.
        chunk_size: rows of weights; they have three times as many columns.
        width: of values.
    """
    on_cpu = device.type == "cpu"
    precise = torch.promote_types(dtype, torch.float32)
    count = max(1, 2**18 // (3 * chunk_size**2)) if on_cpu else 256  # 1 MiB of weights stays in cache
    side = 512 if on_cpu else 4096
    scores = torch.randn(count, chunk_size, 3 * chunk_size, device=device, dtype=precise)
    found = torch.empty_like(scores)
    source = torch.randn(2**24, device=device)
    target = torch.empty_like(source)
    sticks = {
        "softmax": Yardstick("exp", scores.numel(), lambda: torch.softmax(scores, dim=-1, out=found)),
        "copy": Yardstick("bytes", 8 * source.numel(), lambda: target.copy_(source)),
    }
    for rate, kind in (("flop", dtype), ("half_flop", torch.bfloat16)):
        weights = scores.softmax(dim=-1).to(kind)
        values = torch.randn(count, 3 * chunk_size, width, device=device).to(kind)
        square = torch.randn(side, side, device=device).to(kind)
        for name, (left, right) in {"attention": (weights, values), "square": (square, square)}.items():
            output = torch.matmul(left, right)
            amount = 2 * output.numel() * left.shape[-1]
            sticks[f"{rate} {name}"] = Yardstick(rate, amount, _product(left, right, output))
    return sticks


def _product(left: torch.Tensor, right: torch.Tensor, output: torch.Tensor) -> Call:
    def product() -> object:
        with torch.no_grad():
            return torch.matmul(left, right, out=output)

    return product


def rates_of(sticks: Mapping[str, Yardstick], samples: Mapping[str, Sequence[Sample]]) -> Rates:
    """Return the rates that samples of yardsticks, by name, tell: their medians."""
    found: dict[str, float] = {}
    for name, stick in sticks.items():
        rate = stick.amount / Spread.of([sample.busy for sample in samples[name]]).median
        found[stick.rate] = max(rate, found.get(stick.rate, 0.0))
    return Rates(**found)
