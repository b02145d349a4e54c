"""Window attention as custom operators that are opaque to compilers, because a trace would depend on the map's size.

On the CPU, scores are computed a few windows at a time, so that they stay in cache; only `weights_op` keeps them. The
backward of `attention_op` recomputes them, and all backwards cut the maps again instead of keeping their windows.
Output maps are in channels-last memory format.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_sr_attn.functional._operators import operator
from sparse_sr_attn.functional._torch import (
    kept_on_device,
    may_keep,
    multiply,
    product_precision,
    without_autocast,
    working_precision,
)
from sparse_sr_attn.functional.channels_last import new_map
from sparse_sr_attn.functional.window.grid import WindowGrid

_SCORES_PER_TILE = 2**18  # on the CPU, 1 MiB in float32: they stay in cache, and few tiles cost little to set up
_LARGEST_KEPT = 2**18  # pixels of a map whose indices are kept on a device
_SCORES_PER_LAUNCH = 2**27  # elsewhere, 512 MiB: a GPU waits for each launch, and fills itself with large ones only


_Indices = tuple[Int[Tensor, "ki"], Int[Tensor, "n"], Bool[Tensor, "ki 1"] | None]


class _Windows:
    """Cuts maps of one size into windows `(b * k, i, c)` and joins them again.

    Args:
        like: a map of this size.
        window_size: side of a window.
    """

    def __init__(self, like: Float[Tensor, "b _ h w"], window_size: int) -> None:
        self.grid = WindowGrid(like.shape[2], like.shape[3], window_size)
        self.batch = like.shape[0]
        self.padded = self.grid.rows * window_size, self.grid.columns * window_size

    def cut(
        self, x: Float[Tensor, "b c h w"], shift: int, dtype: torch.dtype, *, wide: bool = False
    ) -> Float[Tensor, "bk i c"]:
        """Return the windows of a map; padding is zero. With `wide`, zero columns make products with them faster."""
        x = x.permute(0, 2, 3, 1)
        if _by_index(x) and (shift or not self.grid.is_whole):
            pixels, _, padding = _indices_on(self.grid, shift, x.device)
            chosen = x.flatten(1, 2).to(dtype).index_select(1, pixels)
            if padding is not None:
                chosen.masked_fill_(padding, 0)
            return chosen.view(-1, self.grid.window_size**2, x.shape[-1])
        if shift or not self.grid.is_whole:
            rolled = x.new_zeros(self.batch, *self.padded, x.shape[-1])
            for here, there in self._blocks(shift):
                rolled[there] = x[here]
            x = rolled
        size = self.grid.window_size
        windows: Tensor = x.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3)
        channels = x.shape[-1]
        width = _wide(channels, dtype, x.device) if wide else channels
        cut = x.new_empty(*windows.shape[:-1], width, dtype=dtype)
        cut[..., :channels].copy_(windows)
        if width > channels:
            cut[..., channels:].zero_()
        return cut.view(self.batch * self.grid.rows * self.grid.columns, size**2, width)

    def join(self, windows: Float[Tensor, "bk i w"], shift: int, out: Float[Tensor, "b c h w"]) -> None:
        """Write windows to a map, or to some channels of one, in channels-last memory format; undoes `cut`."""
        size, grid, channels, x = self.grid.window_size, self.grid, out.shape[1], out.permute(0, 2, 3, 1)
        if _by_index(out) and (shift or not grid.is_whole):
            _, slots, _ = _indices_on(grid, shift, out.device)
            rows = windows.view(self.batch, -1, windows.shape[-1])[..., :channels].index_select(1, slots)
            x.copy_(rows.view(x.shape))
            return
        whole = shift == 0 and grid.is_whole
        rolled = x if whole else out.new_empty(self.batch, *self.padded, channels)
        rolled.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3).copy_(
            windows.view(self.batch, grid.rows, grid.columns, size, size, windows.shape[-1])[..., :channels]
        )
        if not whole:
            for here, there in self._blocks(shift):
                x[here] = rolled[there]

    def _blocks(self, shift: int) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
        """Yield the position of each of four blocks in the map, and in the padded and rolled map."""
        rows, columns = (
            _pieces(side, padded, shift)
            for side, padded in zip((self.grid.height, self.grid.width), self.padded, strict=True)
        )
        for row, rolled_row in rows:
            for column, rolled_column in columns:
                yield (slice(None), row, column), (slice(None), rolled_row, rolled_column)

    def is_real(self, shift: int, device: torch.device) -> Bool[Tensor, "bk 1 i"] | None:
        """Return a mask of the slots that hold a pixel; `None` if all do."""
        if self.grid.is_whole:
            return None
        return self.grid.is_real(shift, device).repeat(self.batch, 1)[:, None]


def _by_index(x: Tensor) -> bool:
    """Return whether maps are cut and joined by an index, in few kernels, rather than block by block, in cache."""
    return not x.is_cpu


def _indices_on(grid: WindowGrid, shift: int, device: torch.device) -> _Indices:
    """Return the pixel in each slot, the slot of each pixel, and a mask of padded slots (`None` without padding).

    For maps of moderate size they are kept, because a GPU would wait for the kernels that compute them.
    """
    keeps = may_keep(device) and grid.height * grid.width <= _LARGEST_KEPT
    pixels, slots, padding = (_kept_indices if keeps else _indices)(grid, shift, device)
    return pixels, slots, padding


def _indices(grid: WindowGrid, shift: int, device: torch.device) -> _Indices:
    pixels, num_pixels = grid.pixels(shift, device), grid.height * grid.width
    padding = None if grid.is_whole else (pixels == num_pixels)[:, None]
    return pixels.clamp(max=num_pixels - 1).int(), grid.slots(shift, device).int(), padding


_kept_indices = kept_on_device(_indices)


def _wide(channels: int, dtype: torch.dtype, device: torch.device) -> int:
    """Return the width for the second factor of products: for multiples of 4 numbers MKL is up to a third faster."""
    return channels if device.type != "cpu" or dtype == torch.bfloat16 else -(-channels // 4) * 4


def _pieces(side: int, padded: int, shift: int) -> list[tuple[slice, slice]]:
    """Return the positions of the two pieces of a side, before and after padding and rolling."""
    shift %= padded
    front = min(shift, side)  # what goes around to the end
    return [
        (slice(front, side), slice(0, side - front)),
        (slice(0, front), slice(padded - shift, padded - shift + front)),
    ]


def _windows_per_tile(windows: Tensor) -> int:
    scores = _SCORES_PER_TILE if windows.device.type == "cpu" else _SCORES_PER_LAUNCH
    return max(1, scores // windows.shape[1] ** 2)


def _tiles(windows: Tensor) -> Iterator[slice]:
    """Yield the slices of windows to process together."""
    step = _windows_per_tile(windows)
    for start in range(0, len(windows), step):
        yield slice(start, min(start + step, len(windows)))


def _space_for_scores(windows: Float[Tensor, "bk i c"]) -> Float[Tensor, "t i i"]:
    """Return an uninitialized tensor for the scores of a tile; made once, because the system clears new memory."""
    size = windows.shape[1]
    return windows.new_empty(min(_windows_per_tile(windows), len(windows)), size, size)


def _weights_of(
    queries: Tensor, keys: Tensor, real: Tensor | None, tile: slice, scale: float, space: Tensor
) -> Float[Tensor, "t i i"]:
    """Return the softmax weights of a tile, in `space`."""
    scores = torch.bmm(queries[tile], keys[tile].transpose(1, 2), out=space[: tile.stop - tile.start])
    if scale != 1:
        scores *= scale
    if real is not None:
        scores.masked_fill_(~real[tile], torch.finfo(scores.dtype).min)
    return torch.softmax(scores, dim=-1, out=scores)


def _scores_backward(
    grad_weights: Tensor, weights: Tensor, queries: Tensor, keys: Tensor | None, scale: float
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of queries and keys from those of a tile's weights; `None` if the queries are the keys."""
    grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
    if scale != 1:
        grad_scores *= scale
    if keys is None:
        return torch.bmm(grad_scores + grad_scores.transpose(1, 2), queries), None
    return torch.bmm(grad_scores, keys), torch.bmm(grad_scores.transpose(1, 2), queries)


