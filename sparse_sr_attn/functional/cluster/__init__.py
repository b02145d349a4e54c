r"""Attention over chunks of tokens sorted by cluster: the pattern, its weights, and their application.

`cluster_weights` computes the LSP of LCoAN, `apply_cluster_weights` its CoA, and `cluster_attention` both without
storing the weights. All backends give the same result. Functions that store weights have the backends *eager* and
*tiles*, the others all five:

- *eager*: index masks and whole tensors, without branches or loops; for export and for devices that like large batches;
- *tiles*: a loop over a few chunks at a time, so that scores stay in cache, inside an operator that is opaque to
  compilers; for the CPU;
- *triton*: kernels that read and write rows by token, for GPUs;
- *sdpa*: torch's scaled_dot_product_attention over sorted rows, for GPUs without triton; on a ring, without logsumexp;
- *flex*: torch's FlexAttention, compiled; only on request.

`resolve_backend` returns the one that runs on a device.

Slots are the tokens in `pattern.order`, cut into $k = \lceil n / i \rceil$ chunks of $i$ slots. Chunk $t$ sees the
chunks $t-a, \dots, t+a$ (mod $k$), in this order, or those that `pattern.neighbors` lists.
"""

import functools
import warnings
from importlib.util import find_spec
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_sr_attn.errors import BackendError, ShapeError
from sparse_sr_attn.functional._torch import (
    lower_precision,
    needs_plain_code,
    run_while_compiling,
    without_autocast,
    working_precision,
)
from sparse_sr_attn.functional.backend import Backend, resolve_backend, runs_kernels
from sparse_sr_attn.functional.cluster import flex, sdpa, tiles, triton
from sparse_sr_attn.functional.cluster.eager import Eager
from sparse_sr_attn.functional.cluster.layout import ClusterLayout
from sparse_sr_attn.functional.cluster.neighbors import nearest_rows
from sparse_sr_attn.functional.l2_normalize import l2_normalize
from sparse_sr_attn.states import ClusterPattern

__all__ = [
    "Form",
    "apply_cluster_weights",
    "cluster_attention",
    "cluster_attention_rounds",
    "cluster_lse",
    "cluster_pattern",
    "cluster_weights",
    "cluster_weights_rounds",
    "mean_keys",
    "resolve_backend",
    "seen_keys",
    "with_nearest_chunks",
]


def cluster_pattern(
    assignment: Int[Tensor, "b n"],
    *,
    chunk_size: int,
    num_adjacent: int = 1,
    count_keys_once: bool = True,
    rank: Int[Tensor, "r k"] | None = None,
    exact_keys: bool | None = None,
) -> ClusterPattern:
    """Sort the tokens by cluster.

    Args:
        assignment: the cluster of each token, in image order, >= 0.
        chunk_size: slots in a chunk, >= 1. Memory of weights grows as `n * chunk_size`.
        num_adjacent: neighbouring chunks seen on each side, >= 0.
        count_keys_once: whether each key counts once. With `False`, as published, the slots that pad the last chunk
            repeat the last tokens and count, and a chunk that is a neighbour twice counts twice.
        rank: position of each cluster in the order of clusters, from `order.chain_rank`, one row for each round; `None`
            to order clusters by index, as published.
        exact_keys: the old name of `count_keys_once`.

    Returns:
        The pattern. Tokens are sorted by cluster, then by position, so there are no ties and every device gives the
        same result.

    Raises:
        ValueError: `chunk_size < 1` or `num_adjacent < 0`.

    Source:
        LSP of LCoAN (arXiv 2404.04922). Deviation: the released sort is unstable, hence not reproducible.

    Examples:
        >>> pattern = cluster_pattern(torch.tensor([[1, 0, 1, 0, 2]]), chunk_size=2)
        >>> pattern.order  # cluster 0, then 1, then 2
        tensor([[1, 3, 0, 2, 4]])
    """
    if exact_keys is not None:
        warnings.warn("exact_keys is count_keys_once now", FutureWarning, stacklevel=2)
        count_keys_once = exact_keys
    if chunk_size < 1 or num_adjacent < 0:
        raise ValueError(f"chunk_size must be >= 1 and num_adjacent >= 0, got {chunk_size=}, {num_adjacent=}")
    key = assignment
    if rank is not None:
        if rank.shape[1] <= triton.MAX_SORTED_CLUSTERS and runs_kernels(rank.device):
            order = triton.sort_by_cluster_op(assignment, rank)
            return ClusterPattern(order, assignment, chunk_size, num_adjacent, count_keys_once)
        rounds = assignment.unflatten(0, (-1, len(rank))).unbind(dim=1)
        keys = [own[each] for own, each in zip(_sort_keys(rank), rounds, strict=True)]
        key = keys[0] if len(keys) == 1 else torch.stack(keys, dim=1).flatten(0, 1)
    if key.dtype in (torch.uint8, torch.int16):
        # A radix sort takes a pass for each byte, and such keys need no position to tell them apart.
        order = tiles.argsort_op(key) if key.is_cpu else key.argsort(dim=1, stable=True)
    else:
        num_tokens = key.shape[1]
        order = (key * num_tokens + torch.arange(num_tokens, device=key.device)).argsort(dim=1)
    return ClusterPattern(order, assignment, chunk_size, num_adjacent, count_keys_once)


