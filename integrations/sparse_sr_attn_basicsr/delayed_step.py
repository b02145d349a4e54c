"""One training step of BasicSR's model, whose effects are delayed until all values are known to be finite."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparse_sr_attn.errors import TrainingError


class DelayedStep:
    """Records what BasicSR's model computes in one step, and the optimizer steps and the EMA that are due afterwards.

    Args:
        optimizers: by attribute of the model.
    """

    def __init__(self, optimizers: dict[str, "DelayedOptimizer"]) -> None:
        self.optimizers = optimizers
        self.losses: OrderedDict[str, Tensor] = OrderedDict()
        self.own: dict[str, Tensor] = {}  # of the current part, computed here
        self.ema_decay: float | None = None
        self.fraction = 1.0  # of the batch that is in the current part

    def begin(self, fraction: float) -> None:
        """Begin a part of the batch."""
        self.fraction = fraction
        for optimizer in self.optimizers.values():
            optimizer.begin()

    def note(self, losses: Mapping[str, Tensor]) -> None:
        """Add the losses of a part to those of the batch."""
        for name, loss in losses.items():
            mean = torch.as_tensor(loss).detach().float().mean()
            self.losses[name] = self.losses.get(name, 0) + self.fraction * mean


class DelayedOptimizer:
    """The optimizer that BasicSR's model sees: clears gradients, and records that a step is due."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.due = self._stepped = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)

    def begin(self) -> None:
        """Begin a part of the batch."""
        self._stepped = False

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Clear the gradients, unless they are those of earlier parts."""
        if not self.due:
            self.optimizer.zero_grad(*args, **kwargs)

    def step(self, *_: Any, **__: Any) -> None:
        """Record that a step is due.

        Raises:
            TrainingError: it is the second step in one part.
        """
        if self._stepped:
            raise TrainingError(
                "the host's optimize_parameters steps an optimizer more than once per iteration, and such steps "
                "cannot be delayed until all values are known to be finite; use the host's own model_type"
            )
        self.due = self._stepped = True


class Forwarding:
    """The network that BasicSR's model sees: calls go through `forward`."""

    def __init__(self, net: nn.Module, forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
        self._net, self._forward = net, forward

    def __call__(self, low: Tensor) -> Tensor:
        """Return `forward(net, low)`."""
        return self._forward(self._net, low)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._net, name)