def _cut_both(
    windows: _Windows, query: Tensor, key: Tensor | None, shift: int
) -> tuple[Float[Tensor, "bk i d"], Float[Tensor, "bk i d"]]:
    """Return the windows of queries and keys in working precision; without `key`, those of the queries twice."""
    queries = windows.cut(query, shift, working_precision(query))
    return queries, queries if key is None else windows.cut(key, shift, queries.dtype)


def _new_maps(query: Tensor, key: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return uninitialized maps for the gradients of queries and keys; without `key`, an empty tensor for it."""
    return new_map(query, query.shape[1]), query.new_empty(0) if key is None else new_map(key, key.shape[1])


def _join_both(windows: _Windows, grads: tuple[Tensor, Tensor | None], shift: int, maps: Sequence[Tensor]) -> None:
    for grad, out in zip(grads, maps, strict=True):
        if grad is not None:
            windows.join(grad, shift, out)


def _in_groups(
    queries: Sequence[Tensor | None], values: Sequence[Tensor], groups: Sequence[Sequence[int]]
) -> Iterator[Any]:
    """Yield the channels of each map that belong to a group, and the size and shifts of its windows."""
    *sizes_and_shifts, query_widths, value_widths = groups
    count = len(query_widths)
    of_queries = [(None,) * count if x is None else x.split(query_widths, dim=1) for x in queries]
    return zip(*of_queries, *(x.split(value_widths, dim=1) for x in values), *sizes_and_shifts, strict=False)


@operator("window_weights")
def weights_op(
    query: Tensor,
    key: Tensor | None,
    window_size: int,
    shift: int,
    scale: float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return `window_weights`, tile by tile."""
    windows = _Windows(query, window_size)
    with without_autocast(query):
        queries, keys = _cut_both(windows, query, key, shift)
        real = windows.is_real(shift, query.device)
        weights = queries.new_empty(*queries.shape[:2], queries.shape[1], dtype=dtype)
        space = None if weights.dtype == queries.dtype else _space_for_scores(queries)
        for tile in _tiles(queries):
            found = _weights_of(queries, keys, real, tile, scale, weights[tile] if space is None else space)
            if space is not None:
                weights[tile] = found
    return weights.view(query.shape[0], windows.grid.rows * windows.grid.columns, *weights.shape[1:])


@weights_op.register_fake
def _(
    query: Tensor,
    key: Tensor | None,
    window_size: int,
    shift: int,
    scale: float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    grid = WindowGrid(query.shape[2], query.shape[3], window_size)
    shape = (query.shape[0], grid.num_windows, window_size**2, window_size**2)
    return query.new_empty(shape, dtype=dtype or working_precision(query))


@operator("window_weights_backward")
def _weights_backward(
    grad: Tensor, weights: Tensor, query: Tensor, key: Tensor | None, shift: int, scale: float
) -> tuple[Tensor, Tensor]:
    windows = _Windows(query, math.isqrt(weights.shape[-1]))
    with without_autocast(query):
        queries, keys = _cut_both(windows, query, key, shift)
        grads = queries.new_empty(queries.shape), None if key is None else keys.new_empty(keys.shape)
        grad, weights = grad.flatten(0, 1), weights.flatten(0, 1)
        for tile in _tiles(queries):
            tile_keys = None if key is None else keys[tile]
            sent, part = grad[tile].to(queries.dtype), weights[tile].to(queries.dtype)
            back = _scores_backward(sent, part, queries[tile], tile_keys, scale)
            _put(grads, tile, back)
        maps = _new_maps(query, key)
        _join_both(windows, grads, shift, maps)
    return maps


@_weights_backward.register_fake
def _(
    grad: Tensor, weights: Tensor, query: Tensor, key: Tensor | None, shift: int, scale: float
) -> tuple[Tensor, Tensor]:
    return _new_maps(query, key)


def _put(grads: tuple[Tensor, Tensor | None], tile: slice, back: tuple[Tensor, Tensor | None]) -> None:
    for whole, part in zip(grads, back, strict=True):
        if whole is not None and part is not None:
            whole[tile] = part


def _keep_weights(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, _, ctx.shift, ctx.scale, *_ = inputs
    ctx.save_for_backward(output, query, key)


def _backward_weights(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weights, query, key = ctx.saved_tensors
    grad_query, grad_key = _weights_backward(grad, weights, query, key, ctx.shift, ctx.scale)
    return grad_query, None if key is None else grad_key, None, None, None, None


weights_op.register_autograd(_backward_weights, setup_context=_keep_weights)


@operator("apply_window_weights")
def apply_op(weights: Tensor, value: Tensor, window_size: int, shift: int, unshift: int) -> Tensor:
    """Return `apply_window_weights`, tile by tile."""
    windows = _Windows(value, window_size)
    with without_autocast(value):
        dtype = product_precision(value.dtype, value.device)
        values, weights = windows.cut(value, shift, dtype, wide=True), weights.flatten(0, 1)
        gathered = torch.empty_like(values)
        for tile in _tiles(values):
            torch.bmm(weights[tile].to(value.dtype).to(dtype), values[tile], out=gathered[tile])
        out = new_map(value, value.shape[1])
        windows.join(gathered, unshift, out)
    return out


@apply_op.register_fake
def _(weights: Tensor, value: Tensor, window_size: int, shift: int, unshift: int) -> Tensor:
    return new_map(value, value.shape[1])


@operator("apply_window_weights_backward")
def _apply_backward(grad: Tensor, weights: Tensor, value: Tensor, shift: int, unshift: int) -> tuple[Tensor, Tensor]:
    windows = _Windows(value, math.isqrt(weights.shape[-1]))
    with without_autocast(value):
        dtype = product_precision(value.dtype, value.device)
        values, grads = windows.cut(value, shift, dtype), windows.cut(grad, unshift, dtype, wide=True)
        grad_values, grad_weights = torch.empty_like(grads), weights.new_empty(weights.shape)
        flat, grad_flat, channels = weights.flatten(0, 1), grad_weights.flatten(0, 1), value.shape[1]
        for tile in _tiles(values):
            multiply(grads[tile, :, :channels], values[tile].transpose(1, 2), out=grad_flat[tile])
            torch.bmm(flat[tile].to(dtype).transpose(1, 2), grads[tile], out=grad_values[tile])
        grad_value = new_map(value, channels)
        windows.join(grad_values, shift, grad_value)
    return grad_weights, grad_value


@_apply_backward.register_fake
def _(grad: Tensor, weights: Tensor, value: Tensor, shift: int, unshift: int) -> tuple[Tensor, Tensor]:
    return weights.new_empty(weights.shape), new_map(value, value.shape[1])


def _keep_values(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weights, value, _, ctx.shift, ctx.unshift = inputs
    ctx.save_for_backward(weights, value)


def _backward_apply(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_apply_backward(grad, *ctx.saved_tensors, ctx.shift, ctx.unshift), None, None, None)


apply_op.register_autograd(_backward_apply, setup_context=_keep_values)


@operator("window_attention")
def attention_op(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    window_sizes: list[int],
    shifts: list[int],
    unshifts: list[int],
    query_widths: list[int],
    value_widths: list[int],
    scale: float,
) -> Tensor:
    """Return `window_attention`, in groups of channels if there are several window sizes."""
    out, groups = new_map(value, value.shape[1]), (window_sizes, shifts, unshifts, query_widths, value_widths)
    with without_autocast(value):
        for group in _in_groups((query, key), (value, out), groups):
            _attend(scale, *group)
    return out


def _attend(
    scale: float,
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    out: Tensor,
    window_size: int,
    shift: int,
    unshift: int,
) -> None:
    """Write the attention of one group, with one tile of weights in memory at a time."""
    windows, dtype = _Windows(value, window_size), product_precision(value.dtype, value.device)
    queries, keys = _cut_both(windows, query, key, shift)
    values, real = windows.cut(value, shift, dtype, wide=True), windows.is_real(shift, value.device)
    gathered, space = torch.empty_like(values), _space_for_scores(queries)
    for tile in _tiles(values):
        weights = _weights_of(queries, keys, real, tile, scale, space)
        torch.bmm(weights.to(dtype), values[tile], out=gathered[tile])
    windows.join(gathered, unshift, out)


@attention_op.register_fake
def _(query: Tensor, key: Tensor | None, value: Tensor, *_: object) -> Tensor:
    return new_map(value, value.shape[1])


@operator("window_attention_backward")
def _attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    window_sizes: list[int],
    shifts: list[int],
    unshifts: list[int],
    query_widths: list[int],
    value_widths: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    (grad_query, grad_key), grad_value = _new_maps(query, key), new_map(value, value.shape[1])
    if len(value_widths) < len(query_widths):
        grad_query.zero_()  # of groups without values
    queries, values = (query, key, grad_query, None if key is None else grad_key), (value, grad, grad_value)
    with without_autocast(value):
        for group in _in_groups(queries, values, (window_sizes, shifts, unshifts, query_widths, value_widths)):
            _attend_backward(scale, *group)
    return grad_query, grad_key, grad_value


def _attend_backward(
    scale: float,
    query: Tensor,
    key: Tensor | None,
    grad_query: Tensor,
    grad_key: Tensor,
    value: Tensor,
    grad: Tensor,
    grad_value: Tensor,
    window_size: int,
    shift: int,
    unshift: int,
) -> None:
    """Write the gradients of one group."""
    windows, dtype = _Windows(value, window_size), product_precision(value.dtype, value.device)
    queries, keys = _cut_both(windows, query, key, shift)
    values, real = windows.cut(value, shift, dtype), windows.is_real(shift, value.device)
    grads, channels = windows.cut(grad, unshift, dtype, wide=True), value.shape[1]
    grad_values, space = torch.empty_like(grads), _space_for_scores(queries)
    sent = queries.new_empty(queries.shape), None if key is None else keys.new_empty(keys.shape)
    for tile in _tiles(values):
        weights = _weights_of(queries, keys, real, tile, scale, space)
        torch.bmm(weights.to(dtype).transpose(1, 2), grads[tile], out=grad_values[tile])
        grad_weights = torch.bmm(grads[tile, :, :channels], values[tile].transpose(1, 2)).to(weights.dtype)
        tile_keys = None if key is None else keys[tile]
        _put(sent, tile, _scores_backward(grad_weights, weights, queries[tile], tile_keys, scale))
    _join_both(windows, sent, shift, (grad_query, grad_key))
    windows.join(grad_values, shift, grad_value)


@_attention_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor | None, value: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return (*_new_maps(query, key), new_map(value, value.shape[1]))


def _keep_maps(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, *ctx.options = inputs
    ctx.save_for_backward(query, key, value)


def _backward_attention(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value = ctx.saved_tensors
    grad_query, grad_key, grad_value = _attention_backward(grad, query, key, value, *ctx.options)
    return grad_query, None if key is None else grad_key, grad_value, *(None,) * 6


attention_op.register_autograd(_backward_attention, setup_context=_keep_maps)