def _sort_keys(rank: Int[Tensor, "r k"]) -> Int[Tensor, "r k"]:
    """Return the ranks of clusters in the smallest integers that hold them, where those are sorted faster."""
    if not _sorts_bytes_faster(rank.device) or rank.shape[1] > 2**15 or needs_plain_code():
        return rank
    return rank.to(torch.uint8 if rank.shape[1] <= 2**8 else torch.int16)


@run_while_compiling
def _sorts_bytes_faster(device: torch.device) -> bool:
    return device.type != "cpu" or _has_numpy()


@functools.cache  # if NumPy is missing, the search reads folders
def _has_numpy() -> bool:
    return find_spec("numpy") is not None


def with_nearest_chunks(pattern: ClusterPattern, key: Float[Tensor, "b n d"]) -> ClusterPattern:
    r"""Return a pattern in which each chunk sees the chunks with the most similar keys instead of the adjacent ones.

    Chunk $t$ sees itself and the $2a$ others of largest $\langle \bar k_t, \bar k_s \rangle$, where $a$ is the
    pattern's `num_adjacent` and $\bar k_s$ the mean of the unit-length keys of chunk $s$.

    Args:
        pattern: from `cluster_pattern`, with `count_keys_once=True`.
        key: one row per token, in image order.

    Returns:
        The pattern with `neighbors`. A token sees as many keys as before. Similarities are compared in steps of
        2**-20, and the lower chunk wins a tie. If there are fewer chunks, each counts once.

    Raises:
        ShapeError: `pattern` and `key` have different numbers of tokens.
        ValueError: `pattern` counts keys as published, which is defined only on the ring.

    Note:
        No gradient flows through the choice. Time grows with the square of the number of chunks; memory does not,
        except in eager code (export, transforms of `torch.func`).

    Examples:
        >>> key, assignment = torch.rand(1, 16, 8), torch.randint(4, (1, 16))
        >>> pattern = with_nearest_chunks(cluster_pattern(assignment, chunk_size=2), key)
        >>> pattern.neighbors.shape  # 8 chunks, each sees itself and 2 others
        torch.Size([1, 8, 3])
    """
    if not pattern.count_keys_once:
        raise ValueError("nearest chunks need count_keys_once=True, got False: the published counting needs a ring")
    means = mean_keys(pattern, key)
    return pattern._replace(neighbors=nearest_rows(means, 2 * pattern.num_adjacent + 1))


def mean_keys(pattern: ClusterPattern, key: Float[Tensor, "b n d"]) -> Float[Tensor, "b k d"]:
    """Return the mean of the unit-length keys of each chunk, in float32 or higher, without gradient.

    Args:
        pattern: from `cluster_pattern`, with `count_keys_once=True`.
        key: one row per token, in image order.

    Raises:
        ShapeError: `pattern` and `key` have different numbers of tokens.

    Examples:
        >>> pattern = cluster_pattern(torch.randint(4, (1, 16)), chunk_size=4)
        >>> mean_keys(pattern, torch.rand(1, 16, 8)).shape
        torch.Size([1, 4, 8])
    """
    _check(pattern, key)
    with without_autocast(key):
        chunks = Eager(pattern)
        num_chunks, num_tokens = chunks.layout.num_chunks, chunks.layout.num_tokens
        real = torch.arange(chunks.layout.num_slots, device=key.device).view(num_chunks, -1, 1) < num_tokens
        return chunks.chunks(l2_normalize(key.detach())).masked_fill(~real, 0).sum(dim=2) / real.sum(dim=1)


