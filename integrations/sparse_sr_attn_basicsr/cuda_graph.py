"""CUDA graphs in training: the kernels of a forward and of a backward pass, recorded once and launched together."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparse_sr_attn.errors import first_line
from sparse_sr_attn_basicsr.randomness import undisturbed

_LOG = logging.getLogger(__name__)


class GraphedForward:
    """Runs a network in training as two CUDA graphs, one for the forward and one for the backward pass.

    They are captured at the first call, for its shape. This takes trial runs, after which buffers and random states
    are restored. Images of another shape, a second call in a step, and calls without gradient run the network itself,
    and so does every call if the network cannot be captured, which is logged once.

    Args:
        net: a network on one GPU, of which the Python code runs only once. Weights may change in place only.
    """

    def __init__(self, net: nn.Module) -> None:
        self._net = net
        self._graphed: Callable[[Tensor], Tensor] | None = None
        self._layout: Any = None  # of the images that the graphs take; `None` until there are any
        self._is_armed = False

    def begin_step(self) -> None:
        """Begin a training step: the next call may run the graphs.

        Clears the gradients, because those of the last step are the memory that the backward graph writes to.
        """
        self._is_armed = True
        for weight in self._net.parameters():
            weight.grad = None

    def __call__(self, images: Tensor) -> Tensor:
        """Return the network's result."""
        is_armed, self._is_armed = self._is_armed and torch.is_grad_enabled(), False
        if is_armed and self._layout is None:
            self._layout = _layout(images)
            self._graphed = self._capture(images)
        if not is_armed or self._graphed is None or _layout(images) != self._layout:
            return self._net(images)
        return self._graphed(images)

    def _capture(self, images: Tensor) -> Callable[[Tensor], Tensor] | None:
        buffers = list(self._net.buffers())
        before = [buffer.clone() for buffer in buffers]
        try:
            with undisturbed():
                graphed: Callable[[Tensor], Tensor] = torch.cuda.make_graphed_callables(
                    _Whole(self._net).train(self._net.training), (images.clone(),), allow_unused_input=True
                )  # type: ignore[assignment]
        except (RuntimeError, AssertionError) as error:  # whatever the network does that a graph cannot contain
            _LOG.warning(
                "note: train.cuda_graph: this network cannot be captured and runs without: %s", first_line(error)
            )
            return None
        finally:
            with torch.no_grad():
                for buffer, value in zip(buffers, before, strict=True):
                    buffer.copy_(value)
        return graphed


class _Whole(nn.Module):
    """A network, whose own `forward` stays as it is: `make_graphed_callables` replaces the one of what it is given."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)


def _layout(images: Tensor) -> tuple[Any, ...]:
    return images.shape, images.stride(), images.dtype, images.device
