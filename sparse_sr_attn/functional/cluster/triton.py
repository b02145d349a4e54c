"""Cluster attention and the assignment to centroids by Triton kernels, as operators that compilers see whole.

Attention reads rows by token, keeps a running softmax and writes rows by token: no copy in slot order, no stored
weights. Besides the inputs, the backward keeps one number a token. The kernels are in `triton_kernels`,
which is imported when one of them is to run.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_sr_attn.errors import BackendError
from sparse_sr_attn.functional._torch import working_precision
from sparse_sr_attn.functional.backend import interpreting
from sparse_sr_attn.functional.cluster.layout import ClusterLayout

MAX_QUERY_DIM = 256
"""Channels of queries and keys that the kernels take; of values, any number."""

_VALUE_COLUMNS = 128  # that one kernel gathers; wider values go in several
_SLOTS = 64  # that a block has at most


@dataclass(frozen=True)
class _Kernel:
    """How a kernel is launched, so that on-chip memory suffices and no register is spilled.

    Attributes:
        numbers: of queries and values that a block has at most (16 slots always), for rows of up to 128 columns of
            queries and values, and for wider ones.
        warps: of a program, likewise.
    """

    numbers: tuple[int, int]
    warps: tuple[int, int]


_KERNELS = {
    "forward": _Kernel((2**13, 2**12), (4, 8)),
    "backward_query": _Kernel((2**12, 2**12), (8, 8)),
    "backward_key": _Kernel((2**12, 2**12), (4, 4)),
    "nearest": _Kernel((2**13, 2**13), (4, 4)),
}


@dataclass(frozen=True)
class _Launch:
    """What all kernels of one attention are called with.

    Attributes:
        grid: blocks of a chunk, chunks, samples.
        sizes: tokens, slots in a chunk, slots.
        fill: takes a slot past the last token to the slot whose token it repeats.
        sees: the first slot that chunk 0 sees, and how many there are; not used with neighbours.
        seen_by: the first slot from which chunk 0 is seen, and how many there are; likewise.
        num_repeats: how often a token may stand in slots past the last token.
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
    def of(cls, kernel: str, query: Tensor, value: Tensor, layout: ClusterLayout, scale: float) -> "_Launch":
        n, i, k, a = layout.num_tokens, layout.chunk_size, layout.num_chunks, layout.num_adjacent
        # Of the offsets that lead to the same chunk one counts (`ClusterLayout.counted`).
        behind, ahead = (min(a, (k - 1) // 2), min(a, k // 2)) if layout.exact_keys else (a, a)
        num_seen = (behind + 1 + ahead) * i
        padding = layout.num_slots - n
        block_d, block_e = _padded(query.shape[-1]), min(_padded(value.shape[-1]), _VALUE_COLUMNS)
        most = _most_slots(kernel, block_d + block_e)
        block_i = _block_of_chunk(i, most)
        return cls(
            grid=(-(-i // block_i), k, len(query)),
            sizes=(n, i, layout.num_slots),
            fill=-padding % n,
            sees=(-behind * i % layout.num_slots, num_seen),
            seen_by=(-ahead * i % layout.num_slots, num_seen),
            num_repeats=0 if layout.exact_keys else -(-padding // n),
            options={
                "SCALE": scale,
                "EXACT": layout.exact_keys,
                "NEAREST": layout.nearest,
                "QUERY_DIM": query.shape[-1],
                "VALUE_DIM": value.shape[-1],
                "BLOCK_D": block_d,
                "BLOCK_E": block_e,
                "BLOCK_I": block_i,
                "BLOCK_J": min(_padded(num_seen), most),
                "num_warps": _KERNELS[kernel].warps[block_d + block_e > 128],
                "num_stages": 2 if layout.nearest else 3,  # of the pipeline: more spill registers where lists are read
                **_precision(query, value),
            },
        )

    def column_blocks(self) -> range:
        """Return the first columns of the parts in which values are gathered."""
        return range(0, self.options["VALUE_DIM"], self.options["BLOCK_E"])


def _sees(order: Tensor, neighbors: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return which chunks each chunk sees, one list after the other, and where each begins; the order if on a ring."""
    if neighbors is None:
        return order, order
    batch, num_chunks, num_seen = neighbors.shape
    num_seen = min(num_seen, num_chunks)
    chunk = torch.arange(num_chunks + 1, device=order.device)
    starts = (chunk + num_chunks * torch.arange(batch, device=chunk.device)[:, None]) * num_seen
    return neighbors[..., :num_seen].int(), starts


def _seen_by(order: Tensor, neighbors: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return which chunks see each chunk, as `_sees` does."""
    if neighbors is None:
        return order, order
    _, num_chunks, num_seen = neighbors.shape
    seen, place = neighbors[..., : min(num_seen, num_chunks)].flatten(1).sort(dim=1, stable=True)
    chunk = torch.arange(num_chunks + 1, device=seen.device).expand(len(seen), -1).contiguous()
    sample = torch.arange(len(seen), device=seen.device)[:, None]
    by = (place // min(num_seen, num_chunks)).int()
    return by, torch.searchsorted(seen, chunk) + sample * seen.shape[1]


def _padded(size: int) -> int:
    """Return the side of a block that holds `size`: a power of two that matrix units take."""
    return max(16, 1 << (size - 1).bit_length())


def _most_slots(kernel: str, columns: int) -> int:
    """Return how many slots a block has at most, whose rows have so many columns: a power of two."""
    return max(16, min(_SLOTS, 1 << (_KERNELS[kernel].numbers[columns > 128] // columns).bit_length() - 1))


def _block_of_chunk(chunk_size: int, most: int) -> int:
    """Return how many slots of a chunk a program takes: as many as leave at most an eighth of its work idle."""
    block = min(_padded(chunk_size), most)
    while block > 16 and -chunk_size % block * 8 > chunk_size:
        block //= 2
    return block


def _precision(query: Tensor, value: Tensor) -> dict[str, Any]:
    import triton.language as tl  # noqa: PLC0415

    names = {
        torch.float64: tl.float64,
        torch.float32: tl.float32,
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
    }
    # The interpreter takes bits of bfloat16 for numbers. Products of two are exact in float32, so nothing else changes.
    exact = torch.float32 if interpreting() and value.dtype == torch.bfloat16 else value.dtype
    return {
        "WORK": names[working_precision(query)],
        "DOT": names[exact],
        "PRECISION": "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
    }


def _row_statistics(query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return space for the logsumexp of the scores of each query, their maximum, and 1 over their sum of exponentials.

    The backward makes weights of the latter two: of a logsumexp, rounding grows with the size of the scores.
    """
    lse = query.new_empty(query.shape[:2], dtype=working_precision(query))
    return lse, torch.empty_like(lse), torch.empty_like(lse)


@torch.library.custom_op("sparse_sr_attn::cluster_attention_triton", mutates_args=())
def attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    order: Tensor,
    neighbors: Tensor | None,
    chunk_size: int,
    num_adjacent: int,
    exact_keys: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `cluster.cluster_attention`, `cluster.cluster_lse`, and what the backward needs (`_row_statistics`)."""
    from sparse_sr_attn.functional.cluster import triton_kernels as kernels  # noqa: PLC0415

    if query.shape[-1] > MAX_QUERY_DIM:
        raise BackendError(
            f"backend 'triton' takes queries of at most {MAX_QUERY_DIM} channels, got {query.shape[-1]}; "
            "'eager' works for any"
        )
    query, key, value, order = (tensor.contiguous() for tensor in (query, key, value, order))
    layout = ClusterLayout.of_order(order, neighbors, chunk_size, num_adjacent, exact_keys)
    launch = _Launch.of("forward", query, value, layout, scale)
    output = value.new_empty(value.shape)
    statistics = _row_statistics(query)
    rows = (query, key, value, order, *_sees(order, neighbors))
    arguments = (*rows, output, *statistics, *launch.sizes, *launch.sees, launch.fill)
    with torch.cuda.device_of(query):
        for start in launch.column_blocks():
            kernels.forward[launch.grid](*arguments, START=start, **launch.options)
    return output, *statistics


@attention_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return value.new_empty(value.shape), *_row_statistics(query)


@torch.library.custom_op("sparse_sr_attn::cluster_attention_triton_backward", mutates_args=())
def _attention_backward_op(
    grad_output: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
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

    grad_output, grad_lse, query, key, value, order = (
        tensor.contiguous() for tensor in (grad_output, grad_lse, query, key, value, order)
    )
    layout = ClusterLayout.of_order(order, neighbors, chunk_size, num_adjacent, exact_keys)
    queries, keys = (_Launch.of(name, query, value, layout, scale) for name in ("backward_query", "backward_key"))
    grad_query, grad_key, grad_value = (torch.empty_like(rows) for rows in (query, key, value))
    delta = torch.empty_like(largest)
    to_query = (grad_output, grad_lse, query, key, value, order, *_sees(order, neighbors), largest, inverse)
    to_key = (grad_output, query, key, value, order, *_seen_by(order, neighbors), largest, inverse, delta)
    sees = (*queries.sizes, *queries.sees, queries.fill)
    seen_by = (*keys.sizes, *keys.seen_by, keys.fill, keys.num_repeats)
    with torch.cuda.device_of(query):
        for start in queries.column_blocks():
            # Attention is linear in the values, hence a sum over parts of their columns.
            parts = (grad_query, grad_key) if start == 0 else (torch.empty_like(query), torch.empty_like(key))
            kernels.backward_query[queries.grid](*to_query, parts[0], delta, *sees, START=start, **queries.options)
            kernels.backward_key[keys.grid](*to_key, parts[1], grad_value, *seen_by, START=start, **keys.options)
            if start > 0:
                grad_query += parts[0]
                grad_key += parts[1]
    return grad_query, grad_key, grad_value


@_attention_backward_op.register_fake
def _(
    grad_output: Tensor, grad_lse: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, order, neighbors, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, order, neighbors, *output[2:])


def _backward(ctx: Any, grad_output: Tensor, grad_lse: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    grads = _attention_backward_op(grad_output, grad_lse, *ctx.saved_tensors, *ctx.options)
    return (*grads, None, None, None, None, None, None)


attention_op.register_autograd(_backward, setup_context=_context)


def chain_op(similarity: Tensor, num_updates: Tensor, rank: Tensor, every: int) -> None:
    """Write the place of each cluster on the path of `cluster_order.chain_rank`, if `num_updates` says so.

    Args:
        similarity: of each pair of clusters, (k, k), in int32.
        num_updates: a number on the device: nothing waits for it.
        rank: in int64; left alone where it is not to change.
        every: it changes where `num_updates` is a multiple of this or a power of two.
    """
    from sparse_sr_attn.functional.cluster import triton_kernels as kernels  # noqa: PLC0415

    num_clusters = len(similarity)
    with torch.cuda.device_of(similarity):
        kernels.chain[(1,)](
            similarity.contiguous(), num_updates, rank, num_clusters, every, BLOCK=_padded(num_clusters)
        )


@torch.library.custom_op("sparse_sr_attn::nearest_centroid_triton", mutates_args=())
def nearest_op(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest dot product of each point (b, n, d) with a centroid (k, d), and which that is.

    The lowest index wins a tie. Of a point whose every product is NaN, the centroid is 0.
    """
    import triton.language as tl  # noqa: PLC0415

    from sparse_sr_attn.functional.cluster import triton_kernels as kernels  # noqa: PLC0415

    points, centroids = points.contiguous(), centroids.contiguous()
    best = points.new_empty(points.shape[:2], dtype=working_precision(points))
    index = torch.empty_like(best, dtype=torch.int64)
    num_points, width = best.numel(), points.shape[-1]
    most = _most_slots("nearest", _padded(width))
    with torch.cuda.device_of(points):
        kernels.nearest[(-(-num_points // most),)](
            *(points, centroids, best, index, num_points, len(centroids)),
            WIDTH=width,
            BLOCK_D=_padded(width),
            BLOCK_I=most,
            BLOCK_J=min(_padded(len(centroids)), most),
            WORK=tl.float64 if best.dtype == torch.float64 else tl.float32,
            PRECISION="ieee",
        )
    return best, index


@nearest_op.register_fake
def _(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    best = points.new_empty(points.shape[:2], dtype=working_precision(points))
    return best, torch.empty_like(best, dtype=torch.int64)
