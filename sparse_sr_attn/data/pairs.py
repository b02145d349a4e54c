"""Pairs of high- and low-resolution images, in files for BasicSR's PairedImageDataset.

Writing them needs Pillow and NumPy.
"""

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from jaxtyping import UInt8
from torch import Tensor

from sparse_sr_attn.data.atomic import fsync_dir
from sparse_sr_attn.data.imresize import crop_to_multiple, matlab_bicubic
from sparse_sr_attn.errors import ImageError, ShapeError

PARTIAL = ".partial"


def tiles(
    high: UInt8[Tensor, "h w 3"], upscale: int, *, tile: int = 0, crop: int = 0
) -> Iterator[tuple[str, UInt8[Tensor, "h2 w2 3"], UInt8[Tensor, "h3 w3 3"]]]:
    """Yield the picture and its low-resolution version, whole or in overlapping tiles.

    Args:
        high: the high-resolution picture, channels last.
        upscale: the super-resolution factor, `>= 1`.
        tile: side of the tiles in pixels of `high`, a multiple of `upscale`; 0 for the whole picture. With tiles,
            training decodes a tile rather than a photograph for each crop.
        crop: side of the training crops (`gt_size` in an option file) in pixels of `high`, a multiple of `upscale`,
            smaller than `tile`. Tiles overlap by it, so that every crop at a multiple of `upscale` is inside a tile.

    Yields:
        The position (`""`, or for example `"_y0064_x0000"`), the high- and the low-resolution image. The picture is
        downscaled before it is cut, so tiles have no artificial borders. The last tiles end at the picture's border; a
        picture smaller than a tile is yielded whole.

    Raises:
        ShapeError: a side is shorter than `crop` or `upscale`.
        ValueError: `tile` or `crop` is invalid.
    """
    if tile % upscale or crop % upscale:
        raise ValueError(f"tile and crop must be multiples of upscale, {upscale}, got {tile} and {crop}")
    if crop < 0 or tile < 0 or (tile and crop >= tile):
        raise ValueError(f"tile and crop must be >= 0 and crop smaller than a tile, got {tile} and {crop}")
    high = crop_to_multiple(high, upscale)
    if min(high.shape[:2]) < crop:
        raise ShapeError(f"both sides must be >= {crop}, the side of a crop, got {high.shape[0]}x{high.shape[1]}")
    low = matlab_bicubic(high, upscale)
    if not tile:
        yield "", high, low
        return
    for top in _corners(high.shape[0], upscale, tile, crop):
        for left in _corners(high.shape[1], upscale, tile, crop):
            y, x, side = top // upscale, left // upscale, tile // upscale
            yield (
                f"_y{top:04d}_x{left:04d}",
                high[top : top + tile, left : left + tile],
                low[y : y + side, x : x + side],
            )


def _corners(length: int, upscale: int, tile: int, crop: int) -> list[int]:
    last = max(0, length - tile)
    last -= last % upscale
    return sorted({*range(0, last, tile - crop), last})


def write_pairs(
    pictures: Iterable[tuple[str, UInt8[Tensor, "h w 3"]]], folder: Path, upscale: int, *, tile: int = 0, crop: int = 0
) -> int:
    """Write pairs to `folder/HR/NAME.png` and `folder/LR_xN/NAME.png`; return their number.

    The two folders are replaced together, after all files have been written.

    Args:
        pictures: names without suffix, and high-resolution pictures.
        folder: output folder, created if necessary.
        upscale: as in `tiles`.
        tile: as in `tiles`.
        crop: as in `tiles`.

    Raises:
        ImageError: two pictures have the same name, or a file cannot be written.
        ShapeError: a picture is too small.
    """
    from PIL import Image  # noqa: PLC0415

    partial = folder / PARTIAL
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was stopped
        parts = partial / "HR", partial / f"LR_x{upscale}"
        for part in parts:
            part.mkdir(parents=True)
        count = 0
        for name, picture in pictures:
            for place, *pair in tiles(picture, upscale, tile=tile, crop=crop):
                for part, pixels in zip(parts, pair, strict=True):
                    file = part / f"{name}{place}.png"
                    if file.exists():
                        raise ImageError(f"names must be unique, and {name} is the name of two pictures")
                    Image.fromarray(pixels.contiguous().numpy()).save(file)
                count += 1
        for part in parts:
            shutil.rmtree(folder / part.name, ignore_errors=True)
            part.rename(folder / part.name)
        fsync_dir(folder)
    except OSError as error:
        raise ImageError(f"{error.filename or folder} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return count
