"""Read and write image files. Needs Pillow and NumPy."""

import contextlib
import io
import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

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

_SAVING: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95},
    "MPO": {"quality": 95},
    "AVIF": {"quality": 95},
    "WEBP": {"lossless": True, "exact": True},
}
_CODESTREAMS = (".j2k", ".j2c", ".jpc")
"""Suffixes of JPEG 2000 files without the .jp2 container."""

_NETPBM = {".pbm": b"P4", ".pgm": b"P5", ".ppm": b"P6", ".pfm": b"Pf"}
"""First bytes of such files. Pillow writes the same format for all four suffixes, chosen by the pixels."""

_MAX_BYTES = {"BMP": 2**32, "DIB": 2**32}
"""Formats limited to 32-bit sizes."""

_MAX_SIDE = {"JPEG": 65500, "MPO": 65500}
"""Formats whose encoder prints to the console if a side is too long."""

_SUGGESTED = (".png", ".tif", ".webp", ".jp2", ".jpg")
_SAMPLE = 32
_TOLERANCE = 2
"""Largest mean error of a lossy format on the sample, in levels; a palette of 256 colours exceeds it."""


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
        path: a path whose suffix gives the format, or a stream for PNG. JPEG and AVIF use quality 95, WebP is lossless.
        overwrite: whether to replace an existing file.

    Raises:
        ImageError: the format cannot hold the picture, or the file already exists or cannot be written.
    """
    if not isinstance(path, Path):
        _save(picture, path, ".png")
        return
    check_format(path, picture)
    with written(path, ImageError, overwrite=overwrite) as stream:
        _save(picture, stream, path.suffix.lower())


def _save(picture: Picture, stream: BinaryIO, suffix: str) -> None:
    import numpy as np  # noqa: PLC0415
    from PIL import Image  # noqa: PLC0415

    kind = format_of(Path(f"a{suffix}"))
    pixels = picture.pixels
    if picture.alpha is not None:
        pixels = np.dstack([pixels, picture.alpha])
    options: dict[str, Any] = {**_SAVING.get(kind, {}), "icc_profile": picture.icc_profile}
    if kind == "ICO":
        options["sizes"] = [(pixels.shape[1], pixels.shape[0])]
    elif kind == "JPEG2000":
        options["no_jp2"] = suffix in _CODESTREAMS
    elif kind == "TIFF":
        options["big_tiff"] = pixels.nbytes >= 2**31
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of formats that Pillow will drop one day
        Image.fromarray(pixels).save(stream, format=kind, **options)


def check_format(path: Path, picture: Picture, *, upscale: int = 1) -> None:
    """Raise ImageError if a format cannot hold a picture.

    Small samples of its kind, and lines as long as its sides, are written and read back. They must be the same, up to
    the small error of a lossy format.

    Args:
        path: a path whose suffix gives the format.
        picture: a picture of the kind to be written: grey or RGB, 8 or 16 bits, with or without alpha and profile.
        upscale: ratio of the size to be written to that of `picture`.

    Raises:
        ImageError: the format is unknown or cannot hold the picture; names formats that can.
    """
    format_of(path)
    reason = _obstacle(path.suffix.lower(), picture, upscale)
    if reason is None:
        return
    others = list(islice((suffix for suffix in _SUGGESTED if _obstacle(suffix, picture, upscale) is None), 3))
    remedy = f"; {', '.join(others)} can" if others else ""
    height, width = (upscale * side for side in picture.pixels.shape[:2])
    bits = 8 * picture.pixels.dtype.itemsize
    what = f"{width}x{height}, {bits}-bit {'grey' if picture.pixels.ndim == 2 else 'RGB'}"
    what += " with transparency" if picture.alpha is not None else ""
    raise ImageError(f"{path} cannot hold this picture ({what}): {reason}{remedy}")


def _obstacle(suffix: str, picture: Picture, upscale: int) -> str | None:
    """Return the reason why a file with this suffix cannot hold the picture; `None` if it can."""
    height, width = (upscale * side for side in picture.pixels.shape[:2])
    kind = format_of(Path(f"a{suffix}"))
    if picture.pixels.nbytes * upscale**2 >= _MAX_BYTES.get(kind, 2**63) or max(height, width) > _MAX_SIDE.get(
        kind, 2**31
    ):
        return "it is too large"
    # Only the first says something about values: a line may be too short for its ramps.
    for *size, tolerance in ((_SAMPLE, _SAMPLE, _TOLERANCE), (1, width, math.inf), (height, 1, math.inf)):
        one = _sample(picture, *size)
        stream = io.BytesIO()
        try:
            _save(one, stream, suffix)
            if not stream.getvalue().startswith(_NETPBM.get(suffix, b"")):
                return f"{suffix} files hold another kind of picture"
            found = read_image(io.BytesIO(stream.getvalue()), max_pixels=1 << 40)
        except ImageError:
            return "Pillow cannot read such files again"
        except Exception as error:  # encoders raise anything
            return first_line(error) or type(error).__name__
        if (reason := next(_differences(found, one, tolerance), None)) is not None:
            return reason
    return None


def _sample(picture: Picture, height: int, width: int) -> Picture:
    """Return ramps of the picture's kind in another size, with more than 256 colours if large enough."""
    import numpy as np  # noqa: PLC0415

    y, x = np.linspace(0, 1, height)[:, None], np.linspace(0, 1, width)[None]
    ramps = np.stack(np.broadcast_arrays(x, y, (x + y) / 2), axis=-1)
    kind = picture.pixels.dtype
    pixels = (ramps * np.iinfo(kind).max).astype(kind)
    alpha = None if picture.alpha is None else (255 * (1 + x - y) / 2).astype(np.uint8)
    return replace(picture, pixels=pixels[..., 2] if picture.pixels.ndim == 2 else pixels, alpha=alpha)


