"""Cluster attention by tiles of a few chunks, as custom operators that are opaque to compilers and autograd.

Scores of a tile stay in cache, and no operator holds more than one tile of them, except for weights that it returns.
The backward of `attention` recomputes the weights. Results are collected in sorted order and moved to image order at
the end, because gathering rows is several times faster than scattering them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparse_sr_attn.functional._operators import operator
from sparse_sr_attn.functional._torch import (
    lower_precision,
    multiply,
    product_precision,
    without_autocast,
    working_precision,
)
from sparse_sr_attn.functional.cluster.layout import ClusterLayout
from sparse_sr_attn.functional.l2_normalize import l2_normalize, l2_normalize_backward

_SCORES_PER_TILE = 2**18  # of one tile, 1 MiB in float32: they stay in cache, and few tiles cost little to set up
_WEIGHTS_PER_TILE = 2**21  # where weights are only read, once: what counts is that few rows of values are read twice


@dataclass(frozen=True)
class _Tile:
    """A few consecutive chunks.

    Attributes:
        start: the first chunk.
        stop: the last chunk + 1.
        hidden: keys that do not count, as (chunk in the tile, keys).
    """

    start: int
    stop: int
    hidden: list[tuple[int, slice]]

    @property
    def chunks(self) -> slice:
        """The chunks of the tile as a slice."""
        return slice(self.start, self.stop)


class _Sorted:
    """The tokens of one sample in sorted order: its tiles, and rows in and out of them.

    A tile reads its *halo*, the slots that any of its chunks sees. The halo of the whole sample holds all chunks in
    order, extended at each end by the chunks from the other end that are seen there.
    """

    def __init__(self, order: Int[Tensor, "n"], layout: ClusterLayout, reach: int | None = None) -> None:
        self.layout = layout
        self.reach = layout.num_adjacent if reach is None else reach  # chunks beyond each end
        self.margin = self.reach * layout.chunk_size
        slot = torch.arange(-self.margin, layout.num_slots + self.margin, device=order.device) % layout.num_slots
        self._token = order[layout.rank(slot)]
        self._slot = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))

    def tiles(self, scores: int | None = None) -> Iterator[_Tile]:
        """Yield all tiles, of about `scores` scores each."""
        layout = self.layout
        step = max(1, (scores or _SCORES_PER_TILE) // (layout.num_offsets * layout.chunk_size**2))
        for start in range(0, layout.num_chunks, step):
            stop = min(start + step, layout.num_chunks)
            hidden = [(t - start, keys) for t in range(start, stop) for keys in layout.hidden(self.seen(t))]
            yield _Tile(start, stop, hidden)

    def seen(self, chunk: int) -> list[int]:
        """Return the chunks that a chunk sees."""
        return self.layout.ring(chunk)

    def chunks(self, rows: Float[Tensor, "n c"], tile: _Tile) -> Float[Tensor, "t i c"]:
        """Return the rows of a tile's chunks; slots past the last token repeat a token."""
        first, last = (chunk * self.layout.chunk_size + self.margin for chunk in (tile.start, tile.stop))
        return self._chunks(rows.index_select(0, self._token[first:last]))

    def real_chunks(self, rows: Float[Tensor, "n c"], tile: _Tile) -> Float[Tensor, "t i c"]:
        """Return the rows of a tile's chunks; 0 in slots past the last token."""
        chunks, size = self.chunks(rows, tile), self.layout.chunk_size
        if tile.stop * size > self.layout.num_tokens:
            chunks.flatten(0, 1)[self.layout.num_tokens - tile.start * size :] = 0
        return chunks

    def windows(self, rows: Float[Tensor, "n c"], tile: _Tile) -> Float[Tensor, "t j c"]:
        """Return the rows that each chunk of a tile sees: overlapping views of its halo."""
        return self._windows(rows.index_select(0, self._token[self._halo_of(tile)]))

    def sort(self, rows: Float[Tensor, "n c"]) -> Float[Tensor, "h c"]:
        """Return the rows at all positions of the halo, from which tiles read views."""
        return rows.index_select(0, self._token)

    def sorted_windows(self, halo: Float[Tensor, "h c"], tile: _Tile) -> Float[Tensor, "t j c"]:
        """Return `windows` of rows that are sorted already."""
        return self._windows(halo[self._halo_of(tile)])

    def slots(self, rows: Tensor) -> Float[Tensor, "s c"]:
        """Return an uninitialized tensor with a row for each slot, like `rows`."""
        return rows.new_empty(self.layout.num_slots, rows.shape[-1])

    def at(self, slots: Float[Tensor, "s c"], tile: _Tile) -> Float[Tensor, "t i c"]:
        """Return a tile's chunks as a view of `slots`."""
        i = self.layout.chunk_size
        return self._chunks(slots[tile.start * i : tile.stop * i])

    def to_tokens(self, slots: Float[Tensor, "s c"], out: Float[Tensor, "n c"]) -> None:
        """Write the row at the slot of each token to `out`."""
        if slots.dtype == out.dtype:
            torch.index_select(slots, 0, self._slot, out=out)
        else:
            out.copy_(slots.index_select(0, self._slot))

    def halo(self, rows: Tensor) -> Float[Tensor, "h c"]:
        """Return zeros with a row for each position of the halo, as wide as `rows`, in working precision."""
        size = self.layout.num_slots + 2 * self.margin, rows.shape[-1]
        return rows.new_zeros(size, dtype=working_precision(rows))

    def send_back(
        self, weights: Float[Tensor, "t i j"], rows: Float[Tensor, "t i c"], halo: Float[Tensor, "h c"], tile: _Tile
    ) -> None:
        """Add the weighted rows of each chunk to the sums of the slots that it sees."""
        i = self.layout.chunk_size
        places = [(tile.start + offset) * i for offset in range(self.layout.num_offsets)]
        sums = [self._chunks(halo[first : first + (tile.stop - tile.start) * i]) for first in places]
        if rows.dtype == halo.dtype:
            for each, part in zip(sums, weights.split(i, dim=2), strict=True):
                each.baddbmm_(part.transpose(1, 2), rows)
        else:
            parts = torch.bmm(weights.transpose(1, 2), rows).to(halo.dtype)  # at once, because parts are strided
            for each, part in zip(sums, parts.split(i, dim=1), strict=True):
                each.add_(part)

    def halo_to_tokens(self, halo: Float[Tensor, "h c"], out: Float[Tensor, "n c"]) -> None:
        """Write the sum over all positions of each token to `out`."""
        layout, i = self.layout, self.layout.chunk_size
        slots = halo[self.margin : self.margin + layout.num_slots]
        for chunk in [
            *range(-self.reach, 0),
            *range(layout.num_chunks, layout.num_chunks + self.reach),
        ]:
            home, place = chunk % layout.num_chunks * i, chunk * i + self.margin
            slots[home : home + i] += halo[place : place + i]
        self.to_tokens(slots, out)
        if not layout.count_keys_once:  # slots past the last token are seen, and stand for a token
            first, last = self.margin + layout.num_tokens, self.margin + layout.num_slots
            out.index_add_(0, self._token[first:last], slots[layout.num_tokens :].to(out.dtype))

    def _halo_of(self, tile: _Tile) -> slice:
        size = self.layout.chunk_size
        return slice(tile.start * size, tile.stop * size + 2 * self.margin)

    def _windows(self, halo: Tensor) -> Tensor:
        size = self.layout.chunk_size
        return halo.unfold(0, self.layout.num_offsets * size, size).transpose(1, 2)

    def _chunks(self, slots: Tensor) -> Tensor:
        return slots.view(-1, self.layout.chunk_size, slots.shape[-1])


