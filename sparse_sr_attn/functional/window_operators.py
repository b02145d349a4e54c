"""Window attention as operators that compilers see whole: what they would trace depends on the size of the map.

Backwards cut the maps again instead of keeping their windows.
"""

import math
from typing import Any

import torch
from torch import Tensor

from sparse_sr_attn.functional.precision import working_precision
from sparse_sr_attn.functional.window_grid import WindowGrid


def weights(query: Tensor, key: Tensor, grid: WindowGrid, shift: int, scale: float) -> Tensor:
    """Return the softmax weights `(b, k, i, i)` of maps, in float32 at least, as plain differentiable code."""
    precision = working_precision(query)
    queries, keys = grid.cut(query.to(precision), shift), grid.cut(key.to(precision), shift)
    scores = scale * queries @ keys.transpose(-1, -2)
    if not grid.is_whole:
        # The lowest number, not -inf: the spare window of an exported program, all pads, must not become NaN.
        scores = scores.masked_fill(~grid.is_real(shift, query.device)[:, None], torch.finfo(precision).min)
    return scores.softmax(dim=-1)


def apply(weights: Tensor, value: Tensor, grid: WindowGrid, shift: int, unshift: int) -> Tensor:
    """Return the map of values that weights gather, as plain differentiable code."""
    return grid.join(weights.to(value.dtype) @ grid.cut(value, shift), unshift)


def _grid(x: Tensor, window_size: int) -> WindowGrid:
    return WindowGrid(x.shape[2], x.shape[3], window_size)


# --- weights


@torch.library.custom_op("sparse_sr_attn::window_weights", mutates_args=())
def weights_op(query: Tensor, key: Tensor, window_size: int, shift: int, scale: float) -> Tensor:
    """See `weights`."""
    with torch.autocast(query.device.type, enabled=False):
        return weights(query, key, _grid(query, window_size), shift, scale)


@weights_op.register_fake
def _(query: Tensor, key: Tensor, window_size: int, shift: int, scale: float) -> Tensor:
    shape = (query.shape[0], _grid(query, window_size).num_windows, window_size**2, window_size**2)
    return query.new_empty(shape, dtype=working_precision(query))


@torch.library.custom_op("sparse_sr_attn::window_weights_backward", mutates_args=())
def _weights_backward(
    grad: Tensor, weights: Tensor, query: Tensor, key: Tensor, shift: int, scale: float
) -> tuple[Tensor, Tensor]:
    grid = _grid(query, math.isqrt(weights.shape[-1]))
    with torch.autocast(query.device.type, enabled=False):
        queries, keys = (grid.cut(x.to(weights.dtype), shift) for x in (query, key))
        grad_scores = scale * weights * (grad - (grad * weights).sum(dim=-1, keepdim=True))
        grad_query = grid.join(grad_scores @ keys, shift).to(query.dtype)
        grad_key = grid.join(grad_scores.transpose(-1, -2) @ queries, shift).to(key.dtype)
    return grad_query.contiguous(), grad_key.contiguous()


@_weights_backward.register_fake
def _(grad: Tensor, weights: Tensor, query: Tensor, key: Tensor, shift: int, scale: float) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)


def _keep_weights(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, _, ctx.shift, ctx.scale = inputs
    ctx.save_for_backward(output, query, key)


def _backward_weights(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_weights_backward(grad, *ctx.saved_tensors, ctx.shift, ctx.scale), None, None, None)


weights_op.register_autograd(_backward_weights, setup_context=_keep_weights)

# --- apply


@torch.library.custom_op("sparse_sr_attn::apply_window_weights", mutates_args=())
def apply_op(weights: Tensor, value: Tensor, window_size: int, shift: int, unshift: int) -> Tensor:
    """See `apply`."""
    with torch.autocast(value.device.type, enabled=False):
        return apply(weights, value, _grid(value, window_size), shift, unshift).contiguous()


@apply_op.register_fake
def _(weights: Tensor, value: Tensor, window_size: int, shift: int, unshift: int) -> Tensor:
    return value.new_empty(value.shape)


@torch.library.custom_op("sparse_sr_attn::apply_window_weights_backward", mutates_args=())
def _apply_backward(grad: Tensor, weights: Tensor, value: Tensor, shift: int, unshift: int) -> tuple[Tensor, Tensor]:
    grid = _grid(value, math.isqrt(weights.shape[-1]))
    with torch.autocast(value.device.type, enabled=False):
        grads = grid.cut(grad, unshift)
        grad_weights = (grads @ grid.cut(value, shift).transpose(-1, -2)).to(weights.dtype)
        grad_value = grid.join(weights.to(grad.dtype).transpose(-1, -2) @ grads, shift)
    return grad_weights, grad_value.contiguous()


@_apply_backward.register_fake
def _(grad: Tensor, weights: Tensor, value: Tensor, shift: int, unshift: int) -> tuple[Tensor, Tensor]:
    return weights.new_empty(weights.shape), value.new_empty(value.shape)


def _keep_values(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weights, value, _, ctx.shift, ctx.unshift = inputs
    ctx.save_for_backward(weights, value)


def _backward_apply(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_apply_backward(grad, *ctx.saved_tensors, ctx.shift, ctx.unshift), None, None, None)


apply_op.register_autograd(_backward_apply, setup_context=_keep_values)
