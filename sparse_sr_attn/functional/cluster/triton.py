"""Cluster attention and the assignment to centroids by Triton kernels, as custom operators opaque to compilers.

Attention reads rows by token, keeps a running softmax and writes rows by token, without a copy in slot order and
without stored weights. Besides the inputs, the backward keeps one number per token. The kernels are in
`triton_kernels`, which is imported when one of them runs.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_sr_attn.errors import BackendError
from sparse_sr_attn.functional._operators import operator
from sparse_sr_attn.functional._torch import working_precision
from sparse_sr_attn.functional._triton import Blocks, padded, precision_options
from sparse_sr_attn.functional.cluster.layout import ClusterLayout
from sparse_sr_attn.functional.l2_normalize import SHORTEST

MAX_QUERY_DIM = 256
"""Most channels of queries and keys that the kernels accept; values may have any number."""

MAX_UNIT_DIM = 16
"""Most channels of queries that the kernels bring to unit length without spilling registers."""

MAX_SORTED_CLUSTERS = 512
"""Most clusters by which the kernels sort."""

_VALUE_COLUMNS = 128  # that one kernel gathers; wider values go in several
_SLOTS = 64  # that a block has at most
_SUMMED = 2**12  # numbers of sums of clusters that a program holds
_SUMMED_AT_A_TIME = 32  # points
_MOST_PARTS = 128  # of the points, whose sums or counts are summed by one program
_SORTED_AT_A_TIME = 2**12  # tokens times clusters


# By the columns of queries and values in a block: up to 80, up to 160, and more.
_FLOAT = {
    "forward": (Blocks(32, 32), Blocks(16, 32), Blocks(16, 32)),
    "backward_query": (Blocks(64, 32), Blocks(16, 32), Blocks(16, 16, 8, "ieee")),
    "backward_key": (Blocks(64, 16), Blocks(16, 32, 8), Blocks(16, 16, 4, "ieee")),
}
_HALF = {
    "forward": (Blocks(64, 64), Blocks(32, 32), Blocks(32, 32, 8)),
    "backward_query": (Blocks(64, 32), Blocks(32, 32), Blocks(32, 16)),
    "backward_key": (Blocks(64, 32), Blocks(32, 16), Blocks(32, 16)),
}
_DOUBLE = (Blocks(32, 32, 4, "ieee"), Blocks(16, 16, 8, "ieee"), Blocks(16, 16, 8, "ieee"))


def _blocks(kernel: str, value: torch.dtype, columns: int, *, unit: bool) -> Blocks:
    """Return the launch options for values of a dtype and rows of `columns` columns; `unit` if keys are queries."""
    width = (columns > 80) + (columns > 160)
    if unit and (kernel, value, width) == ("backward_key", torch.float32, 0):
        return Blocks(64, 16, 8)
    if value == torch.float64:
        return _DOUBLE[width]
    return (_FLOAT if value == torch.float32 else _HALF)[kernel][width]


@dataclass(frozen=True)
class _Launch:
    """The arguments that all kernels of one attention call share.

    Attributes:
        grid: blocks per chunk, chunks, samples.
        sizes: tokens, slots in a chunk, slots.
        fill: offset, modulo the number of tokens, from a slot past the last token to the slot whose token it repeats.
        sees: the first slot that chunk 0 sees, and the number of slots; unused with neighbours.
        seen_by: the first slot that sees chunk 0, and the number of slots; likewise.
        num_repeats: most slots past the last token that repeat the same token.
        options: compile-time constants.
    """

    grid: tuple[int, int, int]
    sizes: tuple[int, int, int]
    fill: int
    sees: tuple[int, int]
    seen_by: tuple[int, int]
    num_repeats: int
    options: dict[str, Any]

    @classmethod
    def of(
        cls, kernel: str, query: Tensor, value: Tensor, layout: ClusterLayout, scale: float, *, unit: bool
    ) -> "_Launch":
        """Return the arguments of a call; they are kept, because computing them takes as long as launching a kernel."""
        sizes = len(query), query.shape[-1], value.shape[-1]
        precision = torch.get_float32_matmul_precision()
        return cls._kept(kernel, *sizes, query.dtype, value.dtype, layout, scale, unit, precision)

    @classmethod
    @functools.lru_cache(maxsize=256)
    def _kept(
        cls,
        kernel: str,
        batch: int,
        query_dim: int,
        value_dim: int,
        query_dtype: torch.dtype,
        value_dtype: torch.dtype,
        layout: ClusterLayout,
        scale: float,
        unit: bool,
        matmul_precision: str,
    ) -> "_Launch":
        n, i, k = layout.num_tokens, layout.chunk_size, layout.num_chunks
        behind, ahead = layout.reach
        num_seen = (behind + 1 + ahead) * i
        padding = layout.num_slots - n
        block_d, block_e = padded(query_dim), min(padded(value_dim), _VALUE_COLUMNS)
        blocks = _blocks(kernel, value_dtype, block_d + block_e, unit=unit)
        block_i = min(padded(i), blocks.rows, _SLOTS)
        return cls(
            grid=(-(-i // block_i), k, batch),
            sizes=(n, i, layout.num_slots),
            fill=-padding % n,
            sees=(-behind * i % layout.num_slots, num_seen),
            seen_by=(-ahead * i % layout.num_slots, num_seen),
            num_repeats=0 if layout.count_keys_once else -(-padding // n),
            options={
                "SCALE": scale,
                "EXACT": layout.count_keys_once,
                "NEAREST": layout.nearest,
                "UNIT": unit,
                "FLOOR": SHORTEST,
                "QUERY_DIM": query_dim,
                "VALUE_DIM": value_dim,
                "BLOCK_D": block_d,
                "BLOCK_E": block_e,
                "BLOCK_I": block_i,
                "BLOCK_J": min(padded(num_seen), blocks.seen, _SLOTS),
                "num_warps": blocks.warps,
                "num_stages": 2,  # of the pipeline; more spill registers
                **precision_options(query_dtype, value_dtype, blocks.precision, matmul_precision),
            },
        )

    def column_blocks(self) -> range:
        """Return the first column of each block of value columns."""
        return range(0, self.options["VALUE_DIM"], self.options["BLOCK_E"])


def _sees(order: Tensor, neighbors: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the concatenated lists of chunks that each chunk sees, and their offsets; `order` twice for a ring."""
    if neighbors is None:
        return order, order
    batch, num_chunks, num_seen = neighbors.shape
    num_seen = min(num_seen, num_chunks)
    chunk = torch.arange(num_chunks + 1, device=order.device)
    starts = (chunk + num_chunks * torch.arange(batch, device=chunk.device)[:, None]) * num_seen
    return neighbors[..., :num_seen].int(), starts