class _Nearest(_Sorted):
    """Like `_Sorted`, with a table of the chunks that each chunk sees. The halo is the chunks themselves."""

    def __init__(self, order: Int[Tensor, "n"], layout: ClusterLayout, neighbors: Int[Tensor, "k m"]) -> None:
        super().__init__(order, layout, reach=0)
        self._neighbors, self._lists = neighbors, neighbors.tolist()

    def seen(self, chunk: int) -> list[int]:
        """Return the chunks that a chunk sees."""
        return self._lists[chunk]

    def windows(self, rows: Float[Tensor, "n c"], tile: _Tile) -> Float[Tensor, "t j c"]:
        """Return the rows that each chunk of a tile sees."""
        token = self._seen(self._token, tile).flatten()
        return rows.index_select(0, token).view(tile.stop - tile.start, -1, rows.shape[-1])

    def sorted_windows(self, halo: Float[Tensor, "h c"], tile: _Tile) -> Float[Tensor, "t j c"]:
        """Return `windows` of rows that are sorted already."""
        return self._seen(halo, tile).view(tile.stop - tile.start, -1, halo.shape[-1])

    def _seen(self, slots: Tensor, tile: _Tile) -> Tensor:
        """Return the chunks that those of a tile see, each as one row."""
        return slots.view(self.layout.num_chunks, -1).index_select(0, self._neighbors[tile.chunks].flatten())

    def send_back(
        self, weights: Float[Tensor, "t i j"], rows: Float[Tensor, "t i c"], halo: Float[Tensor, "h c"], tile: _Tile
    ) -> None:
        """Add the weighted rows of each chunk to the sums of the slots that it sees."""
        parts = torch.bmm(weights.transpose(1, 2), rows)
        chunk_length = self.layout.chunk_size * rows.shape[-1]
        halo.view(-1, chunk_length).index_add_(
            0, self._neighbors[tile.chunks].flatten(), parts.view(-1, chunk_length).to(halo.dtype)
        )


