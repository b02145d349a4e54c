"""Cluster attention by tiles of a few chunks, as operators that compilers and autograd see whole.

Scores of a tile stay in cache, and no operator keeps more than one tile of them but for the weights it returns. The
backward of `attention` computes the weights again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparse_sr_attn.functional.cluster_layout import ClusterLayout
from sparse_sr_attn.functional.precision import working_precision
from sparse_sr_attn.states import ClusterPattern

_SCORES_PER_TILE = 2**18  # of one tile, 1 MiB in float32: they stay in cache, and few tiles cost little to set up


@dataclass(frozen=True)
class _Tile:
    """A few consecutive chunks of one sample.

    Attributes:
        chunks: the first chunk and the one after the last.
        query: flat row of the token at each slot of the chunks; slots past the last token repeat some token.
        real: how many of these slots hold a token; they come first.
        halo: flat row of the token at each slot that any of the chunks sees.
        visible: which keys each chunk sees; `None` for all.
    """

    chunks: slice
    query: Int[Tensor, "s"]
    real: int
    halo: Int[Tensor, "h"]
    visible: Bool[Tensor, "t j"] | None


def _tiles(order: Tensor, layout: ClusterLayout) -> Iterator[tuple[int, _Tile]]:
    """Yield (sample, tile) for all samples; rows count through the whole batch."""
    i, a, k = layout.chunk_size, layout.num_adjacent, layout.num_chunks
    device = order.device
    slots = torch.arange(i, device=device)
    step = max(1, _SCORES_PER_TILE // (layout.num_offsets * i * i))
    for start in range(0, k, step):
        stop = min(start + step, k)
        chunk = torch.arange(start - a, stop + a, device=device) % k
        halo = (chunk[:, None] * i + slots).flatten()
        whole = start >= a and stop + a <= k and (stop + a) * i <= layout.num_tokens
        visible = None
        if layout.exact_keys and not whole:
            visible = layout.visible(_windows(halo[:, None], layout)[..., 0])
        halo_rank = layout.rank(halo)
        query_rank = halo_rank[a * i : (a + stop - start) * i]
        real = min(stop * i, layout.num_tokens) - start * i
        for sample in range(len(order)):
            flat = order[sample] + sample * layout.num_tokens
            yield sample, _Tile(slice(start, stop), flat[query_rank], real, flat[halo_rank], visible)


def _windows(halo: Tensor, layout: ClusterLayout) -> Tensor:
    """Return the keys of each chunk (t, j, c) as a view of the halo rows ((t + 2a) * i, c)."""
    i, width = layout.chunk_size, layout.num_offsets * layout.chunk_size
    return halo.unfold(0, width, i).transpose(1, 2)


def _fold(windows: Tensor, layout: ClusterLayout) -> Tensor:
    """Add the rows of overlapping windows (t, j, c) up into halo rows: the transpose of `_windows`."""
    t, _, c = windows.shape
    i = layout.chunk_size
    halo = windows.new_zeros((t + 2 * layout.num_adjacent) * i, c)
    for offset, part in enumerate(windows.split(i, dim=1)):
        halo[offset * i : (offset + t) * i] += part.flatten(0, 1)
    return halo


def _tile_scores(query: Tensor, key: Tensor, tile: _Tile, layout: ClusterLayout, scale: float) -> Tensor:
    queries = query[tile.query].view(-1, layout.chunk_size, query.shape[-1])
    scores = torch.bmm(queries * scale, _windows(key[tile.halo], layout).transpose(1, 2))
    if tile.visible is not None:
        scores.masked_fill_(~tile.visible[:, None, :], float("-inf"))
    return scores


def _tile_weights(query: Tensor, key: Tensor, tile: _Tile, layout: ClusterLayout, scale: float) -> Tensor:
    scores = _tile_scores(query, key, tile, layout, scale)
    return scores.softmax(dim=-1)


def _tile_weights_backward(
    grad_weights: Tensor,
    weights: Tensor,
    query: Tensor,
    key: Tensor,
    tile: _Tile,
    layout: ClusterLayout,
    scale: float,
    grads: tuple[Tensor, Tensor],
) -> None:
    """Add what a tile's weights send back to (query, key) to `grads`."""
    grad_scores = scale * weights * (grad_weights - (grad_weights * weights).sum(dim=-1, keepdim=True))
    _tile_scores_backward(grad_scores, query, key, tile, layout, grads)


