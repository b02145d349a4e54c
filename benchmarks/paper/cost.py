"""What variants cost: time and memory of a network, in inference and in a step of training."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from benchmarks.speed.settings import Pass
from benchmarks.speed.timing import Spread, alternate, sample
from sparse_sr_attn.backbones.base import ResidualNetwork
from sparse_sr_attn.testing.memory import new_memory

PASSES: tuple[Pass, ...] = get_args(Pass)


@dataclass(frozen=True)
class Cost:
    """Of one call of a network.

    Attributes:
        milliseconds: of processor time; `None` where it was not measured.
        bytes: peak of new memory.
    """

    milliseconds: Spread | None
    bytes: int


def costs(
    models: Mapping[str, nn.Module],
    x: Tensor,
    *,
    passed: Pass,
    device: torch.device,
    rounds: int,
    limit: float,
    times: bool = True,
) -> dict[str, Cost]:
    """Measure networks on the same input, in turn.

    Args:
        models: by name; they are left in training mode, or not, as `passed` needs it.
        x: what they are given.
        passed: what is measured.
        device: where networks and input are.
        rounds: samples of the time of each.
        limit: seconds of processor time; a network whose call takes longer is left out.
        times: whether time is measured, too.

    Returns:
        The cost of each network that was not left out.
    """
    calls, found = {}, {}
    for name, model in models.items():
        call = _call(model.train(passed != "forward"), x, training=passed != "forward")
        call()
        if sample(call, device).busy > limit:
            continue
        calls[name], found[name] = call, Cost(None, new_memory(call, device).peak)
    if times:
        for name, samples in alternate(calls, device, rounds=rounds, shortest=0.05).items():
            found[name] = Cost(Spread.of([1000 * one.busy for one in samples]), found[name].bytes)
    return found


class Body(nn.Module):
    """The body of a network, which maps features to features: what comes after it hides what attention costs.

    Args:
        network: one with `features`.
    """

    def __init__(self, network: ResidualNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Return what the body makes of a feature map."""
        return self.network.features(x)


def growth(by_side: Mapping[int, float]) -> float:
    """Return $p$ of a cost that grows as (number of pixels) ** p from the smallest side to the largest."""
    first, last = min(by_side), max(by_side)
    return math.log(by_side[last] / by_side[first]) / math.log((last / first) ** 2)


def _call(model: nn.Module, x: Tensor, *, training: bool) -> Callable[[], object]:
    def infer() -> object:
        with torch.no_grad():
            return model(x)

    def step() -> object:
        model.zero_grad(set_to_none=True)
        output = model(x)
        output.mean().backward()
        return output

    return step if training else infer
