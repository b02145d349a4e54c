"""Times that can be compared: in one process, in turn, as medians with quartiles, ratios of the same round."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import quantiles

import torch

Call = Callable[[], object]

_MAX_REPEATS = 1000


@dataclass(frozen=True)
class Sample:
    """Seconds of one call.

    Attributes:
        busy: of the processor: CPU time of this process with all its threads; on a GPU, time between two events.
        wall: by the clock.
    """

    busy: float
    wall: float


@dataclass(frozen=True)
class Spread:
    """The middle of some numbers and the half of them that surrounds it."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, numbers: Sequence[float]) -> "Spread":
        """Return the spread of numbers, of one at least."""
        q1, median, q3 = quantiles(numbers, n=4, method="inclusive") if len(numbers) > 1 else [*numbers] * 3
        return cls(median, q1, q3)


def sample(call: Call, device: torch.device, repeats: int = 1) -> Sample:
    """Return how long `call` takes, as the mean of some calls one after the other."""
    if device.type == "cuda":
        return _sample_on_gpu(call, device, repeats)
    busy, wall = time.process_time(), time.perf_counter()
    for _ in range(repeats):
        call()
    return Sample((time.process_time() - busy) / repeats, (time.perf_counter() - wall) / repeats)


def _sample_on_gpu(call: Call, device: torch.device, repeats: int) -> Sample:
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    wall = time.perf_counter()
    first.record(torch.cuda.current_stream(device))
    for _ in range(repeats):
        call()
    last.record(torch.cuda.current_stream(device))
    torch.cuda.synchronize(device)
    milliseconds: float = first.elapsed_time(last)
    return Sample(milliseconds / 1000 / repeats, (time.perf_counter() - wall) / repeats)


def alternate(
    calls: Mapping[str, Call], device: torch.device, *, rounds: int, shortest: float
) -> dict[str, list[Sample]]:
    """Time all calls in turn, round by round, so that what disturbs one round disturbs all in it.

    Each round begins with another call, so that none always follows the same one.

    Args:
        calls: by name; each is called a few times more, to warm up.
        device: where they compute.
        rounds: samples of each, >= 1.
        shortest: seconds; a call that takes less is repeated within a sample.

    Returns:
        The samples by name, in the order of the rounds.
    """
    repeats = {}
    for name, call in calls.items():
        call()
        once = max(sample(call, device).wall, 1e-7)
        repeats[name] = min(max(1, math.ceil(shortest / once)), _MAX_REPEATS)
    names = list(calls)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    for turn in range(rounds):
        start = turn % max(1, len(names))
        for name in names[start:] + names[:start]:
            samples[name].append(sample(calls[name], device, repeats[name]))
    return samples


def ratio(slow: Sequence[Sample], fast: Sequence[Sample]) -> Spread:
    """Return how many times longer the first takes, round by round."""
    return Spread.of([one.busy / other.busy for one, other in zip(slow, fast, strict=True)])


def exponent(seconds: Mapping[int, float], first: int, last: int) -> float:
    r"""Return $p$ of a time that grows as (number of tokens) ** p from one number to another.

    Args:
        seconds: by number of tokens.
        first: number of tokens.
        last: a larger one.
    """
    return math.log(seconds[last] / seconds[first]) / math.log(last / first)