def _tile_scores_backward(
    grad_scores: Tensor, query: Tensor, key: Tensor, tile: _Tile, layout: ClusterLayout, grads: tuple[Tensor, Tensor]
) -> None:
    """Add what a tile's scores, divided by their scale, send back to (query, key) to `grads`."""
    grad_query, grad_key = grads
    to_query = torch.bmm(grad_scores, _windows(key[tile.halo], layout)).flatten(0, 1)
    grad_query.index_add_(0, tile.query[: tile.real], to_query[: tile.real])
    queries = query[tile.query].view(-1, layout.chunk_size, query.shape[-1])
    grad_key.index_add_(0, tile.halo, _fold(torch.bmm(grad_scores.transpose(1, 2), queries), layout))


def _tile_chunks(rows: Tensor, tile: _Tile, layout: ClusterLayout) -> Tensor:
    """Return the rows of a tile's real slots (t, i, c); 0 in the slots past the last token."""
    chunks = rows[tile.query]
    chunks[tile.real :] = 0
    return chunks.view(-1, layout.chunk_size, chunks.shape[-1])


def _flat(rows: Tensor) -> Tensor:
    # Contiguous, so that what is made like it has the strides that the fakes promise.
    return rows.reshape(-1, rows.shape[-1]).contiguous()


def _layout(order: Tensor, chunk_size: int, num_adjacent: int, exact_keys: bool) -> ClusterLayout:
    return ClusterLayout.of(ClusterPattern(order, order, chunk_size, num_adjacent, exact_keys))


@torch.library.custom_op("sparse_sr_attn::cluster_weights", mutates_args=())
def weights_op(
    query: Tensor, key: Tensor, order: Tensor, chunk_size: int, num_adjacent: int, exact_keys: bool, scale: float
) -> Tensor:
    """Return `cluster.cluster_weights`, tile by tile."""
    layout = _layout(order, chunk_size, num_adjacent, exact_keys)
    with torch.autocast(query.device.type, enabled=False):
        q, k = (_flat(rows).to(working_precision(rows)) for rows in (query, key))
        shape = (len(order), layout.num_chunks, layout.chunk_size, layout.num_offsets * layout.chunk_size)
        weights = q.new_empty(shape)
        for sample, tile in _tiles(order, layout):
            weights[sample, tile.chunks] = _tile_weights(q, k, tile, layout, scale)
        return weights


@weights_op.register_fake
def _(
    query: Tensor, key: Tensor, order: Tensor, chunk_size: int, num_adjacent: int, exact_keys: bool, scale: float
) -> Tensor:
    layout = _layout(order, chunk_size, num_adjacent, exact_keys)
    shape = (order.shape[0], layout.num_chunks, layout.chunk_size, layout.num_offsets * layout.chunk_size)
    return query.new_empty(shape, dtype=working_precision(query))


