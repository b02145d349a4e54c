"""Spherical k-means one token at a time: assignment, batch sums, moving average, and a whole training step."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


def unit(vector: Tensor) -> Tensor:
    """Return `vector` at length 1; the zero vector stays zero."""
    length = torch.sqrt((vector * vector).sum())
    return vector / length if length > 0 else torch.zeros_like(vector)


def assign(points: Tensor, centroids: Tensor) -> Tensor:
    """Return the cluster of each token: the centroid with the largest dot product, the lowest index on a tie."""
    batch, num_tokens, _ = points.shape
    clusters = torch.zeros(batch, num_tokens, dtype=torch.int64)
    for b in range(batch):
        for n in range(num_tokens):
            best = float("-inf")
            for k, centroid in enumerate(centroids):
                similarity = (points[b, n] * centroid).sum().item()
                if similarity > best:
                    best, clusters[b, n] = similarity, k
    return clusters.to(points.device)


def cluster_sums(points: Tensor, assignment: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """Return, per cluster, the sum of the unit vectors of its tokens and their number, over all samples."""
    sums = points.new_zeros(num_clusters, points.shape[-1])
    counts = points.new_zeros(num_clusters)
    for b, clusters in enumerate(assignment.tolist()):
        for n, cluster in enumerate(clusters):
            sums[cluster] += unit(points[b, n])
            counts[cluster] += 1
    return sums, counts


def move_centroids(centroids: Tensor, sums: Tensor, counts: Tensor, ema_decay: float) -> Tensor:
    """Return the centroids after one step of the spherical moving average.

    A centroid becomes `unit(ema_decay * centroid + (1 - ema_decay) * unit(sum))`. It is unchanged if its cluster is
    empty, the sum is zero, or old and new cancel.
    """
    moved = []
    for centroid, total, count in zip(centroids, sums, counts, strict=True):
        direction = unit(total)
        mixed = unit(ema_decay * centroid + (1 - ema_decay) * direction)
        stays = count.item() == 0 or not direction.any() or not mixed.any()
        moved.append(centroid if stays else mixed)
    return torch.stack(moved)


def least_similar(points: Tensor, similarity: Tensor, num: int) -> Tensor:
    """Return the unit vectors of the `num` tokens that are least similar to their centroid, over all samples.

    They are in ascending similarity, ties by sample and position, and padded with zero rows.
    """
    ranked = sorted((s, b, n) for b, row in enumerate(similarity.tolist()) for n, s in enumerate(row))
    seeds = points.new_zeros(num, points.shape[-1])
    for row, (_, b, n) in enumerate(ranked[:num]):
        seeds[row] = unit(points[b, n])
    return seeds


@dataclass(frozen=True, eq=False)
class KMeansState:
    """The state of k-means between steps.

    `usage` is the moving average of each cluster's share of the tokens. What the previous step found is pending, or
    zero: `pending_seeds` starts with the least similar token. Updates that were not finite are dropped and counted.
    """

    centroids: Tensor
    usage: Tensor
    pending_sums: Tensor
    pending_counts: Tensor
    pending_seeds: Tensor
    num_updates: int = 0
    num_skipped: int = 0

    @classmethod
    def start(cls, centroids: Tensor) -> "KMeansState":
        """Return the initial state: even usage, nothing pending."""
        num_clusters = centroids.shape[0]
        usage = centroids.new_full((num_clusters,), 1 / num_clusters)
        return cls(
            centroids,
            usage,
            pending_sums=torch.zeros_like(centroids),
            pending_counts=torch.zeros_like(usage),
            pending_seeds=torch.zeros_like(centroids),
        )

    def nothing_pending(self) -> "KMeansState":
        """Return the same state with an empty pending update."""
        return replace(
            self,
            pending_sums=torch.zeros_like(self.pending_sums),
            pending_counts=torch.zeros_like(self.pending_counts),
            pending_seeds=torch.zeros_like(self.pending_seeds),
        )


def apply_pending(state: KMeansState, *, ema_decay: float, reseed_threshold: float) -> KMeansState:
    """Return the state after the pending update, if there is one: centroids and usage updated, dead clusters reseeded.

    After t updates the average keeps `min(ema_decay, (1 + t) / (10 + t))` of the old value, so that centroids move fast
    at first. A cluster whose usage falls below `reseed_threshold` of an even share is dead. Dead clusters, by index,
    take the nonzero seeds in their order, and restart with an even share. An update that is not finite is dropped.
    """
    if not state.pending_counts.any():
        return state
    num_clusters = state.centroids.shape[0]
    decay = min(ema_decay, (1 + state.num_updates) / (10 + state.num_updates))
    centroids = move_centroids(state.centroids, state.pending_sums, state.pending_counts, decay)
    share = state.pending_counts / state.pending_counts.sum()
    usage = decay * state.usage + (1 - decay) * share

    seeds = [seed for seed in state.pending_seeds if seed.any()]
    for cluster in range(num_clusters):
        if usage[cluster].item() * num_clusters < reseed_threshold and seeds:
            centroids[cluster] = seeds.pop(0)
            usage[cluster] = 1 / num_clusters

    update = (state.pending_sums, state.pending_counts, state.pending_seeds, centroids, usage)
    if not all(torch.isfinite(tensor).all() for tensor in update):
        return replace(state.nothing_pending(), num_skipped=state.num_skipped + 1)
    moved = replace(state, centroids=centroids, usage=usage, num_updates=state.num_updates + 1)
    return moved.nothing_pending()


def kmeans_step(
    points: Tensor, state: KMeansState, *, ema_decay: float, reseed_threshold: float
) -> tuple[KMeansState, Tensor]:
    """Return the state after one training step, and the cluster of each token.

    The step applies the pending update of the previous step, assigns the tokens to the resulting centroids, and stores
    this batch's sums, counts and seeds (the least similar tokens; zero tokens come last) as pending. A batch that is
    not finite leaves nothing pending and is counted.
    """
    state = apply_pending(state, ema_decay=ema_decay, reseed_threshold=reseed_threshold)
    assignment = assign(points, state.centroids)
    if not torch.isfinite(points).all():
        return replace(state.nothing_pending(), num_skipped=state.num_skipped + 1), assignment
    num_clusters = state.centroids.shape[0]
    sums, counts = cluster_sums(points, assignment, num_clusters)
    similarity = points.new_full(assignment.shape, float("inf"))
    for b, clusters in enumerate(assignment.tolist()):
        for n, cluster in enumerate(clusters):
            if points[b, n].any():
                similarity[b, n] = (unit(points[b, n]) * state.centroids[cluster]).sum()
    seeds = least_similar(points, similarity, num_clusters)
    return replace(state, pending_sums=sums, pending_counts=counts, pending_seeds=seeds), assignment