class _Scored:
    """Queries and keys of one sample, and the scores of its tiles, in working precision.

    Keys are sorted once, because tiles overlap; sorted queries would only take memory.
    """

    def __init__(
        self, tokens: _Sorted, query: Float[Tensor, "n d"], key: Float[Tensor, "n d"], scale: float, unit: bool
    ) -> None:
        self.tokens = tokens
        self.query, self.key = (rows.to(working_precision(rows)).contiguous() for rows in (query, key))
        self.scale = scale
        self.unit = unit
        self._keys = tokens.sort(l2_normalize(self.key) if unit else self.key)

    def queries(self, tile: _Tile) -> Float[Tensor, "t i d"]:
        """Return the queries of a tile."""
        return self.tokens.chunks(self.query, tile)

    def keys(self, tile: _Tile) -> Float[Tensor, "t j d"]:
        """Return the keys that each chunk of a tile sees."""
        return self.tokens.sorted_windows(self._keys, tile)

    def scores(self, tile: _Tile, out: Tensor | None = None) -> Float[Tensor, "t i j"]:
        """Return the scores of a tile."""
        queries = self.queries(tile)
        queries = queries if self.scale == 1 else self.scale * queries
        scores = torch.bmm(queries, self.keys(tile).transpose(1, 2), out=out)
        for chunk, hidden in tile.hidden:
            scores[chunk, :, hidden] = float("-inf")
        return scores

    def weights(
        self, tile: _Tile, out: Tensor | None = None, lse: Float[Tensor, "t i 1"] | None = None
    ) -> Float[Tensor, "t i j"]:
        """Return the softmax of the scores of a tile; write their logsumexp to `lse`."""
        scores = self.scores(tile, out)
        if lse is None:
            return torch.softmax(scores, dim=-1, out=scores)
        largest = scores.amax(dim=-1, keepdim=True)
        weights = torch.softmax(scores, dim=-1, out=scores)
        # The largest weight is one over the sum of exp(score - largest): two maxima are cheaper than another sum.
        torch.sub(largest, weights.amax(dim=-1, keepdim=True).log(), out=lse)
        return weights