@torch.library.custom_op("sparse_sr_attn::cluster_weights_backward", mutates_args=())
def _weights_backward_op(
    grad: Tensor,
    weights: Tensor,
    query: Tensor,
    key: Tensor,
    order: Tensor,
    chunk_size: int,
    num_adjacent: int,
    exact_keys: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    layout = _layout(order, chunk_size, num_adjacent, exact_keys)
    with torch.autocast(query.device.type, enabled=False):
        q, k = (_flat(rows).to(working_precision(rows)) for rows in (query, key))
        grads = (torch.zeros_like(q), torch.zeros_like(k))
        for sample, tile in _tiles(order, layout):
            part = grad[sample, tile.chunks], weights[sample, tile.chunks]
            _tile_weights_backward(*part, q, k, tile, layout, scale, grads)
        return grads[0].view(query.shape).to(query.dtype), grads[1].view(key.shape).to(key.dtype)


@_weights_backward_op.register_fake
def _(grad: Tensor, weights: Tensor, query: Tensor, key: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)


@torch.library.custom_op("sparse_sr_attn::cluster_lse", mutates_args=())
def lse_op(
    query: Tensor, key: Tensor, order: Tensor, chunk_size: int, num_adjacent: int, exact_keys: bool, scale: float
) -> Tensor:
    """Return `cluster.cluster_lse`, tile by tile."""
    layout = _layout(order, chunk_size, num_adjacent, exact_keys)
    with torch.autocast(query.device.type, enabled=False):
        q, k = (_flat(rows).to(working_precision(rows)) for rows in (query, key))
        lse = q.new_empty(len(q))
        for _sample, tile in _tiles(order, layout):
            slots = _tile_scores(q, k, tile, layout, scale).logsumexp(dim=-1).flatten()
            lse.index_copy_(0, tile.query[: tile.real], slots[: tile.real])
        return lse.view(order.shape)


@lse_op.register_fake
def _(query: Tensor, key: Tensor, order: Tensor, *_: object) -> Tensor:
    return query.new_empty(order.shape, dtype=working_precision(query))


@torch.library.custom_op("sparse_sr_attn::cluster_lse_backward", mutates_args=())
def _lse_backward_op(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    order: Tensor,
    chunk_size: int,
    num_adjacent: int,
    exact_keys: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    layout = _layout(order, chunk_size, num_adjacent, exact_keys)
    with torch.autocast(query.device.type, enabled=False):
        q, k = (_flat(rows).to(working_precision(rows)) for rows in (query, key))
        grad_lse = _flat(grad[..., None])
        grads = (torch.zeros_like(q), torch.zeros_like(k))
        for _sample, tile in _tiles(order, layout):
            grad_scores = scale * _tile_chunks(grad_lse, tile, layout) * _tile_weights(q, k, tile, layout, scale)
            _tile_scores_backward(grad_scores, q, k, tile, layout, grads)
        return grads[0].view(query.shape).to(query.dtype), grads[1].view(key.shape).to(key.dtype)


@_lse_backward_op.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)


@torch.library.custom_op("sparse_sr_attn::apply_cluster_weights", mutates_args=())
def apply_op(
    weights: Tensor, value: Tensor, order: Tensor, chunk_size: int, num_adjacent: int, exact_keys: bool
) -> Tensor:
    """Return `cluster.apply_cluster_weights`, tile by tile."""
    layout = _layout(order, chunk_size, num_adjacent, exact_keys)
    with torch.autocast(value.device.type, enabled=False):
        rows = _flat(value)
        out = torch.empty_like(rows)
        for sample, tile in _tiles(order, layout):
            part = weights[sample, tile.chunks].to(rows.dtype)
            chunks = torch.bmm(part, _windows(rows[tile.halo], layout)).flatten(0, 1)
            out.index_copy_(0, tile.query[: tile.real], chunks[: tile.real])
        return out.view(value.shape)


@apply_op.register_fake
def _(weights: Tensor, value: Tensor, *_: object) -> Tensor:
    return value.new_empty(value.shape)


@torch.library.custom_op("sparse_sr_attn::apply_cluster_weights_backward", mutates_args=())
def _apply_backward_op(
    grad: Tensor,
    weights: Tensor,
    value: Tensor,
    order: Tensor,
    chunk_size: int,
    num_adjacent: int,
    exact_keys: bool,
) -> tuple[Tensor, Tensor]:
    layout = _layout(order, chunk_size, num_adjacent, exact_keys)
    with torch.autocast(value.device.type, enabled=False):
        rows, grad_rows = _flat(value), _flat(grad)
        grad_weights = weights.new_empty(weights.shape)
        grad_value = torch.zeros_like(rows, dtype=working_precision(rows))
        for sample, tile in _tiles(order, layout):
            out = _tile_chunks(grad_rows, tile, layout)
            grad_weights[sample, tile.chunks] = torch.bmm(out, _windows(rows[tile.halo], layout).transpose(1, 2))
            part = weights[sample, tile.chunks].to(rows.dtype)
            to_value = torch.bmm(part.transpose(1, 2), out).to(grad_value.dtype)
            grad_value.index_add_(0, tile.halo, _fold(to_value, layout))
        return grad_weights, grad_value.view(value.shape).to(value.dtype)


@_apply_backward_op.register_fake
def _(grad: Tensor, weights: Tensor, value: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return weights.new_empty(weights.shape), value.new_empty(value.shape)


@torch.library.custom_op("sparse_sr_attn::cluster_attention", mutates_args=())
def attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    order: Tensor,
    chunk_size: int,
    num_adjacent: int,
    exact_keys: bool,
    scale: float,
) -> Tensor:
    """Return `cluster.cluster_attention`, tile by tile; only a tile of weights exists at a time."""
    layout = _layout(order, chunk_size, num_adjacent, exact_keys)
    with torch.autocast(query.device.type, enabled=False):
        q, k = (_flat(rows).to(working_precision(rows)) for rows in (query, key))
        v = _flat(value)
        out = torch.empty_like(v)
        for _sample, tile in _tiles(order, layout):
            weights = _tile_weights(q, k, tile, layout, scale).to(v.dtype)
            chunks = torch.bmm(weights, _windows(v[tile.halo], layout)).flatten(0, 1)
            out.index_copy_(0, tile.query[: tile.real], chunks[: tile.real])
        return out.view(value.shape)


@attention_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    return value.new_empty(value.shape)


@torch.library.custom_op("sparse_sr_attn::cluster_attention_backward", mutates_args=())
def _attention_backward_op(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    order: Tensor,
    chunk_size: int,
    num_adjacent: int,
    exact_keys: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    layout = _layout(order, chunk_size, num_adjacent, exact_keys)
    with torch.autocast(query.device.type, enabled=False):
        q, k = (_flat(rows).to(working_precision(rows)) for rows in (query, key))
        v, grad_rows = _flat(value), _flat(grad)
        grads = (torch.zeros_like(q), torch.zeros_like(k))
        grad_value = torch.zeros_like(v, dtype=working_precision(v))
        for _sample, tile in _tiles(order, layout):
            weights = _tile_weights(q, k, tile, layout, scale)
            out = _tile_chunks(grad_rows, tile, layout)
            grad_weights = torch.bmm(out, _windows(v[tile.halo], layout).transpose(1, 2)).to(weights.dtype)
            _tile_weights_backward(grad_weights, weights, q, k, tile, layout, scale, grads)
            to_value = torch.bmm(weights.to(v.dtype).transpose(1, 2), out).to(grad_value.dtype)
            grad_value.index_add_(0, tile.halo, _fold(to_value, layout))
        grad_query, grad_key = (g.view(query.shape).to(query.dtype) for g in grads)
        return grad_query, grad_key, grad_value.view(value.shape).to(value.dtype)


@_attention_backward_op.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


# --- their gradients --------------------------------------------------------------------------------------------------


def _weights_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, order, *ctx.options = inputs
    ctx.save_for_backward(output, query, key, order)


def _weights_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weights, query, key, order = ctx.saved_tensors
    grad_query, grad_key = _weights_backward_op(grad, weights, query, key, order, *ctx.options)
    return grad_query, grad_key, None, None, None, None, None


def _lse_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, order, *ctx.options = inputs
    ctx.save_for_backward(query, key, order)


def _lse_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_lse_backward_op(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None, None)


def _apply_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weights, value, order, *ctx.options = inputs
    ctx.save_for_backward(weights, value, order)


def _apply_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weights, value, order = ctx.saved_tensors
    grad_weights, grad_value = _apply_backward_op(grad, weights, value, order, *ctx.options)
    return grad_weights, grad_value, None, None, None, None


def _attention_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, order, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, order)


def _attention_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = _attention_backward_op(grad, *ctx.saved_tensors, *ctx.options)
    return (*grads, None, None, None, None, None)


weights_op.register_autograd(_weights_backward, setup_context=_weights_context)
lse_op.register_autograd(_lse_backward, setup_context=_lse_context)
apply_op.register_autograd(_apply_backward, setup_context=_apply_context)
attention_op.register_autograd(_attention_backward, setup_context=_attention_context)
