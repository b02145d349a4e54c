"""Read and write image files. Needs Pillow and NumPy."""

import contextlib
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor

from sparse_sr_attn.data.atomic import written
from sparse_sr_attn.errors import ImageError, first_line

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

MAX_PIXELS = 178_956_970
"""Number of pixels above which Pillow suspects a decompression bomb."""

_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_ONE_PICTURE = ("MPO", "PSD", "ICO", "ICNS")
"""Formats whose first frame is the picture; other frames are previews, layers or sizes of it."""


class Format(NamedTuple):
    """A format of image files that are written.

    Attributes:
        name: Pillow's name of it.
        options: how files are written.
        max_side: longest side in pixels.
        lacks: what it cannot hold, of "16 bits" and "transparency".
    """

    name: str
    options: Mapping[str, Any] = {}
    max_side: int = 2**31 - 1
    lacks: tuple[str, ...] = ()


_JPEG = Format("JPEG", {"quality": 95}, 65_500, ("16 bits", "transparency"))
FORMATS = {
    ".png": Format("PNG"),
    ".tif": Format("TIFF"),
    ".tiff": Format("TIFF"),
    ".webp": Format("WEBP", {"lossless": True, "exact": True}, 16_383, ("16 bits",)),
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
}
"""The formats that are written, by suffix."""


@dataclass(frozen=True, eq=False)
class Picture:
    """An image as stored in a file.

    Attributes:
        pixels: grey (h, w) or RGB (h, w, 3), uint8 or uint16.
        alpha: opacity (h, w), uint8; `None` for an opaque image.
        icc_profile: colour profile; `None` for sRGB.
        reduced: whether the file has more bits per channel than `pixels`.
    """

    pixels: "NDArray[np.integer[Any]]"
    alpha: "NDArray[np.uint8] | None" = None
    icc_profile: bytes | None = None
    reduced: bool = False


def read_image(path: Path | BinaryIO, *, max_pixels: int = MAX_PIXELS) -> Picture:
    """Read the image in a file, rotated according to its EXIF data.

    Args:
        path: a file in any format that Pillow reads, or a seekable binary stream.
        max_pixels: largest accepted size, >= 1.

    Raises:
        ImageError: the file cannot be read, is not an image, is damaged, exceeds `max_pixels`, is animated, or has
            pixels that networks cannot process.

    Note:
        Palettes become RGB. CMYK and other colour spaces are converted to sRGB by Pillow, without their profile. Pillow
        reads 16 bits per channel only from grey images, and 8 bits from others; `reduced` is set for PNG, TIFF and PPM.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError  # noqa: PLC0415

    with warnings.catch_warnings(), _limit(max_pixels):
        warnings.simplefilter("ignore")  # what is wrong with a file is said once, by an error
        try:
            with Image.open(path) as image:
                num_frames = getattr(image, "n_frames", 1)
                if num_frames > 1 and image.format not in _ONE_PICTURE:
                    raise ImageError(f"must be a single picture, got {num_frames} frames; save them as separate files")
                depth = str(image.tile[0].args) if image.tile else ""
                reduced = _is_reduced(image)
                image.load()
                upright = ImageOps.exif_transpose(image)
                return replace(_picture(upright, grey_alpha="LA;16" in depth), reduced=reduced)
        except ImageError:
            raise
        except UnidentifiedImageError as error:
            raise ImageError("is not an image that Pillow can read, or is truncated") from error
        except Image.DecompressionBombError as error:
            size = re.search(r"\d+", str(error))
            number = f"{int(size[0]):,}" if size else "many"
            raise ImageError(f"must have at most {max_pixels:,} pixels (--max-pixels), got {number}") from error
        except MemoryError as error:
            raise ImageError("does not fit in memory") from error
        except OSError as error:
            raise ImageError(f"cannot be read: {error.strerror or first_line(error)}") from error
        except Exception as error:  # decoders raise anything over a broken file
            raise ImageError(f"is damaged: {type(error).__name__}: {first_line(error)}") from error


def _is_reduced(image: "Image.Image") -> bool:
    """Return whether Pillow reduces an opened PNG, TIFF or PPM, not yet loaded, to 8 bits per channel."""
    if image.mode in (*_SIXTEEN_BITS, "I", "F") or not image.tile:  # type: ignore[attr-defined]
        return False
    decoder, _, _, arguments = image.tile[0]  # type: ignore[attr-defined]
    largest = arguments[-1] if "ppm" in decoder and isinstance(arguments, tuple) else 255
    return ";16" in str(arguments) or (isinstance(largest, int) and largest > 255)


@contextlib.contextmanager
def _limit(max_pixels: int) -> Iterator[None]:
    """Set Pillow's limit on pixels, a global variable; Pillow rejects images above twice its value."""
    from PIL import Image  # noqa: PLC0415

    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max_pixels / 2  # type: ignore[assignment]
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _picture(image: "Image.Image", *, grey_alpha: bool) -> Picture:
    import numpy as np  # noqa: PLC0415

    profile = image.info.get("icc_profile")
    if image.mode in (*_SIXTEEN_BITS, "I"):
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ImageError(f"must have values in 0..65535, got {pixels.min()}..{pixels.max()}")
        if "transparency" in image.info:
            raise ImageError("is 16-bit grey with a transparent value, which Pillow cannot write again")
        return Picture(pixels.astype(np.uint16), None, profile)
    if image.mode == "F":
        raise ImageError("has floating-point pixels of unknown range; save it with 8 or 16 bits")
    grey = image.mode in ("1", "L", "LA", "La") or grey_alpha
    alpha = image.has_transparency_data
    if image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        profile = None  # of a space that is left
    try:
        pixels = np.asarray(image.convert(("L" if grey else "RGB") + "A" * alpha))
    except ValueError as error:
        raise ImageError(f"has pixels of mode {image.mode}, which Pillow cannot convert to RGB") from error
    if not alpha:
        return Picture(pixels, None, profile)
    colours = pixels[..., 0] if grey else pixels[..., :3]
    return Picture(colours, pixels[..., -1], profile)