class _ScoreGrads:
    """The gradients of queries and keys of one sample, collected tile by tile."""

    def __init__(self, scored: _Scored) -> None:
        self.scored = scored
        self._slots, self._halo = scored.tokens.slots(scored.query), scored.tokens.halo(scored.key)

    def add(self, grad_scores: Float[Tensor, "t i j"], tile: _Tile) -> None:
        """Add the gradients from the scores of a tile; overwrites `grad_scores`."""
        scored, tokens = self.scored, self.scored.tokens
        if scored.scale != 1:
            grad_scores.mul_(scored.scale)
        torch.bmm(grad_scores, scored.keys(tile), out=tokens.at(self._slots, tile))
        tokens.send_back(grad_scores, scored.queries(tile), self._halo, tile)

    def add_of_weights(
        self,
        grad_weights: Float[Tensor, "t i j"],
        weights: Float[Tensor, "t i j"],
        tile: _Tile,
        grad_lse: Float[Tensor, "t i 1"] | None = None,
    ) -> None:
        """Add the gradients from the weights of a tile and its logsumexp; overwrites `grad_weights`."""
        torch.ops.aten._softmax_backward_data.out(grad_weights, weights, -1, weights.dtype, grad_input=grad_weights)
        if grad_lse is not None:
            grad_weights.addcmul_(weights, grad_lse)
        self.add(grad_weights, tile)

    def write(self, grad_query: Float[Tensor, "n d"], grad_key: Float[Tensor, "n d"]) -> None:
        """Write both, in image order."""
        scored, tokens = self.scored, self.scored.tokens
        tokens.to_tokens(self._slots, grad_query)
        if scored.unit:
            grad_units = torch.empty_like(scored.key)
            tokens.halo_to_tokens(self._halo, grad_units)
            grad_key.copy_(l2_normalize_backward(grad_units, scored.key))
        else:
            tokens.halo_to_tokens(self._halo, grad_key)


@operator("argsort_of_bytes")
def argsort_op(keys: Tensor) -> Tensor:
    """Return `keys.argsort(dim=1, stable=True)` of integers of 8 or 16 bits, on the CPU.

    NumPy sorts them by their digits, 20 times as fast as torch.
    """
    import numpy as np  # noqa: PLC0415

    return torch.from_numpy(np.argsort(keys.numpy(), axis=1, kind="stable"))


@argsort_op.register_fake
def _(keys: Tensor) -> Tensor:
    return keys.new_empty(keys.shape, dtype=torch.int64)


def _samples(order: Tensor, neighbors: Tensor | None, layout: ClusterLayout) -> Iterator[tuple[int, _Sorted]]:
    for sample, each in enumerate(order):
        yield sample, _Sorted(each, layout) if neighbors is None else _Nearest(each, layout, neighbors[sample])


def _space(out: Tensor | None, like: Tensor) -> Tensor:
    """Return `out`, or a new tensor if it is `None`; called late, when the memory of the tiles is free again."""
    return like.new_empty(like.shape) if out is None else out


def _transposed(windows: Float[Tensor, "t j c"]) -> Float[Tensor, "t c j"]:
    """Return windows transposed for a product; oneDNN would copy overlapping ones in their transposed order."""
    return (windows.contiguous() if windows.dtype == torch.bfloat16 else windows).transpose(1, 2)


def _weights_shape(order: Tensor, layout: ClusterLayout) -> tuple[int, ...]:
    return (order.shape[0], layout.num_chunks, layout.chunk_size, layout.num_offsets * layout.chunk_size)


def _new_lse(query: Tensor, order: Tensor, with_lse: bool) -> Tensor:
    return query.new_empty(order.shape if with_lse else (0,), dtype=working_precision(query))


