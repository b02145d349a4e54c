r"""The floor: what the arithmetic of a method would take at the rates that this machine reaches in plain torch calls.

$$t = \frac{\mathrm{FLOP}}{\text{rate of a matrix product}} + \frac{\text{exponentials}}{\text{rate of a softmax}} +
\frac{\text{bytes}}{\text{rate of a copy}}$$

Nothing overlaps in this sum, and convolutions may be faster than `torch.matmul` is; a share above 100 % is possible.
"""

from dataclasses import dataclass

import torch

from sparse_sr_attn.bench.timing import Call, Spread, sample


@dataclass(frozen=True)
class Cost:
    """The arithmetic of one call.

    Attributes:
        flop: additions and multiplications of matrix products and convolutions.
        exp: exponentials.
        bytes: read and written, if each stage reads its input once and writes its output once.
    """

    flop: float
    exp: float
    bytes: float

    def times(self, factor: float) -> "Cost":
        """Return a multiple."""
        return Cost(self.flop * factor, self.exp * factor, self.bytes * factor)


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second of processor time.

    Attributes:
        flop: of `torch.matmul`, the faster of the shape of attention and of a square.
        exp: elements of a softmax in cache.
        bytes: read and written by a copy that no cache holds.
    """

    flop: float
    exp: float
    bytes: float

    def floor(self, cost: Cost) -> float:
        """Return the seconds that the arithmetic takes at these rates."""
        return cost.flop / self.flop + cost.exp / self.exp + cost.bytes / self.bytes


def measured_rates(
    device: torch.device, dtype: torch.dtype, *, chunk_size: int, width: int, rounds: int = 9, shortest: float = 0.02
) -> Rates:
    """Measure the rates.

    Args:
        device: where.
        dtype: of the products; softmax is in float32 at least, as in the library.
        chunk_size: rows of weights; they have three times as many columns.
        width: of values.
        rounds: samples of each rate, of which the median counts.
        shortest: seconds of a sample at least.
    """
    precise = torch.promote_types(dtype, torch.float32)
    count = max(1, 2**18 // (3 * chunk_size**2)) if device.type == "cpu" else 256  # 1 MiB of weights stays in cache
    side = 512 if device.type == "cpu" else 4096
    scores = torch.randn(count, chunk_size, 3 * chunk_size, device=device, dtype=precise)
    weights, values = (
        scores.softmax(dim=-1).to(dtype),
        torch.randn(count, 3 * chunk_size, width, device=device).to(dtype),
    )
    square = torch.randn(side, side, device=device).to(dtype)
    source = torch.randn(2**24, device=device)
    target = torch.empty_like(source)
    product, large, copy = torch.matmul(weights, values), torch.matmul(square, square), torch.empty_like(scores)

    def per_second(call: Call, amount: float) -> float:
        call()
        repeats = max(1, round(shortest / max(sample(call, device).wall, 1e-7)))
        return amount / Spread.of([sample(call, device, repeats).busy for _ in range(rounds)]).median

    with torch.no_grad():
        gemm = per_second(lambda: torch.matmul(weights, values, out=product), 2 * weights.numel() * width)
        squares = per_second(lambda: torch.matmul(square, square, out=large), 2 * side**3)
        softmax = per_second(lambda: torch.softmax(scores, dim=-1, out=copy), scores.numel())
        moved = per_second(lambda: target.copy_(source), 8 * source.numel())
    return Rates(max(gemm, squares), softmax, moved)
