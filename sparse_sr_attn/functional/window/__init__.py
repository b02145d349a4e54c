r"""Attention inside square windows of a map of any size, shifted or not.

The map is padded at the right and the bottom to whole windows, rolled to the left and up by `shift` pixels (cyclically,
padding included), and cut into $k$ windows of $i = \mathrm{window\_size}^2$ slots, all in raster order. A pixel attends
to the pixels of its window, not to padding.

Each operation has two backends with equal results: *eager*, plain code for export, and *operator*, a custom operator
that is opaque to compilers, for everything else. `grouped_window_attention` has a third, *triton*, one kernel for all
groups of channels on GPUs. A window that holds the whole map gives dense attention.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_sr_attn.errors import BackendError, ShapeError
from sparse_sr_attn.functional._torch import without_autocast
from sparse_sr_attn.functional.backend import resolve_backend, uses_operator
from sparse_sr_attn.functional.window import eager, tiles, triton
from sparse_sr_attn.functional.window.grid import WindowGrid, group_widths

Backend = Literal["auto", "eager", "operator"]
"""How window attention is computed."""
GroupedBackend = Literal["auto", "eager", "operator", "triton"]
"""How window attention in several groups of channels is computed."""


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
    backend: Backend = "auto",
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
    backend: Backend = "auto",
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
    backend: Backend = "auto",
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
    _check_sizes(query, value)
    unshift = shift if unshift is None else unshift
    grid = WindowGrid(value.shape[2], value.shape[3], window_size)
    if uses_operator(backend, "operator"):
        widths = [int(query.shape[1])], [int(value.shape[1])]
        return tiles.attention_op(query, key, value, [window_size], [shift], [unshift], *widths, scale)
    with without_autocast(value):
        return eager.apply(eager.weights(query, key, grid, shift, scale), value, grid, shift, unshift)


def grouped_window_attention(
    query: Float[Tensor, "b d h w"],
    value: Float[Tensor, "b e h w"],
    *,
    window_sizes: Sequence[int],
    shifts: Sequence[int],
    unshifts: Sequence[int] | None = None,
    backend: GroupedBackend = "auto",
) -> Float[Tensor, "b e h w"]:
    """Return `window_attention` of groups of channels, each with windows of its own size; queries are the keys.

    Args:
        query: a map of any h, w >= 1. Its channels are split as evenly as possible, larger groups first.
        value: a map of the same size, likewise; if it has fewer channels than there are window sizes, the last groups
            are empty.
        window_sizes: side of the windows of each group in pixels, each >= 1.
        shifts: pixels by which the windows of each group are moved to the right and down, each >= 0.
        unshifts: pixels to roll back by, `shifts` by default; as in `apply_window_weights`.
        backend: "triton" for one kernel on GPUs, "operator" or "eager" as in `window_weights`, or "auto" for the best
            of them here.

    Returns:
        A map in the dtype of `value`.

    Raises:
        BackendError: `backend` is unknown or cannot run here.
        ShapeError: the maps differ in size, or the lists in length.

    Note:
        Differentiable. The backward recomputes the weights.

    Examples:
        >>> query, value = torch.rand(2, 12, 8, 10), torch.rand(2, 24, 8, 10)
        >>> grouped_window_attention(query, value, window_sizes=(2, 4, 8), shifts=(1, 2, 4)).shape
        torch.Size([2, 24, 8, 10])
    """
    unshifts = shifts if unshifts is None else unshifts
    if not len(window_sizes) == len(shifts) == len(unshifts):
        raise ShapeError(
            f"each window size must have a shift, got {len(window_sizes)} sizes, {len(shifts)} shifts and "
            f"{len(unshifts)} unshifts"
        )
    _check_sizes(query, value)
    if backend == "triton":
        resolve_backend(backend, query.device)
    widths = [group_widths(int(x.shape[1]), len(window_sizes)) for x in (query, value)]
    groups = [*window_sizes], [*shifts], [*unshifts], *widths
    if backend == "triton" or (backend == "auto" and fuses_groups(query, len(window_sizes), value)):
        widest = max(widths[0][0], widths[1][0])
        if widest > triton.WIDEST:
            raise BackendError(
                f"backend 'triton' takes groups of at most {triton.WIDEST} channels, got {widest}; 'operator' and "
                "'eager' take any number"
            )
        return triton.attention_op(query, value, *groups)[0]
    if uses_operator(backend, "operator"):
        return tiles.attention_op(query, None, value, *groups, 1.0)
    queries, values = (x.split(each, dim=1) for x, each in zip((query, value), widths, strict=True))
    outputs = [
        window_attention(*(each, None, own), window_size=size, shift=shift, unshift=unshift, backend="eager")
        for each, own, size, shift, unshift in zip(queries, values, window_sizes, shifts, unshifts, strict=False)
    ]
    return torch.cat(outputs, dim=1)


def fuses_groups(query: Tensor, num_groups: int, value: Tensor | None = None) -> bool:
    """Return whether `grouped_window_attention` of `query` runs as one kernel here, and stored weights save nothing.

    Args:
        query: the map of queries.
        num_groups: number of groups.
        value: the map of values; `None` for one as wide as `query`.

    Examples:
        >>> fuses_groups(torch.rand(1, 12, 8, 8), num_groups=3)  # True on GPUs with triton
        False
    """
    widths = [group_widths(int(x.shape[1]), num_groups)[0] for x in (query, query if value is None else value)]
    return max(widths) <= triton.WIDEST and resolve_backend("auto", query.device) == "triton"


def split_groups(x: Float[Tensor, "b c h w"], num_groups: int) -> tuple[Float[Tensor, "b _ h w"], ...]:
    """Split the channels of a map as evenly as possible, larger groups first; without empty groups.

    Examples:
        >>> [group.shape[1] for group in split_groups(torch.rand(1, 8, 4, 4), 3)]
        [3, 3, 2]
    """
    return x.split(group_widths(int(x.shape[1]), num_groups), dim=1)


def _check_sizes(query: Tensor, value: Tensor) -> None:
    if query.shape[0] != value.shape[0] or query.shape[2:] != value.shape[2:]:
        raise ShapeError(f"query and value must be of one size, got {tuple(query.shape)} and {tuple(value.shape)}")


def _check_key(query: Tensor, key: Tensor | None) -> None:
    if key is not None and query.shape != key.shape:
        raise ShapeError(f"query and key must be of one size, got {tuple(query.shape)} and {tuple(key.shape)}")
