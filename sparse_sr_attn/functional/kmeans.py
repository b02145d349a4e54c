r"""Spherical k-means over the tokens of feature maps.

A training step assigns points, computes sums and counts, updates a moving average of directions, and reseeds dead
clusters. `kmeans_step` does this as a single mutating operator, so that eager code, `torch.compile` and activation
checkpointing behave alike. The pure functions that it consists of are public, too.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from sparse_sr_attn.functional._operators import operator
from sparse_sr_attn.functional._torch import (
    backward_is_running,
    gathered,
    needs_plain_code,
    several_processes,
    without_autocast,
    working_precision,
)
from sparse_sr_attn.functional.backend import resolve_backend, runs_kernels
from sparse_sr_attn.functional.cluster.triton import MAX_QUERY_DIM, apply_pending_op, nearest_op, store_pending_op
from sparse_sr_attn.functional.flops import teach_flop_counters

_EPS = 1e-12
_LARGEST_IN_A_PROGRAM = 2**13  # numbers of centroids that one GPU program updates
_PRODUCTS_PER_BLOCK = 2**17  # half a MiB in float32


class KMeansState(NamedTuple):
    """The state of k-means between steps; `kmeans_step` updates it in place.

    Attributes:
        centroids: unit vectors.
        usage: moving average of each cluster's share of the tokens; starts at `1 / k`.
        pending_sums: sum of the unit vectors of each cluster's tokens in the last step, not yet applied.
        pending_counts: number of these tokens per cluster; all 0 when nothing is pending.
        pending_seeds: directions of the tokens least similar to their centroids, worst first; unused rows are 0.
        num_updates: number of updates applied.
        num_skipped: number of updates skipped because a token was not finite.
    """

    centroids: Float[Tensor, "k d"]
    usage: Float[Tensor, "k"]
    pending_sums: Float[Tensor, "k d"]
    pending_counts: Float[Tensor, "k"]
    pending_seeds: Float[Tensor, "k d"]
    num_updates: Int[Tensor, ""]
    num_skipped: Int[Tensor, ""]


def initial_state(num_clusters: int, dim: int, seed: int = 0) -> KMeansState:
    """Return the initial state: `num_clusters` random unit vectors of `dim` elements, which depend only on `seed`.

    Its numbers are in float32, or in torch's default dtype if that is higher.

    Examples:
        >>> initial_state(num_clusters=8, dim=4).centroids.shape
        torch.Size([8, 4])
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(num_clusters, dim, generator=generator, device="cpu", dtype=torch.float32)
    dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
    return KMeansState(
        centroids=F.normalize(directions, dim=-1).to(dtype),
        usage=torch.full((num_clusters,), 1 / num_clusters, dtype=dtype),
        pending_sums=torch.zeros(num_clusters, dim, dtype=dtype),
        pending_counts=torch.zeros(num_clusters, dtype=dtype),
        pending_seeds=torch.zeros(num_clusters, dim, dtype=dtype),
        num_updates=torch.zeros((), dtype=torch.int64),
        num_skipped=torch.zeros((), dtype=torch.int64),
    )


