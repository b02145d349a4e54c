"""Pairs of high and low resolution, in files as BasicSR's PairedImageDataset reads them.

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
    """Yield the picture and its low resolution, whole or in tiles that overlap.

    Args:
        high: of high resolution, channels last.
        upscale: the factor that super-resolution has to undo, `>= 1`.
        tile: side of the tiles in pixels of `high`, a multiple of `upscale`; 0 for the picture as a whole. A training
            step that needs a crop only then decodes a tile, not a photograph.
        crop: side of the crops to come (`gt_size` in an option file) in pixels of `high`, a multiple of `upscale`,
            smaller than `tile`. Tiles overlap by it, so that every crop whose place is a multiple of `upscale` lies in
            a tile.

    Yields:
        The place (`""`, or for example `"_y0064_x0000"`), the high and the low resolution. The picture is shrunk as a
        whole and cut afterwards, so a tile's border knows its neighbours. The last tiles end where the picture does; of
        a picture smaller than a tile there is one, as large as it is.

    Raises:
        ShapeError: a side is shorter than `crop` or than `upscale`.
        ValueError: `tile` or `crop` breaks its rule.
    """
    if tile % upscale or crop % upscale:
        raise ValueError(f"tile and crop must be multiples of upscale, {upscale}, got {tile} and {crop}")
    if crop < 0 or tile < 0 or (tile and crop >= tile):
        raise ValueError(f"tile and crop must be >= 0 and crop smaller than a tile, got {tile} and {crop}")
    high = crop_to_multiple(high, upscale)
    if min(high.shape[:2]) < crop:
        raise ShapeError(f"both sides must be >= {crop}, that of a crop, got {high.shape[0]}x{high.shape[1]}")
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
    """Write `folder/HR/NAME.png` and `folder/LR_xN/NAME.png`, both all at once; return how many pairs there are.

    What stood in these two is replaced. Until all files are there, nothing is.

    Args:
        pictures: names without suffix, and pictures of high resolution.
        folder: made if need be.
        upscale: as in `tiles`, like `tile` and `crop`.
        tile: as above.
        crop: as above.

    Raises:
        ImageError: two pictures have one name, or a file cannot be written.
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
                        raise ImageError(f"{name} is the name of two pictures, and must be that of one")
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