def _differences(found: Picture, wanted: Picture, tolerance: float) -> Iterator[str]:
    """Yield the differences between what was read and written; mean errors up to `tolerance` levels are accepted."""
    import numpy as np  # noqa: PLC0415

    if found.pixels.shape[:2] != wanted.pixels.shape[:2]:
        yield "it changes the size"
        return
    if found.pixels.dtype != wanted.pixels.dtype:
        yield f"it keeps {8 * found.pixels.dtype.itemsize} bits per channel"
    if wanted.icc_profile != found.icc_profile:
        yield "it loses the colour profile"
    if wanted.alpha is not None and found.alpha is None:
        yield "it loses the transparency"
        return
    opacity = np.full(wanted.pixels.shape[:2], 255.0) if wanted.alpha is None else wanted.alpha.astype(np.float64)
    if found.alpha is not None and np.abs(found.alpha - opacity).mean() > tolerance:
        yield "it changes the transparency"
    one, other = (np.atleast_3d(picture.pixels).astype(np.float64) for picture in (found, wanted))
    if (np.abs(one - other) * opacity[..., None] / 255).mean() > tolerance:
        yield "it changes the colours"


def format_of(path: Path) -> str:
    """Return Pillow's name of the format for the suffix of `path`.

    Raises:
        ImageError: Pillow cannot write such files.
    """
    from PIL import Image  # noqa: PLC0415

    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind is None or kind not in Image.SAVE:
        raise ImageError(f"{path} must have the suffix of an image format that Pillow writes, e.g. .png")
    return kind


def suffixes() -> list[str]:
    """Return the suffixes of all formats that Pillow knows."""
    from PIL import Image  # noqa: PLC0415

    return list(Image.registered_extensions())


def looks_like_image(path: Path) -> bool:
    """Return whether the suffix of `path` is that of an image format that Pillow reads."""
    from PIL import Image  # noqa: PLC0415

    return Image.registered_extensions().get(path.suffix.lower()) in Image.OPEN