@operator("cluster_weights")
def weights_op(
    query: Tensor,
    key: Tensor,
    order: Tensor,
    neighbors: Tensor | None,
    chunk_size: int,
    num_adjacent: int,
    exact_keys: bool,
    scale: float,
    unit: bool,
    dtype: torch.dtype,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Return `cluster.cluster_weights` and, if `with_lse`, `cluster.cluster_lse`, tile by tile."""
    layout = ClusterLayout.of_order(order, neighbors, chunk_size, num_adjacent, exact_keys)
    weights, lse = query.new_empty(_weights_shape(order, layout), dtype=dtype), _new_lse(query, order, with_lse)
    with without_autocast(query):
        for sample, tokens in _samples(order, neighbors, layout):
            scored = _Scored(tokens, query[sample], key[sample], scale, unit)
            lse_slots = tokens.slots(lse[sample, :, None]) if with_lse else None
            for tile in tokens.tiles():
                out, of_tile = weights[sample, tile.chunks], None if lse_slots is None else tokens.at(lse_slots, tile)
                if dtype == scored.query.dtype:
                    scored.weights(tile, out, of_tile)
                else:
                    out.copy_(scored.weights(tile, lse=of_tile))
            if lse_slots is not None:
                tokens.to_tokens(lse_slots, lse[sample, :, None])
    return weights, lse


@weights_op.register_fake
def _(
    query: Tensor,
    key: Tensor,
    order: Tensor,
    neighbors: Tensor | None,
    chunk_size: int,
    num_adjacent: int,
    exact_keys: bool,
    scale: float,
    unit: bool,
    dtype: torch.dtype,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    layout = ClusterLayout.of_order(order, neighbors, chunk_size, num_adjacent, exact_keys)
    return query.new_empty(_weights_shape(order, layout), dtype=dtype), _new_lse(query, order, with_lse)


@operator("cluster_weights_backward")
def _weights_backward_op(
    grad: Tensor,
    grad_lse: Tensor,
    weights: Tensor,
    query: Tensor,
    key: Tensor,
    order: Tensor,
    neighbors: Tensor | None,
    chunk_size: int,
    num_adjacent: int,
    exact_keys: bool,
    scale: float,
    unit: bool,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    layout = ClusterLayout.of_order(order, neighbors, chunk_size, num_adjacent, exact_keys)
    grad_query, grad_key = query.new_empty(query.shape), key.new_empty(key.shape)
    with without_autocast(query):
        for sample, tokens in _samples(order, neighbors, layout):
            scored = _Scored(tokens, query[sample], key[sample], scale, unit)
            grads = _ScoreGrads(scored)
            for tile in tokens.tiles():
                part, sent = (each[sample, tile.chunks].to(scored.query.dtype) for each in (weights, grad))
                of_lse = tokens.real_chunks(grad_lse[sample, :, None], tile) if with_lse else None
                grads.add_of_weights(sent.clone() if sent.dtype == grad.dtype else sent, part, tile, of_lse)
            grads.write(grad_query[sample], grad_key[sample])
    return grad_query, grad_key


@_weights_backward_op.register_fake
def _(grad: Tensor, grad_lse: Tensor, weights: Tensor, query: Tensor, key: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)


@operator("cluster_lse")
def lse_op(
    query: Tensor,
    key: Tensor,
    order: Tensor,
    neighbors: Tensor | None,
    chunk_size: int,
    num_adjacent: int,
    exact_keys: bool,
    scale: float,
    unit: bool,
) -> Tensor:
    """Return `cluster.cluster_lse`, tile by tile."""
    layout = ClusterLayout.of_order(order, neighbors, chunk_size, num_adjacent, exact_keys)
    lse = query.new_empty(order.shape, dtype=working_precision(query))
    with without_autocast(query):
        for sample, tokens in _samples(order, neighbors, layout):
            scored = _Scored(tokens, query[sample], key[sample], scale, unit)
            slots = tokens.slots(lse[sample, :, None])
            for tile in tokens.tiles():
                tokens.at(slots, tile).copy_(scored.scores(tile).logsumexp(dim=-1, keepdim=True))
            tokens.to_tokens(slots, lse[sample, :, None])
    return lse


@lse_op.register_fake
def _(query: Tensor, key: Tensor, order: Tensor, *_: object) -> Tensor:
    return query.new_empty(order.shape, dtype=working_precision(query))


@operator("cluster_lse_backward")
def _lse_backward_op(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    order: Tensor,
    neighbors: Tensor | None,
    chunk_size: int,
    num_adjacent: int,
    exact_keys: bool,
    scale: float,
    unit: bool,
) -> tuple[Tensor, Tensor]:
    layout = ClusterLayout.of_order(order, neighbors, chunk_size, num_adjacent, exact_keys)
    grad_query, grad_key = query.new_empty(query.shape), key.new_empty(key.shape)
    with without_autocast(query):
        for sample, tokens in _samples(order, neighbors, layout):
            scored = _Scored(tokens, query[sample], key[sample], scale, unit)
            grads = _ScoreGrads(scored)
            for tile in tokens.tiles():
                grads.add(scored.weights(tile).mul_(tokens.real_chunks(grad[sample, :, None], tile)), tile)
            grads.write(grad_query[sample], grad_key[sample])
    return grad_query, grad_key


@_lse_backward_op.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)


@operator("apply_cluster_weights")
def apply_op(
    weights: Tensor,
    value: Tensor,
    order: Tensor,
    neighbors: Tensor | None,
    chunk_size: int,
    num_adjacent: int,
    exact_keys: bool,
) -> Tensor:
    """Return `cluster.apply_cluster_weights`, tile by tile."""
    layout = ClusterLayout.of_order(order, neighbors, chunk_size, num_adjacent, exact_keys)
    out, lower = None, lower_precision(weights, value)
    dtype = product_precision(lower, value.device)
    with without_autocast(value):
        for sample, tokens in _samples(order, neighbors, layout):
            v = value[sample].to(lower).to(dtype).contiguous()
            slots = tokens.slots(v)
            for tile in tokens.tiles(_WEIGHTS_PER_TILE):
                part = weights[sample, tile.chunks].to(lower).to(dtype)
                multiply(part, tokens.windows(v, tile), out=tokens.at(slots, tile))
            out = _space(out, value)
            tokens.to_tokens(slots.to(lower), out[sample])
    return _space(out, value)


@apply_op.register_fake
def _(weights: Tensor, value: Tensor, *_: object) -> Tensor:
    return value.new_empty(value.shape)


@operator("apply_cluster_weights_backward")
def _apply_backward_op(
    grad: Tensor,
    weights: Tensor,
    value: Tensor,
    order: Tensor,
    neighbors: Tensor | None,
    chunk_size: int,
    num_adjacent: int,
    exact_keys: bool,
) -> tuple[Tensor, Tensor]:
    layout = ClusterLayout.of_order(order, neighbors, chunk_size, num_adjacent, exact_keys)
    grad_weights, grad_value = weights.new_empty(weights.shape), value.new_empty(value.shape)
    dtype = product_precision(lower_precision(weights, value), value.device)
    with without_autocast(value):
        for sample, tokens in _samples(order, neighbors, layout):
            v, g = (rows[sample].to(dtype).contiguous() for rows in (value, grad))
            halo = tokens.halo(v)
            for tile in tokens.tiles(_SCORES_PER_TILE * 4 // dtype.itemsize):  # as many bytes, all in `dtype`
                sent = tokens.real_chunks(g, tile)
                multiply(sent, _transposed(tokens.windows(v, tile)), out=grad_weights[sample, tile.chunks])
                tokens.send_back(weights[sample, tile.chunks].to(dtype), sent, halo, tile)
            tokens.halo_to_tokens(halo, grad_value[sample])
    return grad_weights, grad_value


@_apply_backward_op.register_fake
def _(grad: Tensor, weights: Tensor, value: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return weights.new_empty(weights.shape), value.new_empty(value.shape)


@operator("cluster_attention")
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
    unit: bool,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Return `cluster.cluster_attention` and, if `with_lse`, `cluster.cluster_lse`, one tile of weights at a time."""
    layout = ClusterLayout.of_order(order, neighbors, chunk_size, num_adjacent, exact_keys)
    out, lse = None, _new_lse(query, order, with_lse)
    dtype = product_precision(value.dtype, value.device)
    with without_autocast(query):
        for sample, tokens in _samples(order, neighbors, layout):
            scored = _Scored(tokens, query[sample], key[sample], scale, unit)
            v = value[sample].to(dtype).contiguous()
            slots = tokens.slots(v)
            lse_slots = tokens.slots(lse[sample, :, None]) if with_lse else None
            for tile in tokens.tiles():
                of_lse = None if lse_slots is None else tokens.at(lse_slots, tile)
                out_of_tile = tokens.at(slots, tile)
                multiply(scored.weights(tile, lse=of_lse).to(dtype), tokens.windows(v, tile), out=out_of_tile)
            del scored
            out = _space(out, value)
            tokens.to_tokens(slots, out[sample])
            if lse_slots is not None:
                tokens.to_tokens(lse_slots, lse[sample, :, None])
    return _space(out, value), lse


@attention_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, order: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return value.new_empty(value.shape), _new_lse(query, order, options[-1])


@operator("cluster_attention_backward")
def _attention_backward_op(
    grad: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    order: Tensor,
    neighbors: Tensor | None,
    chunk_size: int,
    num_adjacent: int,
    exact_keys: bool,
    scale: float,
    unit: bool,
    with_lse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    layout = ClusterLayout.of_order(order, neighbors, chunk_size, num_adjacent, exact_keys)
    grad_query, grad_key, grad_value = query.new_empty(query.shape), key.new_empty(key.shape), None
    dtype = product_precision(value.dtype, value.device)
    with without_autocast(query):
        for sample, tokens in _samples(order, neighbors, layout):
            scored = _Scored(tokens, query[sample], key[sample], scale, unit)
            v, g = (rows[sample].to(dtype).contiguous() for rows in (value, grad))
            grads, halo = _ScoreGrads(scored), tokens.halo(v)
            for tile in tokens.tiles():
                weights, sent = scored.weights(tile), tokens.real_chunks(g, tile)
                tokens.send_back(weights.to(dtype), sent, halo, tile)
                of_lse = tokens.real_chunks(grad_lse[sample, :, None], tile) if with_lse else None
                # No name for the product: it would keep the memory of a tile while the next one is made.
                grads.add_of_weights(
                    torch.bmm(sent, _transposed(tokens.windows(v, tile))).to(weights.dtype), weights, tile, of_lse
                )
            del g
            grads.write(grad_query[sample], grad_key[sample])
            grad_value = _space(grad_value, value)
            tokens.halo_to_tokens(halo, grad_value[sample])
    return grad_query, grad_key, _space(grad_value, value)


@_attention_backward_op.register_fake
def _(
    grad: Tensor, grad_lse: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


# --- their gradients --------------------------------------------------------------------------------------------------


_NONE = (None,) * 7  # for the order, the neighbours and the options


def _weights_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, order, neighbors, *options, _, with_lse = inputs
    ctx.options = (*options, with_lse)
    ctx.save_for_backward(output[0], query, key, order, neighbors)


def _weights_backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    grad_query, grad_key = _weights_backward_op(grad, grad_lse, *ctx.saved_tensors, *ctx.options)
    return grad_query, grad_key, *_NONE, None, None


def _lse_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, order, neighbors, *ctx.options = inputs
    ctx.save_for_backward(query, key, order, neighbors)


def _lse_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_lse_backward_op(grad, *ctx.saved_tensors, *ctx.options), *_NONE)


def _apply_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weights, value, order, neighbors, *ctx.options = inputs
    ctx.save_for_backward(weights, value, order, neighbors)


def _apply_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_apply_backward_op(grad, *ctx.saved_tensors, *ctx.options), *_NONE[:5])


def _attention_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, order, neighbors, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, order, neighbors)


def _attention_backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    grads = _attention_backward_op(grad, grad_lse, *ctx.saved_tensors, *ctx.options)
    return (*grads, *_NONE, None)


weights_op.register_autograd(_weights_backward, setup_context=_weights_context)
lse_op.register_autograd(_lse_backward, setup_context=_lse_context)
apply_op.register_autograd(_apply_backward, setup_context=_apply_context)
attention_op.register_autograd(_attention_backward, setup_context=_attention_context)
