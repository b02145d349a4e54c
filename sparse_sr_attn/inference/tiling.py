"""Inference on large images in overlapping tiles, so that memory does not grow with the image."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from sparse_sr_attn.errors import ShapeError, first_line

T = TypeVar("T")

Progress = Callable[[int, int], object]
"""Called after each tile with the number of finished tiles and the total."""


def upscale_tiled(
    net: Callable[[Tensor], Tensor],
    images: Tensor,
    tile: int,
    overlap: int,
    *,
    blend: int = 0,
    progress: Progress | None = None,
) -> Tensor:
    """Compute `net(images)` in overlapping tiles.

    Args:
        net: a function that enlarges (b, c, h, w) by an integer factor.
        images: (b, c, h, w).
        tile: side of the tiles in pixels of `images`, >= 1; a shorter side is not cut.
        overlap: minimum overlap of neighbouring tiles in pixels, `0 <= overlap < tile`. Seams are in its middle.
        blend: width of the blending around the seam in pixels, `0 <= blend <= overlap`; 0 for a sharp seam. Odd numbers
            are rounded down to even.
        progress: called after each tile.

    Returns:
        The upscaled images. They equal `net(images)` if pixels depend on others at most `(overlap - blend) / 2` away.
        Layers with a larger reach, such as attention, only see their own tile; blending hides the seams, and
        `docs/upscale.md` gives the differences.

    Raises:
        ShapeError: `net` does not enlarge each tile by the same integer factor.
        TypeError: `net` returns integers, which cannot be blended.
        ValueError: `tile`, `overlap` or `blend` is out of range.

    Examples:
        >>> net = torch.nn.Upsample(scale_factor=2)
        >>> upscale_tiled(net, torch.rand(1, 3, 50, 70), tile=32, overlap=8, blend=4).shape
        torch.Size([1, 3, 100, 140])
    """
    output: Tensor | None = None
    first = 0
    for strip in upscaled_strips(net, images, tile, overlap, blend=blend, progress=progress):
        if output is None:
            scale = strip.shape[-1] // images.shape[-1]
            height = images.shape[-2] * scale
            if strip.shape[-2] == height:
                return strip
            output = strip.new_empty(*strip.shape[:-2], height, strip.shape[-1])
        output[..., first : first + strip.shape[-2], :] = strip
        first += strip.shape[-2]
    assert output is not None  # noqa: S101  (an image has a pixel)
    return output


def upscaled_strips(
    net: Callable[[Tensor], Tensor],
    images: Tensor,
    tile: int,
    overlap: int,
    *,
    blend: int = 0,
    progress: Progress | None = None,
) -> Iterator[Tensor]:
    """Yield strips of rows of `upscale_tiled(...)` from top to bottom, as soon as they are complete.

    A caller that converts them, e.g. to uint8, never holds the whole image in floats. The arguments are those of
    `upscale_tiled`. `net` gets unconverted parts of `images`, and may convert them itself.

    Raises:
        ShapeError: `net` does not enlarge each tile by the same integer factor.
        TypeError: `net` returns integers, which cannot be blended.
        ValueError: `tile`, `overlap` or `blend` is out of range.

    Examples:
        >>> net = torch.nn.Upsample(scale_factor=2)
        >>> [strip.shape[2] for strip in upscaled_strips(net, torch.rand(1, 3, 50, 70), tile=32, overlap=8)]
        [50, 50]
    """
    if tile < 1 or not 0 <= overlap < tile or not 0 <= blend <= overlap:
        raise ValueError(
            f"tiles need tile >= 1, 0 <= overlap < tile and 0 <= blend <= overlap, got {tile=}, {overlap=}, {blend=}"
        )
    rows = _cuts(images.shape[-2], tile, overlap, blend // 2)
    columns = _cuts(images.shape[-1], tile, overlap, blend // 2)
    band: Tensor | None = None  # the rows that are not finished
    scale = 0
    for down, row in enumerate(rows):
        for across, column in enumerate(columns):
            part = images[..., row.start : row.start + row.length, column.start : column.start + column.length]
            piece = net(part)
            scale = scale or piece.shape[-1] // column.length
            _check_piece(piece, part, scale, blend)
            if across == 0:
                above = band
                band = piece.new_zeros(*piece.shape[:-2], (row.last - row.first) * scale, images.shape[-1] * scale)
                if above is not None:
                    band[..., : above.shape[-2], :] = above
            assert band is not None  # noqa: S101  (the first column made it)
            kept = piece[..., row.kept(scale), column.kept(scale)]
            blend_weights = row.blend_weights(scale, piece)[:, None] * column.blend_weights(scale, piece)
            band[..., slice(column.first * scale, column.last * scale)] += kept * blend_weights
            if progress is not None:
                progress(down * len(columns) + across + 1, len(rows) * len(columns))
        assert band is not None  # noqa: S101  (there is a column)
        finished = (rows[down + 1].first if down + 1 < len(rows) else row.last) - row.first
        yield band[..., : finished * scale, :]
        band = band[..., finished * scale :, :]


def _check_piece(piece: Tensor, part: Tensor, scale: int, blend: int) -> None:
    """Raise an error if a tile cannot be put together with others."""
    expected = (*part.shape[:-3], *(side * scale for side in part.shape[-2:]))
    if scale < 1 or (*piece.shape[:-3], *piece.shape[-2:]) != expected:
        factor = f"the integer factor of the first one, {scale}" if scale else "an integer factor"
        raise ShapeError(
            f"net must enlarge each tile by {factor}; got {tuple(piece.shape)} for a tile of {tuple(part.shape)}"
        )
    if blend and not piece.is_floating_point():
        raise TypeError(f"net must return floating-point images to blend them, got {piece.dtype}; round them later")


def num_tiles(height: int, width: int, tile: int, overlap: int) -> int:
    """Return the number of tiles that `upscale_tiled` uses for an image.

    Examples:
        >>> num_tiles(50, 70, tile=32, overlap=8)
        6
    """
    return len(_cuts(height, tile, overlap, 0)) * len(_cuts(width, tile, overlap, 0))


def with_smaller_tiles(
    attempt: Callable[[int], T], tile: int, *, smallest: int = 32, notice: Callable[[int], object] | None = None
) -> T:
    """Return `attempt(tile)`; if memory runs out, retry with half the tile size.

    Args:
        attempt: function that does the work with a tile size.
        tile: the first tile size in pixels, >= 1.
        smallest: the last tile size to try.
        notice: called with each smaller size before it is tried.

    Raises:
        MemoryError: memory runs out even with the smallest tiles.

    Examples:
        >>> net, image = torch.nn.Upsample(scale_factor=2), torch.rand(1, 3, 50, 70)
        >>> with_smaller_tiles(lambda tile: upscale_tiled(net, image, tile, overlap=8), 512).shape
        torch.Size([1, 3, 100, 140])
    """
    while True:
        try:
            return attempt(tile)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            reason = first_line(error)
        # Out of the handler: the error's traceback holds what filled the memory.
        if tile <= smallest:
            raise MemoryError(f"memory does not suffice even for tiles of {tile} pixels: {reason}")
        tile = max(smallest, tile // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if notice is not None:
            notice(tile)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error means that a device is out of memory.

    Examples:
        >>> is_out_of_memory(MemoryError()), is_out_of_memory(ValueError("tile must be >= 1"))
        (True, False)
    """
    # On the CPU, torch says it in words only.
    words = ("can't allocate memory", "not enough memory", "could not create a primitive")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in words)


