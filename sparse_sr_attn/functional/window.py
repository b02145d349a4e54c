r"""Attention inside square windows of a map, of any size and shifted or not.

The map is padded at the right and at the bottom to whole windows, rolled to the left and up by `shift` pixels
(cyclically: opposite borders meet, and the pads take part), and cut into $k$ windows of $i = \mathrm{window\_size}^2$
slots, all in raster order. A pixel attends to the real pixels of its window.

None of this moves data but once: padding, rolling and cutting are arithmetic on the numbers of pixels.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from sparse_sr_attn.errors import ShapeError
from sparse_sr_attn.functional.precision import working_precision


def partition(x: Float[Tensor, "b c h w"], window_size: int, shift: int = 0) -> Float[Tensor, "b k i c"]:
    """Cut a map of any size into windows, in raster order, as are the slots of each; pads are zeros."""
    return _Grid(x.shape[2], x.shape[3], window_size).cut(x, shift)


def merge(windows: Float[Tensor, "b k i c"], height: int, width: int, shift: int = 0) -> Float[Tensor, "b c h w"]:
    """Put windows together again: the inverse of `partition`.

    Raises:
        ShapeError: a map of this height and width has other windows.
    """
    grid = _Grid(height, width, math.isqrt(windows.shape[2]))
    if tuple(windows.shape[1:3]) != (grid.num_windows, grid.window_size**2):
        raise ShapeError(
            f"a map of {height}x{width} must have {grid.num_windows} windows of {grid.window_size}x{grid.window_size}, "
            f"got {windows.shape[1]} of {windows.shape[2]} slots"
        )
    return grid.join(windows, shift)


def window_weights(
    query: Float[Tensor, "b d h w"],
    key: Float[Tensor, "b d h w"],
    *,
    window_size: int,
    shift: int = 0,
    scale: float = 1.0,
) -> Float[Tensor, "b k i i"]:
    r"""Softmax weights of every pixel over the pixels of its window, $\mathrm{softmax}(\mathrm{scale}\, Q K^\top)$.

    Args:
        query: any h, w >= 1.
        key: of the same size.
        window_size: side of a window in pixels, >= 1; may exceed the map.
        shift: pixels that the windows are moved by to the right and down, >= 0.
        scale: factor on the dot products, dimensionless.

    Returns:
        Weights in float32 at least. Rows of real pixels sum to 1, and pads have weight 0 in them; rows of pads mean
        nothing, and are finite.

    Raises:
        ShapeError: `key` has another size.

    Note:
        Differentiable. Oracle: `reference.window`. A window that holds the whole map is dense attention.
    """
    if query.shape != key.shape:
        raise ShapeError(f"query and key must be of one size, got {tuple(query.shape)} and {tuple(key.shape)}")
    grid = _Grid(query.shape[2], query.shape[3], window_size)
    precision = working_precision(query)
    with torch.autocast(query.device.type, enabled=False):
        queries, keys = grid.cut(query.to(precision), shift), grid.cut(key.to(precision), shift)
        scores = scale * queries @ keys.transpose(-1, -2)
        if not grid.is_whole:
            # The lowest number, not -inf: a window of pads alone must not become NaN.
            scores = scores.masked_fill(~grid.is_real(shift, query.device)[:, None], torch.finfo(precision).min)
        return scores.softmax(dim=-1)


def apply_window_weights(
    weights: Float[Tensor, "b k i i"],
    value: Float[Tensor, "b e h w"],
    *,
    window_size: int,
    shift: int = 0,
    unshift: int | None = None,
) -> Float[Tensor, "b e h w"]:
    """Gather values by weights: the second half of attention, for values that the weights were not made with.

    Args:
        weights: from `window_weights` with the same `window_size` and `shift`, of a map of the same size.
        value: one row a pixel.
        window_size: side of a window in pixels, >= 1.
        shift: as in `window_weights`.
        unshift: pixels to roll back by, if not as many as `shift`; the result is then displaced.

    Returns:
        A map in the dtype of `value`.

    Raises:
        ShapeError: the weights are those of another map.

    Note:
        Differentiable in `weights` and `value`.
    """
    grid = _Grid(value.shape[2], value.shape[3], window_size)
    expected = (value.shape[0], grid.num_windows, window_size**2, window_size**2)
    if tuple(weights.shape) != expected:
        raise ShapeError(f"weights of this map must be of shape {expected}, got {tuple(weights.shape)}")
    with torch.autocast(value.device.type, enabled=False):
        return grid.join(weights.to(value.dtype) @ grid.cut(value, shift), shift if unshift is None else unshift)


def fit_windows(
    weights: Float[Tensor, "b k i i"], height: int, width: int, window_size: int
) -> Float[Tensor, "b k2 i i"]:
    """Return weights of a map of this size as this program wants them.

    Compiled code has a window of pads more than eager code, so weights that pass between the two gain or lose one.
    """
    missing = _Grid(height, width, window_size).num_windows - weights.shape[1]
    return F.pad(weights, (0, 0, 0, 0, 0, missing)) if missing in (-1, 1) else weights


def window_attention(
    query: Float[Tensor, "b d h w"],
    key: Float[Tensor, "b d h w"],
    value: Float[Tensor, "b e h w"],
    *,
    window_size: int,
    shift: int = 0,
    unshift: int | None = None,
    scale: float = 1.0,
) -> Float[Tensor, "b e h w"]:
    """Return `apply_window_weights(window_weights(query, key, ...), value, ...)`.

    Args:
        query: as in `window_weights`.
        key: as in `window_weights`.
        value: as in `apply_window_weights`.
        window_size: as in `window_weights`.
        shift: as in `window_weights`.
        unshift: as in `apply_window_weights`.
        scale: as in `window_weights`.

    Returns:
        A map in the dtype of `value`.

    Raises:
        ShapeError: the maps differ in size.
    """
    weights = window_weights(query, key, window_size=window_size, shift=shift, scale=scale)
    return apply_window_weights(weights, value, window_size=window_size, shift=shift, unshift=unshift)


@dataclass(frozen=True)
class _Grid:
    """How a map of some size is cut into windows."""

    height: int
    width: int
    window_size: int

    def __post_init__(self) -> None:
        if self.window_size < 1:
            raise ValueError(f"window_size must be >= 1, got {self.window_size}")

    @property
    def rows(self) -> int:
        return -(-self.height // self.window_size)

    @property
    def columns(self) -> int:
        return -(-self.width // self.window_size)

    @property
    def num_windows(self) -> int:
        # For a compiler a dimension of 1 is another program: it gets a window of pads more, so that there are two.
        return self.rows * self.columns + (1 if torch.compiler.is_compiling() else 0)

    @property
    def is_whole(self) -> bool:
        """Whether the map is known to have no pads; a compiler that traces all sizes at once is not asked."""
        whole = [self.height % self.window_size == 0, self.width % self.window_size == 0]
        return not torch.compiler.is_compiling() and all(whole)

    def cut(self, x: Tensor, shift: int) -> Tensor:
        rows = x.flatten(2).transpose(1, 2)
        rows = rows.contiguous() if self.is_whole else F.pad(rows, (0, 0, 0, 1))  # the last one is what pads read
        cut: Tensor = rows.index_select(1, self.pixels(shift, x.device))
        return cut.view(x.shape[0], self.num_windows, self.window_size**2, x.shape[1])

    def join(self, windows: Tensor, shift: int) -> Tensor:
        rows = windows.flatten(1, 2).index_select(1, self.slots(shift, windows.device))
        x: Tensor = rows.transpose(1, 2).unflatten(2, (self.height, self.width))
        return x

    def pixels(self, shift: int, device: torch.device) -> Int[Tensor, "ki"]:
        """Return the number of the pixel in each slot; of no pixel, one past the last, for pads."""
        size = self.window_size
        slot = torch.arange(self.num_windows * size**2, device=device)
        window, place = slot // size**2, slot % size**2
        y = (window // self.columns * size + place // size + shift) % (self.rows * size)
        x = (window % self.columns * size + place % size + shift) % (self.columns * size)
        real = (window < self.rows * self.columns) & (y < self.height) & (x < self.width)
        return torch.where(real, y * self.width + x, self.height * self.width)

    def slots(self, shift: int, device: torch.device) -> Int[Tensor, "n"]:
        """Return the slot of each pixel."""
        size = self.window_size
        pixel = torch.arange(self.height * self.width, device=device)
        y = (pixel // self.width - shift) % (self.rows * size)
        x = (pixel % self.width - shift) % (self.columns * size)
        window = y // size * self.columns + x // size
        return window * size**2 + y % size * size + x % size

    def is_real(self, shift: int, device: torch.device) -> Bool[Tensor, "k i"]:
        """Return which slots hold a pixel."""
        return (self.pixels(shift, device) < self.height * self.width).view(-1, self.window_size**2)
