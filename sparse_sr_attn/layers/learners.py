"""Modules whose buffers learn in each forward of training, and how to have several forwards make one update."""

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sparse_sr_attn.functional.kmeans import KMeansState, apply_pending, assign, kmeans_step


class Learner(nn.Module):
    """A module whose buffers learn from the forwards of training; says what is lost under `nn.DataParallel`."""

    def learns(self) -> bool:
        """Return whether a forward would move the buffers now."""
        return self.training

    def _replicate_for_data_parallel(self) -> Any:
        if self.learns():
            _warn_of_replicas()
        return super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]


class KMeansLearner(Learner):
    """A module that keeps the states of k-means."""

    ema_decay: float
    reseed_threshold: float
    _accumulates = False

    def states(self) -> list[KMeansState]:
        """Return the states of k-means, the buffers themselves."""
        return [state_of(self)]

    def assign_points(self, points: Float[Tensor, "b n d"], state: KMeansState) -> Int[Tensor, "b n"]:
        """Return the cluster of each point; where the module learns, `state` moves in place."""
        if not self.learns():
            return assign(points, state.centroids)
        return kmeans_step(
            points,
            state,
            ema_decay=self.ema_decay,
            reseed_threshold=self.reseed_threshold,
            accumulate=self._accumulates,
        )


def state_of(module: nn.Module) -> KMeansState:
    """Return the state that the buffers of a module are."""
    return KMeansState(*(getattr(module, name) for name in KMeansState._fields))


@contextmanager
def one_kmeans_update(model: nn.Module) -> Iterator[None]:
    """Have all forwards inside make one update of k-means, that of their tokens together; else each makes its own.

        with one_kmeans_update(model):  # once a step of the optimizer
            for part in parts:
                loss(model(part)).backward()
        optimizer.step()

    The centroids move when the context is entered, by what the forwards before it have left, and then stay. So under
    activation checkpointing several forwards may go before one backward.

    Args:
        model: a layer, or what has layers in it, wrapped or compiled or not. In evaluation nothing moves.

    Note:
        Save weights and states outside. A context inside another of the same layers changes nothing.
    """
    learners = [m for m in model.modules() if isinstance(m, KMeansLearner) and m.learns() and not m._accumulates]
    with torch.no_grad():
        for learner in learners:
            for state in learner.states():
                apply_pending(state, ema_decay=learner.ema_decay, reseed_threshold=learner.reseed_threshold)
            learner._accumulates = True
    try:
        yield
    finally:
        for learner in learners:
            learner._accumulates = False


@functools.cache
def _warn_of_replicas() -> None:
    warnings.warn(
        "under nn.DataParallel k-means and batch normalisation learn from the first device's part of each batch only; "
        "nn.parallel.DistributedDataParallel joins all parts",
        stacklevel=2,
    )
