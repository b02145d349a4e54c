"""Modules that update buffers in training, and a context that merges the updates of several forward passes."""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sparse_sr_attn.functional._torch import working_precision
from sparse_sr_attn.functional.cluster.order import chain_rank
from sparse_sr_attn.functional.kmeans import KMeansState, apply_pending, assign, kmeans_step


class RunningStateModule(nn.Module):
    """A module that updates its buffers in training; warns of lost updates under `nn.DataParallel`."""

    def updates_state(self) -> bool:
        """Return whether a forward pass would update the buffers now."""
        return self.training

    def _replicate_for_data_parallel(self) -> Any:
        if self.updates_state():
            _warn_of_replicas()
        return super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]


class KMeansStatistics(nn.Module):
    """A module whose buffers are a state of k-means.

    They stay in float32 or higher, whatever the dtype the module is cast to or loaded from, because float16 counts
    overflow at 65,504 tokens.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self._statistics()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, cast in self._statistics().items():
            if cast.dtype != working_precision(cast):
                self._buffers[name] = before[name].to(cast.device, working_precision(cast))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self._statistics():
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor):
                state_dict[prefix + name] = value.to(working_precision(value))
        rank, centroids = (state_dict.get(prefix + name) for name in ("rank", "centroids"))
        if isinstance(rank, Tensor) and isinstance(centroids, Tensor) and not _is_order(rank):
            state_dict[prefix + "rank"] = chain_rank(centroids)  # averaging buffers breaks it
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _statistics(self) -> dict[str, Tensor]:
        """Return the floating-point buffers of the state."""
        found = {name: self._buffers.get(name) for name in KMeansState._fields}
        return {name: value for name, value in found.items() if value is not None and value.is_floating_point()}


def _is_order(rank: Tensor) -> bool:
    return rank.is_meta or torch.equal(rank.cpu().sort().values, torch.arange(len(rank)))


class KMeansRound(KMeansStatistics):
    """A state of k-means and the order of its clusters; a call returns both."""

    def forward(self) -> tuple[KMeansState, Tensor | None]:
        """Return the state and, if there is one, the order of clusters, as views of the buffers."""
        return state_of(self), self._buffers.get("rank")


class KMeansModule(KMeansStatistics, RunningStateModule):
    """A module with states of k-means.

    Attributes:
        accumulates: whether forward passes add to the pending update without applying it; see `one_kmeans_update`.
    """

    ema_decay: float
    reseed_threshold: float
    accumulates: bool = False

    def states(self) -> list[KMeansState]:
        """Return the states of k-means; their tensors are the buffers."""
        return [state_of(self)]

    def assign_points(self, points: Float[Tensor, "b n d"], state: KMeansState) -> Int[Tensor, "b n"]:
        """Return the cluster of each point; in training, update `state` in place."""
        if not self.updates_state():
            return assign(points, state.centroids)
        return kmeans_step(
            points,
            state,
            ema_decay=self.ema_decay,
            reseed_threshold=self.reseed_threshold,
            accumulate=self.accumulates,
        )


def state_of(module: nn.Module) -> KMeansState:
    """Return the k-means state formed by the buffers of a module."""
    return KMeansState(*(getattr(module, name) for name in KMeansState._fields))


@contextmanager
def one_kmeans_update(model: nn.Module) -> Iterator[None]:
    """Merge all forward passes inside into one update of k-means, over all tokens. Otherwise each makes its own.

        with one_kmeans_update(model):  # once a step of the optimizer
            for part in parts:
                loss(model(part)).backward()
        optimizer.step()

    Entering the context applies the pending update of earlier forward passes; then the centroids stay fixed. So several
    forwards may precede one backward under activation checkpointing.

    Args:
        model: a layer, or a module that contains layers, wrapped, compiled or plain. Has no effect in evaluation.

    Note:
        Save weights and states outside the context. Nesting contexts of the same layers has no effect.

    Examples:
        >>> layer, parts = LCoA(8, num_clusters=4, chunk_size=16), torch.rand(3, 1, 8, 6, 6)
        >>> with one_kmeans_update(layer):  # three forwards, one update
        ...     outputs = [layer(part) for part in parts]
    """
    modules = [m for m in model.modules() if isinstance(m, KMeansModule) and m.updates_state() and not m.accumulates]
    with torch.no_grad():
        for module in modules:
            for state in module.states():
                apply_pending(state, ema_decay=module.ema_decay, reseed_threshold=module.reseed_threshold)
            module.accumulates = True
    try:
        yield
    finally:
        for module in modules:
            module.accumulates = False


@functools.cache
def _warn_of_replicas() -> None:
    warnings.warn(
        "under nn.DataParallel k-means and batch normalisation learn from the first device's part of each batch only; "
        "nn.parallel.DistributedDataParallel joins all parts",
        stacklevel=2,
    )
