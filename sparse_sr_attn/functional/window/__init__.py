r"""Attention inside square windows of a map of any size, shifted or not.

The map is padded at the right and the bottom to whole windows, rolled to the left and up by `shift` pixels (cyclically,
padding included), and cut into $k$ windows of $i = \mathrm{window\_size}^2$ slots, all in raster order. A pixel attends
to the pixels of its window, not to padding.

Each operation has two backends with equal results: *eager*, plain code for export, and *operator*, a custom operator
that is opaque to compilers, for everything else. A window that holds the whole map gives dense attention.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_sr_attn.errors import ShapeError
from sparse_sr_attn.functional._torch import without_autocast
from sparse_sr_attn.functional.backend import uses_operator
from sparse_sr_attn.functional.window import eager, tiles
from sparse_sr_attn.functional.window.grid import WindowGrid

Form = Literal["auto", "eager", "operator"]


def partition(x: Float[Tensor, "b c h w"], window_size: int, shift: int = 0) -> Float[Tensor, "b k i c"]:
    """Cut a map of any size into windows, in raster order; padding is zero.

    Examples:
        >>> partition(torch.rand(2, 3, 8, 10), window_size=4).shape  # 10 pixels are padded to 12
        torch.Size([2, 6, 16, 3])
    """
    return WindowGrid(x.shape[2], x.shape[3], window_size).cut(x, shift)


def merge(windows: Float[Tensor, "b k i c"], height: int, width: int, shift: int = 0) -> Float[Tensor, "b c h w"]:
    """Join windows to a map; the inverse of `partition`.

    Raises:
        ShapeError: the windows do not fit a map of this height and width.

    Examples:
        >>> x = torch.rand(2, 3, 8, 10)
        >>> torch.equal(merge(partition(x, window_size=4), 8, 10), x)
        True
    """
    grid = WindowGrid(height, width, math.isqrt(windows.shape[2]))
    if tuple(windows.shape[1:3]) != (grid.num_windows, grid.window_size**2):
        raise ShapeError(
            f"a map of {height}x{width} must have {grid.num_windows} windows of {grid.window_size}x{grid.window_size}, "
            f"got {windows.shape[1]} of {windows.shape[2]} slots"
        )
    return grid.join(windows, shift)


def window_weights(
    query: Float[Tensor, "b d h w"],
    key: Float[Tensor, "b d h w"] | None = None,
    *,
    window_size: int,
    shift: int = 0,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    backend: Form = "auto",
) -> Float[Tensor, "b k i i"]:
    r"""Return the softmax weights of every pixel over its window, $\mathrm{softmax}(\mathrm{scale}\, Q K^\top)$.

    Args:
        query: a map of any h, w >= 1.
        key: a map of the same size; `None` to use the queries as keys, which saves work.
        window_size: side of a window in pixels, >= 1; may exceed the map.
        shift: pixels by which the windows are moved to the right and down, >= 0.
        scale: factor on the dot products, dimensionless.
        dtype: of the result; `None` for float32, or that of the query if higher.
        backend: "eager", "operator", or "auto" for the operator except in export.

    Returns:
        Weights, computed in float32 or higher. Rows of pixels sum to 1 and give padding weight 0; rows of padding are
        finite but
        undefined.

    Raises:
        BackendError: `backend` is unknown or cannot run here.
        ShapeError: `key` differs from `query` in size.

    Note:
        Differentiable. Reference implementation: `reference.window`.

    Examples:
        >>> window_weights(torch.rand(2, 3, 8, 10), window_size=4).shape
        torch.Size([2, 6, 16, 16])
    """
    _check_key(query, key)
    grid = WindowGrid(query.shape[2], query.shape[3], window_size)
    if uses_operator(backend, "operator"):
        return tiles.weights_op(query, key, window_size, shift, scale, dtype)
    with without_autocast(query):
        weights = eager.weights(query, key, grid, shift, scale)
        return weights if dtype is None else weights.to(dtype)


def apply_window_weights(
    weights: Float[Tensor, "b k i i"],
    value: Float[Tensor, "b e h w"],
    *,
    window_size: int,
    shift: int = 0,
    unshift: int | None = None,
    backend: Form = "auto",
) -> Float[Tensor, "b e h w"]:
    """Apply attention weights to values; the second half of attention.

    Args:
        weights: from `window_weights` with the same `window_size` and `shift`, for a map of the same size.
        value: the map of values.
        window_size: side of a window in pixels, >= 1.
        shift: as in `window_weights`.
        unshift: pixels to roll back by, `shift` by default. Otherwise the result is displaced, and pixels that come
            from padding are undefined.
        backend: as in `window_weights`.

    Returns:
        A map in the dtype of `value`.

    Raises:
        BackendError: `backend` is unknown or cannot run here.
        ShapeError: the weights do not fit a map of this size.

    Note:
        Differentiable in `weights` and `value`.

    Examples:
        >>> query, value = torch.rand(2, 3, 8, 10), torch.rand(2, 16, 8, 10)
        >>> weights = window_weights(query, window_size=4, shift=2)
        >>> apply_window_weights(weights, value, window_size=4, shift=2).shape
        torch.Size([2, 16, 8, 10])
    """
    grid = WindowGrid(value.shape[2], value.shape[3], window_size)
    expected = (value.shape[0], grid.num_windows, window_size**2, window_size**2)
    if tuple(weights.shape) != expected:
        raise ShapeError(f"weights of this map must be of shape {expected}, got {tuple(weights.shape)}")
    unshift = shift if unshift is None else unshift
    if uses_operator(backend, "operator"):
        return tiles.apply_op(weights, value, window_size, shift, unshift)
    with without_autocast(value):
        return eager.apply(weights, value, grid, shift, unshift)


def window_attention(
    query: Float[Tensor, "b d h w"],
    key: Float[Tensor, "b d h w"] | None,
    value: Float[Tensor, "b e h w"],
    *,
    window_size: int,
    shift: int = 0,
    unshift: int | None = None,
    scale: float = 1.0,
    backend: Form = "auto",
) -> Float[Tensor, "b e h w"]:
    """Return `apply_window_weights(window_weights(query, key, ...), value, ...)` without storing the weights.

    Args:
        query: as in `window_weights`.
        key: as in `window_weights`.
        value: as in `apply_window_weights`.
        window_size: as in `window_weights`.
        shift: as in `window_weights`.
        unshift: as in `apply_window_weights`.
        scale: as in `window_weights`.
        backend: as in `window_weights`.

    Returns:
        A map in the dtype of `value`.

    Raises:
        BackendError: `backend` is unknown or cannot run here.
        ShapeError: the maps differ in size.

    Note:
        Differentiable. The backward recomputes the weights.

    Examples:
        >>> query, value = torch.rand(2, 3, 8, 10), torch.rand(2, 16, 8, 10)
        >>> window_attention(query, None, value, window_size=4, shift=2).shape  # the queries are the keys
        torch.Size([2, 16, 8, 10])
    """
    _check_key(query, key)
    if query.shape[0] != value.shape[0] or query.shape[2:] != value.shape[2:]:
        raise ShapeError(f"query and value must be of one size, got {tuple(query.shape)} and {tuple(value.shape)}")
    unshift = shift if unshift is None else unshift
    grid = WindowGrid(value.shape[2], value.shape[3], window_size)
    if uses_operator(backend, "operator"):
        return tiles.attention_op(query, key, value, window_size, shift, unshift, scale)
    with without_autocast(value):
        return eager.apply(eager.weights(query, key, grid, shift, scale), value, grid, shift, unshift)


def _check_key(query: Tensor, key: Tensor | None) -> None:
    if key is not None and query.shape != key.shape:
        raise ShapeError(f"query and key must be of one size, got {tuple(query.shape)} and {tuple(key.shape)}")