class _Cut(NamedTuple):
    """One tile along one side, in pixels of the input.

    Attributes:
        start: the first pixel of the tile.
        length: its length.
        first: the first pixel that it contributes to.
        last: the last one, + 1.
        rise: the interval in which its weight grows from 0 to 1; empty for a sharp seam.
        fall: the interval in which its weight falls to 0.
    """

    start: int
    length: int
    first: int
    last: int
    rise: tuple[int, int]
    fall: tuple[int, int]

    def kept(self, scale: int) -> slice:
        """Return the slice of the tile's output that is used."""
        return slice((self.first - self.start) * scale, (self.last - self.start) * scale)

    def blend_weights(self, scale: int, like: Tensor) -> Tensor:
        """Return its weight in each pixel that it contributes to; the weights of all tiles sum to 1."""
        centre = torch.arange(self.first * scale, self.last * scale, device=like.device, dtype=torch.float64) + 0.5
        risen, fallen = (
            ((centre - start * scale) / max(end - start, 1e-9) / scale).clamp(0, 1)
            for start, end in (self.rise, self.fall)
        )
        return (risen - fallen).to(like.dtype)


def _cuts(size: int, tile: int, overlap: int, half: int) -> list[_Cut]:
    """Return the tiles along a side; blending extends `half` pixels to each side of a seam."""
    length = min(size, tile)
    starts = [*range(0, size - length, tile - overlap), size - length]
    seams = [(start + length + following) // 2 for start, following in pairwise(starts)]
    # Before the first pixel all has risen, after the last one nothing falls.
    ramps = [(-1, 0), *((seam - half, seam + half) for seam in seams), (size, size + 1)]
    return [
        _Cut(start, length, max(rise[0], 0), min(fall[1], size), rise, fall)
        for start, (rise, fall) in zip(starts, pairwise(ramps), strict=True)
    ]