def _seen_by(order: Tensor, neighbors: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the lists of chunks that see each chunk, in the form of `_sees`."""
    if neighbors is None:
        return order, order
    _, num_chunks, num_seen = neighbors.shape
    seen, place = neighbors[..., : min(num_seen, num_chunks)].flatten(1).sort(dim=1, stable=True)
    chunk = torch.arange(num_chunks + 1, device=seen.device).expand(len(seen), -1).contiguous()
    sample = torch.arange(len(seen), device=seen.device)[:, None]
    by = (place // min(num_seen, num_chunks)).int()
    return by, torch.searchsorted(seen, chunk) + sample * seen.shape[1]


def _row_statistics(query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return empty tensors for the logsumexp of each query's scores, their maximum, and 1 / the sum of exponentials.

    The backward recomputes weights from the latter two: the rounding error of a logsumexp grows with the scores.
    """
    lse = query.new_empty(query.shape[:2], dtype=working_precision(query))
    return lse, torch.empty_like(lse), torch.empty_like(lse)


@operator("cluster_attention_triton")
def attention_op(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    order: Tensor,
    neighbors: Tensor | None,
    chunk_size: int,
    num_adjacent: int,
    exact_keys: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `cluster.cluster_attention`, `cluster.cluster_lse`, and the statistics that the backward needs.

    Without a key, it is the query at unit length.
    """
    from sparse_sr_attn.functional.cluster import triton_kernels as kernels  # noqa: PLC0415

    if query.shape[-1] > MAX_QUERY_DIM:
        raise BackendError(
            f"backend 'triton' takes queries of at most {MAX_QUERY_DIM} channels, got {query.shape[-1]}; "
            "'eager' takes any number"
        )
    unit = key is None
    query, value, order = (tensor.contiguous() for tensor in (query, value, order))
    key = query if key is None else key.contiguous()
    layout = ClusterLayout.of_order(order, neighbors, chunk_size, num_adjacent, exact_keys)
    launch = _Launch.of("forward", query, value, layout, scale, unit=unit)
    output = value.new_empty(value.shape)
    statistics = _row_statistics(query)
    rows = (query, key, value, order, *_sees(order, neighbors))
    arguments = (*rows, output, *statistics, *launch.sizes, *launch.sees, launch.fill)
    with torch.cuda.device_of(query):
        for start in launch.column_blocks():
            kernels.forward[launch.grid](*arguments, START=start, **launch.options)
    return output, *statistics


@attention_op.register_fake
def _(query: Tensor, key: Tensor | None, value: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return value.new_empty(value.shape), *_row_statistics(query)


@operator("cluster_attention_triton_backward")
def _attention_backward_op(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    order: Tensor,
    neighbors: Tensor | None,
    largest: Tensor,
    inverse: Tensor,
    chunk_size: int,
    num_adjacent: int,
    exact_keys: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from sparse_sr_attn.functional.cluster import triton_kernels as kernels  # noqa: PLC0415

    unit = key is None
    grad_output, query, value, order = (tensor.contiguous() for tensor in (grad_output, query, value, order))
    grad_lse = grad_lse if grad_lse is None else grad_lse.contiguous()
    key = query if key is None else key.contiguous()
    layout = ClusterLayout.of_order(order, neighbors, chunk_size, num_adjacent, exact_keys)
    queries, keys = (
        _Launch.of(name, query, value, layout, scale, unit=unit) for name in ("backward_query", "backward_key")
    )
    grad_query, grad_value = torch.empty_like(query), torch.empty_like(value)
    grad_key = query.new_empty(0) if unit else torch.empty_like(key)
    delta = torch.empty_like(largest)
    lse = {"LSE": grad_lse is not None}
    to_query = (
        grad_output,
        delta if grad_lse is None else grad_lse,
        query,
        key,
        value,
        order,
        *_sees(order, neighbors),
        largest,
        inverse,
    )
    to_key = (grad_output, query, key, value, order, *_seen_by(order, neighbors), largest, inverse, delta)
    sees = (*queries.sizes, *queries.sees, queries.fill)
    seen_by = (*keys.sizes, *keys.seen_by, keys.fill, keys.num_repeats)
    with torch.cuda.device_of(query):
        for start in queries.column_blocks():
            # Attention is linear in the values, hence a sum over parts of their columns.
            part = grad_query if start == 0 else torch.empty_like(query)
            key_part = part if unit else grad_key if start == 0 else torch.empty_like(key)
            options = {"START": start, **queries.options, **lse}
            kernels.backward_query[queries.grid](*to_query, part, delta, *sees, **options)
            kernels.backward_key[keys.grid](*to_key, key_part, grad_value, *seen_by, START=start, **keys.options)
            if start > 0:
                grad_query += part
                if not unit:
                    grad_key += key_part
    return grad_query, grad_key, grad_value


@_attention_backward_op.register_fake
def _(
    grad_output: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor | None, value: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    grad_key = query.new_empty(0) if key is None else key.new_empty(key.shape)
    return query.new_empty(query.shape), grad_key, value.new_empty(value.shape)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, order, neighbors, *ctx.options = inputs
    ctx.set_materialize_grads(False)  # of the statistics
    ctx.save_for_backward(query, key, value, order, neighbors, *output[2:])


def _backward(
    ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None, *_statistics: object
) -> tuple[Tensor | None, ...]:
    _, key, value, *_ = ctx.saved_tensors
    grad_output = torch.zeros_like(value) if grad_output is None else grad_output
    grads = _attention_backward_op(grad_output, grad_lse, *ctx.saved_tensors, *ctx.options)
    return (grads[0], None if key is None else grads[1], grads[2], None, None, None, None, None, None)


attention_op.register_autograd(_backward, setup_context=_context)


def chain_op(similarity: Tensor, num_updates: Tensor, rank: Tensor, every: int) -> None:
    """Write the rank of each cluster on the path of `order.chain_rank`, if it is due after `num_updates` updates.

    Args:
        similarity: similarity of each pair of clusters, (k, k), int32.
        num_updates: on the device, so that the host does not wait for it.
        rank: int64; unchanged if no update is due.
        every: an update is due if `num_updates` is a multiple of this or a power of two.
    """
    from sparse_sr_attn.functional.cluster import triton_kernels as kernels  # noqa: PLC0415

    num_clusters = len(similarity)
    with torch.cuda.device_of(similarity):
        kernels.chain[(1,)](similarity.contiguous(), num_updates, rank, num_clusters, every, BLOCK=padded(num_clusters))


def apply_pending_op(
    centroids: Tensor,
    usage: Tensor,
    sums: Tensor,
    counts: Tensor,
    seeds: Tensor,
    num_updates: Tensor,
    ema_decay: float,
    reseed_threshold: float,
    eps: float,
) -> None:
    """Apply the pending update of k-means in place, as `kmeans.apply_pending` but without clearing it."""
    from sparse_sr_attn.functional.cluster import triton_kernels as kernels  # noqa: PLC0415

    num_clusters, width = centroids.shape
    with torch.cuda.device_of(centroids):
        kernels.apply_pending[(1,)](
            *(centroids, usage, sums, counts, seeds, num_updates, num_clusters, width),
            DECAY=ema_decay,
            THRESHOLD=reseed_threshold,
            EPS=eps,
            BLOCK_K=padded(num_clusters),
            BLOCK_D=padded(width),
            num_warps=8,
        )


def _parts(number: int, block: int) -> tuple[int, int]:
    """Return the number of parts, at most `_MOST_PARTS`, in which so many tokens are cut, and the tokens in a part."""
    share = -(-number // (_MOST_PARTS * block)) * block
    return -(-number // share), share


@operator("sort_by_cluster")
def sort_by_cluster_op(assignment: Tensor, rank: Tensor) -> Tensor:
    """Return the tokens of each sample in the order of the ranks of their clusters, then in image order.

    Args:
        assignment: the cluster of each token, (b, n).
        rank: the rank of each cluster, (r, k) with k <= `MAX_SORTED_CLUSTERS`; row `s % r` is that of sample `s`.
    """
    from sparse_sr_attn.functional.cluster import triton_kernels as kernels  # noqa: PLC0415

    assignment, rank = assignment.contiguous(), rank.contiguous()
    (batch, num_tokens), (num_ranks, num_clusters) = assignment.shape, rank.shape
    block_k = padded(num_clusters)
    block_i = _SORTED_AT_A_TIME // block_k
    num_parts, share = _parts(num_tokens, block_i)
    counts = assignment.new_empty(batch, num_parts, block_k, dtype=torch.int32)
    order = torch.empty_like(assignment)
    sizes = num_tokens, num_clusters, num_ranks, share
    options = {"BLOCK_I": block_i, "BLOCK_K": block_k}
    with torch.cuda.device_of(assignment):
        kernels.count_places[(num_parts, batch)](assignment, rank, counts, *sizes, **options)
        kernels.sort_tokens[(num_parts, batch)](assignment, rank, counts, order, *sizes, BLOCK_P=block_i, **options)
    return order


@sort_by_cluster_op.register_fake
def _(assignment: Tensor, rank: Tensor) -> Tensor:
    return assignment.new_empty(assignment.shape)


def store_pending_op(
    points: Tensor,
    best: Tensor,
    assignment: Tensor,
    sums: Tensor,
    counts: Tensor,
    seeds: Tensor,
    num_skipped: Tensor,
    eps: float,
    *,
    accumulate: bool,
) -> None:
    """Write the statistics of a step of k-means in place, as `kmeans.kmeans_step` does after the assignment.

    Args:
        points: (b, n, d) with d <= `MAX_QUERY_DIM`; computed with in float32.
        best: the product of each point with its centroid.
        assignment: the centroid of each point.
        sums: float32, like all that is written, and contiguous.
        counts: likewise.
        seeds: likewise; replaced, not added to.
        num_skipped: incremented if a point is not finite.
        eps: the length of a vector without direction.
        accumulate: add to `sums` and `counts`.
    """
    from sparse_sr_attn.functional.cluster import triton_kernels as kernels  # noqa: PLC0415

    points, num_points, (num_clusters, width) = points.contiguous(), best.numel(), sums.shape
    block_d = padded(width)
    block_k = min(padded(num_clusters), max(16, _SUMMED // block_d))
    num_parts, share = _parts(num_points, _SUMMED_AT_A_TIME)
    part_sums = sums.new_empty(num_parts, num_clusters, width)
    part_counts = torch.empty_like(part_sums[..., 0], dtype=torch.int32)
    keys = torch.empty_like(assignment.view(-1))
    options = {"WIDTH": width, "EPS": eps, "BLOCK_D": block_d}
    with torch.cuda.device_of(points):
        kernels.sum_points[(num_parts, -(-num_clusters // block_k))](
            *(points, best, assignment, part_sums, part_counts, keys, num_points, num_clusters, share),
            BLOCK_K=block_k,
            BLOCK_I=_SUMMED_AT_A_TIME,
            num_stages=2,
            **options,
        )
        chosen = keys.topk(min(num_clusters, num_points), largest=False)[0]
        kernels.store_pending[(-(-num_clusters // 16),)](
            *(points, part_sums, part_counts, chosen, sums, counts, seeds, num_skipped),
            *(num_clusters, num_parts, len(chosen)),
            ACCUMULATE=accumulate,
            BLOCK_K=16,
            **options,
        )


@operator("nearest_centroid_triton")
def nearest_op(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest dot product of each point (b, n, d) with a centroid (k, d), and the index of that centroid.

    The lowest index wins a tie. If all products are NaN, the index is 0.
    """
    import triton.language as tl  # noqa: PLC0415

    from sparse_sr_attn.functional.cluster import triton_kernels as kernels  # noqa: PLC0415

    points, centroids = points.contiguous(), centroids.contiguous()
    best = points.new_empty(points.shape[:2], dtype=working_precision(points))
    index = torch.empty_like(best, dtype=torch.int64)
    num_points, width = best.numel(), points.shape[-1]
    most = min(_SLOTS, max(16, 2**13 // padded(width)))
    with torch.cuda.device_of(points):
        kernels.nearest[(-(-num_points // most),)](
            *(points, centroids, best, index, num_points, len(centroids)),
            WIDTH=width,
            BLOCK_D=padded(width),
            BLOCK_I=most,
            BLOCK_J=min(padded(len(centroids)), most),
            WORK=tl.float64 if best.dtype == torch.float64 else tl.float32,
            PRECISION="ieee",
        )
    return best, index


@nearest_op.register_fake
def _(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    best = points.new_empty(points.shape[:2], dtype=working_precision(points))
    return best, torch.empty_like(best, dtype=torch.int64)
