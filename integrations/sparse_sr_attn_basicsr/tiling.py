"""Large images in overlapping tiles, so that memory does not grow with the image."""

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor


def upscale_tiled(net: Callable[[Tensor], Tensor], images: Tensor, tile: int, overlap: int) -> Tensor:
    """Return `net(images)` put together from tiles, of each of which the middle is kept.

    Args:
        net: enlarges (b, c, h, w) by a whole factor.
        images: (b, c, h, w).
        tile: side of the squares that `net` sees, in pixels of `images`; a shorter image is not cut.
        overlap: pixels that neighbouring tiles share, `0 <= overlap < tile`. They meet in the middle of these.

    Returns:
        The same as `net(images)` where a pixel depends on no other further away than `overlap / 2`. Layers that reach
        further, attention among them, see their own tile only.
    """
    height, width = images.shape[-2:]
    output: Tensor | None = None
    for top, tile_height, first_row, last_row in _cuts(height, tile, overlap):
        for left, tile_width, first_column, last_column in _cuts(width, tile, overlap):
            piece = net(images[..., top : top + tile_height, left : left + tile_width])
            scale = piece.shape[-2] // tile_height
            if output is None:
                output = piece.new_empty(*piece.shape[:-2], height * scale, width * scale)
            rows = slice(first_row * scale, last_row * scale)
            columns = slice(first_column * scale, last_column * scale)
            output[..., rows, columns] = piece[
                ...,
                (first_row - top) * scale : (last_row - top) * scale,
                (first_column - left) * scale : (last_column - left) * scale,
            ]
    assert output is not None  # noqa: S101  (an image has a pixel)
    return output


def _cuts(size: int, tile: int, overlap: int) -> list[tuple[int, int, int, int]]:
    """Return (start, length, first kept, last kept + 1) of each tile along one side."""
    if size <= tile:
        return [(0, size, 0, size)]
    starts = [*range(0, size - tile, tile - overlap), size - tile]
    seams = [(start + tile + following) // 2 for start, following in pairwise(starts)]
    return [(start, tile, *kept) for start, kept in zip(starts, pairwise([0, *seams, size]), strict=True)]
