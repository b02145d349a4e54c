"""An order of clusters in which neighbours are similar, so that adjacent chunks hold similar tokens."""

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F

from sparse_sr_attn.functional._operators import operator
from sparse_sr_attn.functional._torch import backward_is_running
from sparse_sr_attn.functional.backend import resolve_backend
from sparse_sr_attn.functional.cluster.triton import chain_op

_STEPS = 2**24
"""Similarities are compared in steps of 2**-24, computed in float64: the same on every device."""

_EVERY = 16
"""The order is recomputed after every so many updates of the centroids, and after 0, 1, 2, 4 and 8."""


def chain_rank(centroids: Tensor) -> Int[Tensor, "k"]:
    """Return the rank of each cluster on a greedy path from cluster 0 to the most similar remaining cluster.

    Args:
        centroids: (k, d); their cosines count, so they may be of any length.

    Returns:
        A permutation; the lowest index wins a tie.

    Examples:
        >>> centroids = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]])
        >>> chain_rank(centroids)  # 0, then 2, which is similar to both, then 1
        tensor([0, 2, 1])
    """
    if centroids.is_meta:
        return torch.empty(len(centroids), dtype=torch.int64, device="meta")
    similarity = _similarity(centroids).cpu()
    rank = torch.zeros(len(centroids), dtype=torch.int64, device="cpu")
    visited = torch.zeros_like(similarity[0])
    here = 0
    for place in range(len(centroids)):
        rank[here] = place
        visited[here] = -4 * _STEPS
        here = int((similarity[here] + visited).argmax())
    return rank.to(centroids.device)


def order_clusters(centroids: Tensor, num_updates: Int[Tensor, ""], rank: Int[Tensor, "k"]) -> None:
    """Update `rank` in place: after some updates of the centroids, set it to their `chain_rank`.

    Centroids do not move between two forward passes, so a recomputation finds the same ranks; it updates nothing. On
    GPUs with triton a single program computes the path; elsewhere, the CPU does.
    """
    _order_clusters(centroids.detach(), num_updates, rank)


@operator("order_clusters", mutates_args=("rank",))
def _order_clusters(centroids: Tensor, num_updates: Tensor, rank: Tensor) -> None:
    if backward_is_running():
        return
    if resolve_backend("auto", centroids.device) == "triton":
        chain_op(_similarity(centroids).int(), num_updates, rank, _EVERY)
        return
    updates = int(num_updates)
    if updates & (updates - 1) == 0 or updates % _EVERY == 0:
        rank.copy_(chain_rank(centroids))


@_order_clusters.register_fake
def _(centroids: Tensor, num_updates: Tensor, rank: Tensor) -> None: ...


def _similarity(centroids: Tensor) -> Int[Tensor, "k k"]:
    centroids = F.normalize(centroids.double(), dim=-1)
    return (centroids @ centroids.T * _STEPS).round().long()