def read_pixels(path: Path) -> UInt8[Tensor, "h w *c"]:
    """Read the image in a file without alpha, for `imresize` and `metrics`.

    Args:
        path: as in `read_image`.

    Returns:
        Grey `(h, w)` or RGB `(h, w, 3)`, uint8.

    Raises:
        ImageError: `read_image` fails, or the image has more than 8 bits per channel.
    """
    picture = read_image(path)
    if picture.reduced or picture.pixels.dtype != "uint8":
        got = "more" if picture.reduced else "16"
        raise ImageError(f"must have 8 bits per channel, got {got}; save it with 8 bits")
    return torch.from_numpy(picture.pixels.copy())  # Pillow's memory is read-only


def as_rgb(pixels: UInt8[Tensor, "h w *c"]) -> UInt8[Tensor, "h w 3"]:
    """Return grey `(h, w)` as three equal channels that share memory, and RGB `(h, w, 3)` unchanged."""
    return pixels[..., None].expand(-1, -1, 3) if pixels.dim() == 2 else pixels


def write_image(picture: Picture, path: Path | BinaryIO, *, overwrite: bool = False) -> None:
    """Write a picture to a file, completely or not at all.

    Args:
        picture: the picture; its profile is written, too.
        path: a path with a suffix of `FORMATS`, or a stream for PNG. JPEG uses quality 95, WebP is lossless.
        overwrite: whether to replace an existing file.

    Raises:
        ImageError: the format cannot hold the picture, or the file already exists or cannot be written.
    """
    if not isinstance(path, Path):
        _save(picture, path, FORMATS[".png"])
        return
    check_format(path, picture)
    with written(path, ImageError, overwrite=overwrite) as stream:
        _save(picture, stream, format_of(path))


def _save(picture: Picture, stream: BinaryIO, kind: Format) -> None:
    import numpy as np  # noqa: PLC0415
    from PIL import Image  # noqa: PLC0415

    pixels = picture.pixels if picture.alpha is None else np.dstack([picture.pixels, picture.alpha])
    options = {**kind.options, "icc_profile": picture.icc_profile}
    if kind.name == "TIFF":
        options["big_tiff"] = pixels.nbytes >= 2**31
    Image.fromarray(pixels).save(stream, format=kind.name, **options)


def check_format(path: Path, picture: Picture, *, upscale: int = 1) -> None:
    """Raise ImageError if a format cannot hold a picture.

    Args:
        path: a path whose suffix gives the format.
        picture: a picture of the kind to be written: grey or RGB, 8 or 16 bits, with or without alpha.
        upscale: ratio of the size to be written to that of `picture`.

    Raises:
        ImageError: the suffix is not in `FORMATS`, or the format cannot hold the picture; names some that can.
    """
    height, width = (upscale * side for side in picture.pixels.shape[:2])
    has = {"16 bits": picture.pixels.dtype.itemsize == 2, "transparency": picture.alpha is not None}

    def obstacle(kind: Format) -> str | None:
        lacking = next((feature for feature in kind.lacks if has[feature]), None)
        if lacking is not None:
            return f"{kind.name} has no {lacking}"
        return f"sides must be at most {kind.max_side:,}" if max(height, width) > kind.max_side else None

    if (reason := obstacle(format_of(path))) is not None:
        others = ", ".join(suffix for suffix, kind in FORMATS.items() if obstacle(kind) is None)
        raise ImageError(f"{path} cannot hold this picture of {width}x{height} pixels: {reason}; {others} can")


def format_of(path: Path) -> Format:
    """Return the format for the suffix of `path`.

    Raises:
        ImageError: no such files are written.
    """
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise ImageError(f"{path} must have one of the suffixes {', '.join(FORMATS)}")
    return kind


def looks_like_image(path: Path) -> bool:
    """Return whether the suffix of `path` is that of an image format that Pillow reads."""
    from PIL import Image  # noqa: PLC0415

    return Image.registered_extensions().get(path.suffix.lower()) in Image.OPEN