def hash_directions(num_clusters: int, dim: int, seed: int = 0) -> Float[Tensor, "k d"]:
    r"""Return directions that make `assign` a locality-sensitive hash.

    Buckets are $\arg\max([pR, -pR])$ with a Gaussian $R$ drawn from `seed`.

    Source:
        Cross-polytope hashing as in NLSA (Mei et al., CVPR 2021). Deviation: NLSA draws $R$ in every forward pass.

    Examples:
        >>> directions = hash_directions(num_clusters=8, dim=4)
        >>> assign(torch.rand(1, 16, 4), directions).shape
        torch.Size([1, 16])
    """
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn((num_clusters + 1) // 2, dim, generator=generator, device="cpu", dtype=torch.float32)
    return torch.cat([half, -half])[:num_clusters]


def assign(points: Float[Tensor, "b n d"], centroids: Float[Tensor, "k d"]) -> Int[Tensor, "b n"]:
    r"""Return $\arg\max_k \langle p, \mu_k \rangle$ for each point; the lowest index wins a tie.

    The norm of a point does not matter. No gradient flows through the assignment.

    Examples:
        >>> centroids = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> assign(torch.tensor([[[3.0, 1.0], [1.0, 2.0], [1.0, 1.0]]]), centroids)
        tensor([[0, 1, 0]])
    """
    return _nearest(points, centroids)[1]


def cluster_sums(
    points: Float[Tensor, "b n d"], assignment: Int[Tensor, "b n"], num_clusters: int
) -> tuple[Float[Tensor, "k d"], Float[Tensor, "k"]]:
    """Return, for each cluster, the sum of the unit vectors of its points over the batch, and their number.

    Examples:
        >>> points, assignment = torch.rand(2, 16, 4), torch.randint(8, (2, 16))
        >>> sums, counts = cluster_sums(points, assignment, num_clusters=8)
        >>> sums.shape, int(counts.sum())
        (torch.Size([8, 4]), 32)
    """
    units = _unit(points).flatten(0, 1)
    index = assignment.flatten()
    sums = units.new_zeros(num_clusters, units.shape[-1]).index_add_(0, index, units)
    # Whole numbers: float32 cannot count beyond 2**24.
    counts = index.new_zeros(num_clusters).index_add_(0, index, torch.ones_like(index))
    return sums, counts.to(sums.dtype)


def move_centroids(
    centroids: Float[Tensor, "k d"],
    sums: Float[Tensor, "k d"],
    counts: Float[Tensor, "k"],
    ema_decay: float | Float[Tensor, ""],
) -> Float[Tensor, "k d"]:
    r"""Return $\mathrm{unit}(\lambda \mu_k + (1 - \lambda)\,\mathrm{unit}(s_k))$ with $\lambda$ = `ema_decay`.

    A cluster keeps its centroid if it has no tokens, or if its sum or new mean is zero.

    Examples:
        >>> centroids, sums, counts = torch.eye(2), torch.tensor([[0.0, 3.0], [0.0, 0.0]]), torch.tensor([3.0, 0.0])
        >>> move_centroids(centroids, sums, counts, ema_decay=0.5)
        tensor([[0.7071, 0.7071],
                [0.0000, 1.0000]])
    """
    moved = ema_decay * centroids + (1 - ema_decay) * _unit(sums)
    keeps = (counts == 0) | (sums.norm(dim=-1) <= _EPS) | (moved.norm(dim=-1) <= _EPS)
    return torch.where(keeps[:, None], centroids, _unit(moved))


def least_similar(points: Float[Tensor, "b n d"], similarity: Float[Tensor, "b n"], num: int) -> Float[Tensor, "num d"]:
    """Return the unit vectors of the `num` least similar points, least similar first, padded with zero rows.

    Args:
        points: one row per token.
        similarity: similarity of each token to its centroid; the earlier token wins a tie.
        num: number of rows to return.

    Examples:
        >>> points, similarity = torch.eye(3)[None], torch.tensor([[0.9, 0.1, 0.5]])
        >>> least_similar(points, similarity, num=2)
        tensor([[0., 1., 0.],
                [0., 0., 1.]])
    """
    return _least_similar(points, similarity, num)[0]


def apply_pending(state: KMeansState, *, ema_decay: float, reseed_threshold: float) -> None:
    """Apply the pending update to the centroids, in place, and clear it.

    Args:
        state: updated in place.
        ema_decay: as in `kmeans_step`.
        reseed_threshold: as in `kmeans_step`.

    Examples:
        >>> state = initial_state(num_clusters=8, dim=4)
        >>> clusters = kmeans_step(torch.rand(2, 16, 4), state, ema_decay=0.999, reseed_threshold=0.01)
        >>> apply_pending(state, ema_decay=0.999, reseed_threshold=0.01)
        >>> int(state.num_updates)
        1
    """
    _apply_pending(state, ema_decay, reseed_threshold)
    for pending in (state.pending_sums, state.pending_counts, state.pending_seeds):
        pending.zero_()


def kmeans_step(
    points: Float[Tensor, "b n d"],
    state: KMeansState,
    *,
    ema_decay: float,
    reseed_threshold: float,
    accumulate: bool = False,
) -> Int[Tensor, "b n"]:
    r"""Assign the points in a training step, and update `state` in place, once.

    The step (1) applies the update pending from the previous step (moving average, unit length) and reseeds dead
    clusters; (2) assigns the points; (3) stores their sums, counts and seeds, summed over all processes, as the next
    pending update. Centroids thus stay fixed from one forward to the next, so a recomputation of this forward during
    its backward, which updates nothing, uses the same ones.

    The decay warms up as $\min(\lambda, (1 + t) / (10 + t))$ over the updates $t$; features change quickly at first.

    Args:
        points: one row per token, of any norm; no gradient flows back.
        state: updated in place.
        ema_decay: weight of the old centroid in an update, in [0, 1].
        reseed_threshold: a cluster whose usage falls below this fraction of the mean is dead and takes the direction
            of one of the least similar tokens; 0 disables reseeding.
        accumulate: skip (1), and add to the pending update in (3): several steps make one update, that of all their
            points. Call `apply_pending` before such a series.

    Returns:
        The cluster of each point. A step with a non-finite point moves no centroid and increments `num_skipped`.

    Examples:
        >>> state = initial_state(num_clusters=8, dim=4)
        >>> clusters = kmeans_step(torch.rand(2, 16, 4), state, ema_decay=0.999, reseed_threshold=0.01)
        >>> clusters.shape, int(state.pending_counts.sum())
        (torch.Size([2, 16]), 32)
    """
    teach_flop_counters()
    return _kmeans_step(points.detach(), *state, ema_decay, reseed_threshold, accumulate)


@operator(
    "kmeans_step",
    mutates_args=(
        "centroids",
        "usage",
        "pending_sums",
        "pending_counts",
        "pending_seeds",
        "num_updates",
        "num_skipped",
    ),
)
def _kmeans_step(
    points: Tensor,
    centroids: Tensor,
    usage: Tensor,
    pending_sums: Tensor,
    pending_counts: Tensor,
    pending_seeds: Tensor,
    num_updates: Tensor,
    num_skipped: Tensor,
    ema_decay: float,
    reseed_threshold: float,
    accumulate: bool,
) -> Tensor:
    state = KMeansState(centroids, usage, pending_sums, pending_counts, pending_seeds, num_updates, num_skipped)
    with without_autocast(points):
        if backward_is_running():
            return assign(points, centroids)
        if not accumulate:
            _apply_pending(state, ema_decay, reseed_threshold)
        best, assignment = _nearest(points, centroids)
        _store_pending(state, points, best, assignment, accumulate)
        return assignment


@_kmeans_step.register_fake
def _(points: Tensor, *_: object) -> Tensor:
    return points.new_empty(points.shape[:2], dtype=torch.int64)


def _apply_pending(state: KMeansState, ema_decay: float, reseed_threshold: float) -> None:
    if state.centroids.numel() <= _LARGEST_IN_A_PROGRAM and _runs_kernels(state):
        apply_pending_op(*state[:5], state.num_updates, ema_decay, reseed_threshold, _EPS)
        return
    total = state.pending_counts.sum()
    pending = total > 0
    updates = state.num_updates.to(state.usage.dtype)
    decay = torch.clamp((1 + updates) / (10 + updates), max=ema_decay)
    centroids = move_centroids(state.centroids, state.pending_sums, state.pending_counts, decay)
    usage = decay * state.usage + (1 - decay) * state.pending_counts / total.clamp(min=1)

    num_clusters = len(usage)
    seeds = state.pending_seeds
    dead = usage * num_clusters < reseed_threshold
    turn = dead.cumsum(0) - 1
    dead &= turn < (seeds.norm(dim=-1) > 0.5).sum()
    centroids = torch.where(dead[:, None], seeds[turn.clamp(min=0)], centroids)
    usage = torch.where(dead, torch.full_like(usage, 1 / num_clusters), usage)

    state.centroids.copy_(torch.where(pending, centroids, state.centroids))
    state.usage.copy_(torch.where(pending, usage, state.usage))
    state.num_updates.add_(pending)


def _runs_kernels(state: KMeansState) -> bool:
    return runs_kernels(state.centroids.device) and all(each.is_contiguous() for each in state)


def _store_pending(state: KMeansState, points: Tensor, best: Tensor, assignment: Tensor, accumulate: bool) -> None:
    num_clusters = len(state.usage)
    in_kernels = points.shape[-1] <= MAX_QUERY_DIM and best.dtype == state.centroids.dtype == torch.float32
    if in_kernels and _runs_kernels(state) and not several_processes():
        seeds = torch.empty_like(state.pending_seeds) if accumulate else state.pending_seeds
        pending = state.pending_sums, state.pending_counts, seeds, state.num_skipped
        store_pending_op(points, best, assignment, *pending, _EPS, accumulate=accumulate)
        if accumulate:
            both = torch.cat([state.pending_seeds, seeds])
            state.pending_seeds.copy_(_least_similar_of(both, state.centroids))
        return
    sums, counts = cluster_sums(points, assignment, num_clusters)
    # A point without direction is no seed: it comes last.
    length = points.to(best.dtype).norm(dim=-1)
    similarity = torch.where(length > _EPS, best / length, float("inf"))
    seeds, rank = _least_similar(points, similarity, num_clusters)
    if several_processes():
        sums, counts, seeds = _join(sums, counts, seeds, rank)
    # Sums see every point, so they tell for the seeds too.
    finite = sums.isfinite().all()
    sums, counts, seeds = (torch.where(finite, new, 0) for new in (sums, counts, seeds))
    if accumulate:
        sums, counts = state.pending_sums + sums, state.pending_counts + counts
        seeds = _least_similar_of(torch.cat([state.pending_seeds, seeds]), state.centroids)
    state.pending_sums.copy_(sums)
    state.pending_counts.copy_(counts)
    state.pending_seeds.copy_(seeds)
    state.num_skipped.add_(~finite)


def _least_similar_of(seeds: Tensor, centroids: Tensor) -> Tensor:
    """Return the least similar seeds, one per centroid, least similar first, padded with zero rows."""
    similarity = torch.where(seeds.norm(dim=-1) > 0.5, _nearest(seeds[None], centroids)[0][0], float("inf"))
    return seeds[similarity.argsort(stable=True)[: len(centroids)]]


def _join(sums: Tensor, counts: Tensor, seeds: Tensor, rank: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the statistics of all processes; the result is the same on each."""
    everywhere = gathered(torch.cat([sums, counts[:, None], seeds, rank[:, None]], dim=1), "k-means")
    all_sums, all_counts, all_seeds, all_ranks = everywhere.split([sums.shape[1], 1, seeds.shape[1], 1], dim=-1)
    worst = all_ranks.flatten().argsort(stable=True)[: len(seeds)]
    return all_sums.sum(dim=0), all_counts.sum(dim=0)[:, 0], all_seeds.flatten(0, 1)[worst]


def _least_similar(points: Tensor, similarity: Tensor, num: int) -> tuple[Tensor, Tensor]:
    units = _unit(points).flatten(0, 1)
    rising, worst = similarity.flatten().sort(stable=True)
    missing = max(0, num - len(worst))
    seeds, rank = units[worst[:num]], rising[:num]
    if missing == 0:
        return seeds, rank
    return F.pad(seeds, (0, 0, 0, missing)), F.pad(rank, (0, missing), value=float("inf"))


def _nearest(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest dot product of each point with a centroid, and the index of that centroid."""
    points = points.detach()
    points = points.to(working_precision(points))
    if points.shape[-1] <= MAX_QUERY_DIM and resolve_backend("auto", points.device) == "triton":
        return nearest_op(points, centroids.to(points.dtype))
    with without_autocast(points):
        if points.device.type == "cpu" and not needs_plain_code():
            return _nearest_by_blocks(points, centroids.to(points.dtype))
        best, index = (points @ centroids.to(points.dtype).T).max(dim=-1)
    return best, index


@operator("nearest")
def _nearest_by_blocks(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `_nearest` block by block, so that products stay in cache, without a scan for indices.

    `Tensor.max` tracks the index along with the maximum, one element at a time. Comparisons and products are several
    times faster: elements equal to the maximum become their rank from the end, all others 0.
    """
    num_points, num_clusters = points.shape[0] * points.shape[1], len(centroids)
    rank = torch.arange(num_clusters, 0, -1, dtype=points.dtype, device=points.device)
    best, first = points.new_empty(num_points), points.new_empty(num_points)
    size = max(1, _PRODUCTS_PER_BLOCK // num_clusters)
    for block, into, rank_into in zip(
        points.flatten(0, 1).split(size), best.split(size), first.split(size), strict=True
    ):
        products = block @ centroids.T
        torch.amax(products, dim=-1, out=into)
        torch.amax(products.ge_(into[:, None]).mul_(rank), dim=-1, out=rank_into)
    # Nothing equals NaN: such a point goes to the last cluster.
    index = (num_clusters - first).clamp_(max=num_clusters - 1).long()
    return best.view(points.shape[:2]), index.view(points.shape[:2])


@_nearest_by_blocks.register_fake
def _(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    return points.new_empty(points.shape[:2]), points.new_empty(points.shape[:2], dtype=torch.int64)


def _unit(vectors: Tensor) -> Tensor:
    return F.normalize(vectors.to(working_precision(vectors)), dim=-1, eps=_EPS)
