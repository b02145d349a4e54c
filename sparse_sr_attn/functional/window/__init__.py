r"""Attention inside square windows of a map, of any size and shifted or not.

The map is padded at the right and at the bottom to whole windows, rolled to the left and up by `shift` pixels
(cyclically: opposite borders meet, and the pads take part), and cut into $k$ windows of $i = \mathrm{window\_size}^2$
slots, all in raster order. A pixel attends to the real pixels of its window.

Each operation has two backends with equal results: *eager*, plain code, for export, and *operator*, which compilers do
not look into, for all else. Dense attention is the case of a window that holds the whole map.
"""

import math
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from sparse_sr_attn.errors import ShapeError
from sparse_sr_attn.functional._torch import without_autocast
from sparse_sr_attn.functional.backend import uses_operator
from sparse_sr_attn.functional.window import eager, tiles
from sparse_sr_attn.functional.window.grid import WindowGrid

Form = Literal["auto", "eager", "operator"]


def partition(x: Float[Tensor, "b c h w"], window_size: int, shift: int = 0) -> Float[Tensor, "b k i c"]:
    """Cut a map of any size into windows, in raster order, as are the slots of each; pads are zeros.

    Examples:
        >>> partition(torch.rand(2, 3, 8, 10), window_size=4).shape  # 10 pixels are padded to 12
        torch.Size([2, 6, 16, 3])
    """
    return WindowGrid(x.shape[2], x.shape[3], window_size).cut(x, shift)


def merge(windows: Float[Tensor, "b k i c"], height: int, width: int, shift: int = 0) -> Float[Tensor, "b c h w"]:
    """Put windows together again: the inverse of `partition`.

    Raises:
        ShapeError: a map of this height and width has other windows.

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
    backend: Form = "auto",
) -> Float[Tensor, "b k i i"]:
    r"""Softmax weights of every pixel over the pixels of its window, $\mathrm{softmax}(\mathrm{scale}\, Q K^\top)$.

    Args:
        query: any h, w >= 1.
        key: of the same size; `None` where the queries are the keys, which saves work.
        window_size: side of a window in pixels, >= 1; may exceed the map.
        shift: pixels that the windows are moved by to the right and down, >= 0.
        scale: factor on the dot products, dimensionless.
        backend: "eager", "operator", or "auto": operator but for export.

    Returns:
        Weights in float32 at least. Rows of real pixels sum to 1, and pads have weight 0 in them; rows of pads mean
        nothing, and are finite.

    Raises:
        BackendError: there is no such backend, or it cannot run here.
        ShapeError: `key` has another size.

    Note:
        Differentiable. Oracle: `reference.window`. A window that holds the whole map is dense attention.

    Examples:
        >>> window_weights(torch.rand(2, 3, 8, 10), window_size=4).shape
        torch.Size([2, 6, 16, 16])
    """
    _check_key(query, key)
    grid = WindowGrid(query.shape[2], query.shape[3], window_size)
    if uses_operator(backend, "operator"):
        return tiles.weights_op(query, key, window_size, shift, scale)
    with without_autocast(query):
        return eager.weights(query, key, grid, shift, scale)


def apply_window_weights(
    weights: Float[Tensor, "b k i i"],
    value: Float[Tensor, "b e h w"],
    *,
    window_size: int,
    shift: int = 0,
    unshift: int | None = None,
    backend: Form = "auto",
) -> Float[Tensor, "b e h w"]:
    """Gather values by weights: the second half of attention, for values that the weights were not made with.

    Args:
        weights: from `window_weights` with the same `window_size` and `shift`, of a map of the same size.
        value: one row a pixel.
        window_size: side of a window in pixels, >= 1.
        shift: as in `window_weights`.
        unshift: pixels to roll back by, if not as many as `shift`: the result is then displaced, and where it moves
            pads into the map, pixels mean nothing.
        backend: as in `window_weights`.

    Returns:
        A map in the dtype of `value`.

    Raises:
        BackendError: there is no such backend, or it cannot run here.
        ShapeError: the weights are those of another map.

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
    """Return `apply_window_weights(window_weights(query, key, ...), value, ...)`, without keeping the weights.

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
        BackendError: there is no such backend, or it cannot run here.
        ShapeError: the maps differ in size.

    Note:
        Differentiable. The backward computes the weights again.

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