def seen_keys(pattern: ClusterPattern, tokens: Int[Tensor, "s"]) -> tuple[Int[Tensor, "b s j"], Bool[Tensor, "b s j"]]:
    """Return the keys that some tokens attend to.

    Args:
        pattern: from `cluster_pattern`.
        tokens: indices of the queries, in image order.

    Returns:
        The indices of each query's keys, in image order, and a mask of those that count. With `count_keys_once` no key
        counts twice.

    Examples:
        >>> pattern = cluster_pattern(torch.tensor([[0, 1, 0, 1, 0, 1]]), chunk_size=3, num_adjacent=0)
        >>> keys, counts = seen_keys(pattern, torch.tensor([1]))
        >>> keys[counts]  # the keys of token 1
        tensor([1, 3, 5])
    """
    eager = Eager(pattern)
    keys = eager._with_adjacent(eager.token.view(len(eager.order), eager.layout.num_chunks, -1, 1))[..., 0]
    chunk = (pattern.order.argsort(dim=1)[:, tokens] // eager.layout.chunk_size)[..., None].expand(
        -1, -1, keys.shape[2]
    )
    return keys.gather(1, chunk), eager.visible.expand_as(keys).gather(1, chunk)


def cluster_weights(
    query: Float[Tensor, "b n d"],
    key: Float[Tensor, "b n d"],
    pattern: ClusterPattern,
    *,
    scale: float = 1.0,
    normalize_keys: bool = False,
    dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> Float[Tensor, "b k i j"]:
    r"""Return the softmax weights of every slot over its own chunk and the adjacent ones.

    $$P_t = \mathrm{softmax}(\mathrm{scale} \cdot Q_t [K_{t-a}, \dots, K_{t+a}]^\top)$$

    With `pattern.neighbors`, the key chunks of $t$ are those of row $t$.

    Args:
        query: one row per token, in image order.
        key: one row per token, in image order.
        pattern: from `cluster_pattern`, with the same number of tokens.
        scale: factor on the dot products, dimensionless.
        normalize_keys: scale keys to unit length first, like `l2_normalize`; tiles do this without copying all keys.
        dtype: of the result; `None` for float32, or that of the query if higher.
        backend: "eager", "tiles", or "auto" for tiles on the CPU and eager elsewhere and for export.

    Returns:
        Weights in slot order, $j = (2a + 1)\,i$, in float32 or higher. Rows of tokens sum to 1. Empty slots and chunks
        that appear twice (because $k < 2a + 1$) have weight 0, so no token counts twice. Rows of slots past the last
        token are undefined.

    Raises:
        BackendError: `backend` was requested by name and stores no weights.
        ShapeError: `pattern` and `query` have different numbers of tokens.

    Note:
        Differentiable in `query` and `key`; the pattern carries no gradient. Equals dense attention if
        `chunk_size >= n`. Reference implementation: `reference.cluster`.

    Source:
        LSP of LCoAN (arXiv 2404.04922). Its released code orders the key chunks as own, previous, next, which gives
        the same weights.

    Examples:
        >>> query, key, assignment = torch.rand(1, 16, 8), torch.rand(1, 16, 8), torch.randint(4, (1, 16))
        >>> pattern = cluster_pattern(assignment, chunk_size=4)
        >>> cluster_weights(query, key, pattern).shape  # 4 chunks of 4 slots, each sees 3 chunks
        torch.Size([1, 4, 4, 12])
    """
    return _weights(query, key, pattern, scale, normalize_keys, dtype, backend, with_lse=False)[0]


def _weights(
    query: Tensor,
    key: Tensor,
    pattern: ClusterPattern,
    scale: float,
    normalize_keys: bool,
    dtype: torch.dtype | None,
    backend: Backend,
    *,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the weights and, if `with_lse`, the logsumexp of the same scores."""
    _check(pattern, query, key)
    dtype = dtype or working_precision(query)
    if _tiled(backend, query):
        weights, lse = tiles.weights_op(query, key, *_unpack(pattern), scale, normalize_keys, dtype, with_lse)
        return weights, lse if with_lse else None
    query, key = (
        query.to(working_precision(query)),
        l2_normalize(key) if normalize_keys else key.to(working_precision(key)),
    )
    with without_autocast(query):
        eager = Eager(pattern)
        scores = eager.scores(query, key, scale)
        return scores.softmax(dim=-1).to(dtype), eager.lse(scores) if with_lse else None


def apply_cluster_weights(
    weights: Float[Tensor, "b k i j"],
    value: Float[Tensor, "b n e"],
    pattern: ClusterPattern,
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "b n e"]:
    """Apply attention weights to values; the second half of attention.

    Args:
        weights: from `cluster_weights` with the same pattern.
        value: one row per token, in image order.
        pattern: the one that the weights were computed with.
        backend: as in `cluster_weights`.

    Returns:
        One row per token, in image order, in the dtype of `value`.

    Raises:
        BackendError: `backend` was requested by name and stores no weights.
        ShapeError: the sizes of `pattern`, `weights` and `value` do not agree.

    Note:
        Differentiable in `weights` and `value`.

    Source:
        CoA of LCoAN (arXiv 2404.04922).

    Examples:
        >>> query, key, value = torch.rand(3, 1, 16, 8).unbind()
        >>> pattern = cluster_pattern(torch.randint(4, (1, 16)), chunk_size=4)
        >>> weights = cluster_weights(query, key, pattern)
        >>> apply_cluster_weights(weights, value, pattern).shape
        torch.Size([1, 16, 8])
    """
    _check(pattern, value)
    layout = ClusterLayout.of(pattern)
    expected = (value.shape[0], layout.num_chunks, layout.chunk_size, layout.num_offsets * layout.chunk_size)
    if tuple(weights.shape) != expected:
        raise ShapeError(f"weights with this pattern must be of shape {expected}, got {tuple(weights.shape)}")
    if _tiled(backend, value):
        return tiles.apply_op(weights, value, *_unpack(pattern))
    with without_autocast(value):
        dtype = lower_precision(weights, value)
        return Eager(pattern).apply(weights.to(dtype), value.to(dtype)).to(value.dtype)


def cluster_attention(
    query: Float[Tensor, "b n d"],
    key: Float[Tensor, "b n d"],
    value: Float[Tensor, "b n e"],
    pattern: ClusterPattern,
    *,
    scale: float = 1.0,
    normalize_keys: bool = False,
    backend: Backend = "auto",
) -> Float[Tensor, "b n e"]:
    """Return `apply_cluster_weights(cluster_weights(query, key, ...), value, ...)` without storing the weights.

    Args:
        query: one row per token, in image order.
        key: one row per token, in image order.
        value: one row per token, in image order.
        pattern: from `cluster_pattern`, with the same number of tokens.
        scale: factor on the dot products, dimensionless.
        normalize_keys: as in `cluster_weights`.
        backend: as in `resolve_backend`; all but eager save the memory of the weights.

    Returns:
        One row per token, in image order, in the dtype of `value`.

    Raises:
        BackendError: `backend` was requested by name and cannot run here.
        ShapeError: `pattern` has another number of tokens than the rows.

    Note:
        Differentiable in `query`, `key` and `value` (flex: on GPUs); the backward recomputes the weights.

    Examples:
        >>> query, key, value = torch.rand(3, 1, 16, 8).unbind()
        >>> pattern = cluster_pattern(torch.randint(4, (1, 16)), chunk_size=4)
        >>> cluster_attention(query, key, value, pattern, scale=8**-0.5).shape
        torch.Size([1, 16, 8])
    """
    return _attention(query, key, value, pattern, scale, normalize_keys, backend, with_lse=False)[0]


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: ClusterPattern,
    scale: float,
    normalize_keys: bool,
    backend: Backend,
    *,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the attention and, if `with_lse`, the logsumexp of the same scores."""
    _check(pattern, query, key, value)
    backend = _backend(backend, query, pattern, with_lse=with_lse)
    if backend == "tiles":
        output, lse = tiles.attention_op(query, key, value, *_unpack(pattern), scale, normalize_keys, with_lse)
        return output, lse if with_lse else None
    if backend == "triton":
        return triton.attention_op(query, _unit(key, query, normalize_keys), value, *_unpack(pattern), scale)[:2]
    key = l2_normalize(key) if normalize_keys else key
    if backend == "flex":
        return flex.cluster_attention(query, key, value, pattern, scale, with_lse=with_lse)
    if backend == "sdpa":
        return sdpa.cluster_attention(query, key, value, pattern, scale), None
    query, key = (rows.to(working_precision(rows)) for rows in (query, key))
    with without_autocast(query):
        eager = Eager(pattern)
        scores = eager.scores(query, key, scale)
        weights = scores.softmax(dim=-1).to(lower_precision(scores, value))
        output = eager.apply(weights, value.to(weights.dtype)).to(value.dtype)
        return output, eager.lse(scores) if with_lse else None


def cluster_lse(
    query: Float[Tensor, "b n d"],
    key: Float[Tensor, "b n d"],
    pattern: ClusterPattern,
    *,
    scale: float = 1.0,
    normalize_keys: bool = False,
    backend: Backend = "auto",
) -> Float[Tensor, "b n"]:
    r"""Return $\log \sum_j \exp(\mathrm{scale} \cdot \langle q, k_j \rangle)$ over the keys that each token sees.

    Args:
        query: one row per token, in image order.
        key: one row per token, in image order.
        pattern: from `cluster_pattern`, with the same number of tokens.
        scale: factor on the dot products, dimensionless.
        normalize_keys: as in `cluster_weights`.
        backend: as in `cluster_attention`.

    Returns:
        One number per token, in image order, in float32 or higher: the log of the softmax denominator.

    Raises:
        BackendError: `backend` was requested by name and cannot run here.
        ShapeError: `pattern` and `query` have different numbers of tokens.

    Note:
        Differentiable in `query` and `key`.

    Examples:
        >>> pattern = cluster_pattern(torch.randint(4, (1, 16)), chunk_size=4)
        >>> cluster_lse(torch.rand(1, 16, 8), torch.rand(1, 16, 8), pattern).shape
        torch.Size([1, 16])
    """
    _check(pattern, query, key)
    backend = _backend(backend, query, pattern, with_lse=True)
    if backend == "tiles":
        return tiles.lse_op(query, key, *_unpack(pattern), scale, normalize_keys)
    if backend == "triton":
        nothing = query.new_zeros(*query.shape[:2], 1)
        return triton.attention_op(query, _unit(key, query, normalize_keys), nothing, *_unpack(pattern), scale)[1]
    key = l2_normalize(key) if normalize_keys else key
    if backend == "flex":
        return cast(Tensor, flex.cluster_attention(query, key, key, pattern, scale, with_lse=True)[1])
    query, key = query.to(working_precision(query)), key.to(working_precision(key))
    with without_autocast(query):
        eager = Eager(pattern)
        return eager.lse(eager.scores(query, key, scale))


def cluster_attention_rounds(
    query: Float[Tensor, "b n d"],
    key: Float[Tensor, "b n d"],
    value: Float[Tensor, "b n e"],
    pattern: ClusterPattern,
    num_rounds: int,
    *,
    scale: float = 1.0,
    normalize_keys: bool = False,
    backend: Backend = "auto",
) -> Float[Tensor, "b n e"]:
    r"""Return cluster attention over several rounds, in which a key counts once for each round that contains it.

    Equals applying `cluster_weights_rounds` without storing the weights: $\sum_r Z_r O_r / \sum_r Z_r$, with the output
    $O_r$ of each round and the denominator $Z_r$ of its softmax.

    Args:
        query: one row per token, in image order.
        key: one row per token, in image order.
        value: one row per token, in image order.
        pattern: for `b * num_rounds` samples; the rounds of a sample follow each other.
        num_rounds: patterns per sample, >= 1.
        scale: factor on the dot products, dimensionless.
        normalize_keys: as in `cluster_weights`.
        backend: as in `cluster_attention`.

    Returns:
        One row per token, in image order, in the dtype of `value`.

    Raises:
        BackendError: `backend` was requested by name and cannot run here.
        ShapeError: `pattern` has another number of samples or tokens.

    Source:
        NLSA (Mei et al., CVPR 2021).

    Examples:
        >>> query, key, value = torch.rand(3, 1, 16, 8).unbind()
        >>> pattern = cluster_pattern(torch.randint(4, (2, 16)), chunk_size=4)  # two rounds of one sample
        >>> cluster_attention_rounds(query, key, value, pattern, num_rounds=2).shape
        torch.Size([1, 16, 8])
    """
    if num_rounds == 1:
        return cluster_attention(
            query, key, value, pattern, scale=scale, normalize_keys=normalize_keys, backend=backend
        )
    query, key, rows = (tensor.repeat_interleave(num_rounds, dim=0) for tensor in (query, key, value))
    each, lse = _attention(query, key, rows, pattern, scale, normalize_keys, backend, with_lse=True)
    round_weights = cast(Tensor, lse).unflatten(0, (-1, num_rounds)).softmax(dim=1)
    with without_autocast(value):
        merged: Tensor = (round_weights[..., None] * each.unflatten(0, (-1, num_rounds))).sum(dim=1)
        return merged.to(value.dtype)


def cluster_weights_rounds(
    query: Float[Tensor, "b n d"],
    key: Float[Tensor, "b n d"],
    pattern: ClusterPattern,
    num_rounds: int,
    *,
    scale: float = 1.0,
    normalize_keys: bool = False,
    dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> Float[Tensor, "br k i j"]:
    r"""Return the weights of attention over several rounds, one softmax over the keys of all rounds.

    A round with more similar keys gets more weight: $P_r \leftarrow P_r\, Z_r / \sum_{r'} Z_{r'}$ with
    $Z_r = \sum_j \exp(\mathrm{scale} \cdot \langle q, k_j \rangle)$ over the keys of the round.

    Args:
        query: one row per token, in image order.
        key: one row per token, in image order.
        pattern: for `b * num_rounds` samples; the rounds of a sample follow each other.
        num_rounds: $r$, >= 1.
        scale: as in `cluster_weights`.
        normalize_keys: as in `cluster_weights`.
        dtype: as in `cluster_weights`.
        backend: as in `cluster_weights`.

    Returns:
        Weights as from `cluster_weights`; the rows of a token sum to 1 over all rounds together.

    Raises:
        BackendError: `backend` was requested by name and stores no weights.
        ShapeError: `pattern` has another number of samples or tokens.

    Source:
        NLSA (Mei et al., CVPR 2021), a softmax over each round's logsumexp.

    Examples:
        >>> query, key = torch.rand(2, 1, 16, 8).unbind()
        >>> pattern = cluster_pattern(torch.randint(4, (2, 16)), chunk_size=4)  # two rounds of one sample
        >>> cluster_weights_rounds(query, key, pattern, num_rounds=2).shape
        torch.Size([2, 4, 4, 12])
    """
    if num_rounds == 1:
        return cluster_weights(
            query, key, pattern, scale=scale, normalize_keys=normalize_keys, dtype=dtype, backend=backend
        )
    query, key = (rows.repeat_interleave(num_rounds, dim=0) for rows in (query, key))
    weights, lse = _weights(query, key, pattern, scale, normalize_keys, None, backend, with_lse=True)
    round_weights = cast(Tensor, lse).unflatten(0, (-1, num_rounds)).softmax(dim=1).flatten(0, 1)
    weights = weights * Eager(pattern).chunks(round_weights[..., None])
    return weights if dtype is None else weights.to(dtype)


def _check(pattern: ClusterPattern, *rows: Tensor) -> None:
    for tensor in rows:
        if tensor.ndim != 3 or tensor.shape[:2] != pattern.order.shape:
            raise ShapeError(
                f"pattern must have the tokens of the rows (b, n, c); it has (b, n) = {tuple(pattern.order.shape)}, "
                f"got rows of shape {tuple(tensor.shape)}"
            )


def _backend(backend: Backend, query: Tensor, pattern: ClusterPattern, *, with_lse: bool) -> Backend:
    """Return the backend of attention, in which "auto" avoids those that cannot do what is asked for."""
    chosen = resolve_backend(backend, query.device)
    if chosen == "sdpa" and (with_lse or pattern.neighbors is not None):
        if backend == "sdpa":
            lacks = "has no logsumexp" if with_lse else "knows only rings of chunks, no nearest ones"
            raise BackendError(f"backend 'sdpa' {lacks}; 'eager' works on any device")
        return "eager"
    if backend == "auto" and chosen == "triton" and query.shape[-1] > triton.MAX_QUERY_DIM:
        return "eager"
    return chosen


def _tiled(backend: Backend, rows: Tensor) -> bool:
    """Return whether stored weights are computed or applied by tiles."""
    if backend in ("flex", "sdpa", "triton"):
        raise BackendError(
            f"this operation stores weights, which backend {backend!r} cannot; 'eager' works on any device"
        )
    return resolve_backend(backend, rows.device) == "tiles"


def _unit(key: Tensor, query: Tensor, normalize_keys: bool) -> Tensor | None:
    """Return the keys that Triton kernels take; `None` for the query at unit length, which they compute themselves."""
    if not normalize_keys:
        return key
    return None if key is query and key.shape[-1] <= triton.MAX_UNIT_DIM else l2_normalize(key)


def _unpack(pattern: ClusterPattern) -> tuple[Tensor, Tensor | None, int, int, bool]:
    return pattern.order, pattern.neighbors, pattern.chunk_size, pattern.num_adjacent, pattern.count_keys_once
