"""Image files: read as they are, upscaled by a network, written whole. Needs Pillow and NumPy."""

import contextlib
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from sparse_sr_attn.errors import ImageError
from sparse_sr_attn.files import replacing
from sparse_sr_attn.inference import Progress, upscaled_strips

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

MAX_PIXELS = 178_956_970
"""Pixels above which Pillow takes a file for an attack on memory."""

_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_ONE_PICTURE = ("MPO", "PSD", "ICO", "ICNS")
"""Formats whose first frame is the picture; the others are previews, layers or sizes of it."""

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow has it
_SAVING: dict[str, dict[str, Any]] = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}


@dataclass(frozen=True, eq=False)
class Picture:
    """An image as a file has it.

    Attributes:
        pixels: (h, w) of grey or (h, w, 3) of RGB, uint8 or uint16.
        alpha: (h, w) of opacity, uint8; `None` for an opaque image.
        icc_profile: of its colours, `None` for sRGB.
    """

    pixels: "NDArray[np.integer[Any]]"
    alpha: "NDArray[np.uint8] | None" = None
    icc_profile: bytes | None = None


def read_image(path: Path, *, max_pixels: int = MAX_PIXELS) -> Picture:
    """Return the image in a file, turned as its EXIF says.

    Args:
        path: of any format that Pillow reads.
        max_pixels: largest size that is believed, >= 1.

    Raises:
        ImageError: the file cannot be read, is no image, is broken, is larger than `max_pixels`, is animated, or has
            pixels that no network here takes.

    Note:
        Palettes become RGB. CMYK and other colour spaces become sRGB without their profile, as Pillow converts them.
        Pillow reads 16 bits a channel of grey images only, and 8 bits of the others.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError  # noqa: PLC0415

    with warnings.catch_warnings(), _limit(max_pixels):
        warnings.simplefilter("ignore")  # what is wrong with a file is said once, by an error
        try:
            with Image.open(path) as image:
                num_frames = getattr(image, "n_frames", 1)
                if num_frames > 1 and image.format not in _ONE_PICTURE:
                    raise ImageError(f"has {num_frames} frames, and must be one picture; save the frames one by one")
                depth = str(image.tile[0].args) if image.tile else ""
                image.load()
                return _picture(ImageOps.exif_transpose(image), grey_alpha="LA;16" in depth)
        except ImageError:
            raise
        except UnidentifiedImageError as error:
            raise ImageError("is not an image that Pillow knows, or is cut off at its beginning") from error
        except Image.DecompressionBombError as error:
            size = re.search(r"\d+", str(error))
            number = f"{int(size[0]):,}" if size else "many"
            raise ImageError(f"has {number} pixels, and at most {max_pixels:,} are believed (--max-pixels)") from error
        except MemoryError as error:
            raise ImageError("does not fit in memory") from error
        except OSError as error:
            raise ImageError(f"cannot be read: {error.strerror or _line(error)}") from error
        except Exception as error:  # decoders raise anything over a broken file
            raise ImageError(f"is broken: {type(error).__name__}: {_line(error)}") from error


@contextlib.contextmanager
def _limit(max_pixels: int) -> Iterator[None]:
    """Let Pillow refuse what has more pixels; its only way to say so is a global, at half of where it refuses."""
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
        raise ImageError("has floating-point pixels, whose range nobody knows; save it with 8 or 16 bits")
    grey = image.mode in ("1", "L", "LA", "La") or grey_alpha
    alpha = image.has_transparency_data
    if image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        profile = None  # of a space that is left
    try:
        pixels = np.asarray(image.convert(("L" if grey else "RGB") + "A" * alpha))
    except ValueError as error:
        raise ImageError(f"has pixels of kind {image.mode}, which Pillow cannot make RGB") from error
    if not alpha:
        return Picture(pixels, None, profile)
    colours = pixels[..., 0] if grey else pixels[..., :3]
    return Picture(colours, pixels[..., -1], profile)


def read_pixels(path: Path) -> UInt8[Tensor, "h w *c"]:
    """Return the image in a file, without alpha, as `degradation` and `evaluation` take it.

    Args:
        path: as in `read_image`.

    Returns:
        Grey `(h, w)` or RGB `(h, w, 3)`, uint8.

    Raises:
        ImageError: `read_image` refuses the file, or it has 16 bits a channel.
    """
    pixels = torch.from_numpy(read_image(path).pixels.copy())  # Pillow's memory is read-only
    if pixels.dtype != torch.uint8:
        raise ImageError("must have 8 bits a channel, got 16; save it with 8 bits")
    return pixels


def as_rgb(pixels: UInt8[Tensor, "h w *c"]) -> UInt8[Tensor, "h w 3"]:
    """Return grey `(h, w)` as three equal channels, which share its memory, and RGB `(h, w, 3)` as it is."""
    return pixels[..., None].expand(-1, -1, 3) if pixels.dim() == 2 else pixels


def network_input(picture: Picture, num_channels: int) -> Float[Tensor, "1 c h w"]:
    """Return the picture, without alpha, as a network of `num_channels`, 1 or 3, takes it whole: in 0..1."""
    import numpy as np  # noqa: PLC0415

    pixels = torch.from_numpy(picture.pixels.astype(np.float32) / np.iinfo(picture.pixels.dtype).max)
    image = pixels.expand(3, -1, -1) if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    if num_channels == 1:
        image = _luma(image[None])[0]
    return image[None].contiguous()


def upscale_image(
    model: nn.Module,
    picture: Picture,
    *,
    tile: int,
    overlap: int,
    blend: int = 0,
    progress: Progress | None = None,
) -> Picture:
    """Return the picture enlarged by `model`, with the same kind and depth of pixels.

    A network of three channels gets grey three times, and its result is made grey again; one of one channel gets the
    colours one after the other. Alpha is enlarged by bicubic interpolation.

    Args:
        model: one of this library's networks, of one or three channels, in evaluation mode, on any device.
        picture: from `read_image`.
        tile: as in `upscale_tiled`.
        overlap: as in `upscale_tiled`.
        blend: as in `upscale_tiled`.
        progress: as in `upscale_tiled`.

    Raises:
        ImageError: `model` has another number of channels, or gives numbers that are not finite.
        ValueError: `tile`, `overlap` or `blend` is out of its range.
    """
    import numpy as np  # noqa: PLC0415
    from PIL import Image  # noqa: PLC0415

    height, width = picture.pixels.shape[:2]
    upscale, num_channels = int(model.upscale), int(model.num_in_ch)  # type: ignore[arg-type]
    if num_channels not in (1, 3):
        raise ImageError(f"images go through networks of 1 or 3 channels, and this one has {num_channels}")
    peak = int(np.iinfo(picture.pixels.dtype).max)
    device = next(model.parameters()).device
    grey = picture.pixels.ndim == 2

    def net(part: Tensor) -> Tensor:
        low = part.float().to(device) / peak
        low = low.transpose(0, 1) if num_channels == 1 else low.expand(-1, 3, -1, -1)
        high: Tensor = model(low)
        if high.shape[1] != num_channels:
            raise ImageError(f"a network must give as many channels as it takes, {num_channels}, got {high.shape[1]}")
        if num_channels == 1:
            return high.transpose(0, 1)
        return _luma(high) if grey else high

    source = picture.pixels[None] if grey else picture.pixels.transpose(2, 0, 1)
    images = torch.from_numpy(np.array(source, order="C"))[None]
    try:
        pixels = np.empty((height * upscale, width * upscale, *picture.pixels.shape[2:]), picture.pixels.dtype)
    except (MemoryError, ValueError) as error:
        raise ImageError(f"becomes {width * upscale}x{height * upscale}, which does not fit in memory") from error
    first = 0
    with torch.inference_mode():
        for strip in upscaled_strips(net, images, tile, overlap, blend=blend, progress=progress):
            if not strip.isfinite().all():
                raise ImageError("the network gives numbers that are not finite")
            values = (strip[0] * peak).round().clamp(0, peak).to("cpu", torch.int32).numpy()
            pixels[first : first + strip.shape[-2]] = values[0] if grey else values.transpose(1, 2, 0)
            first += strip.shape[-2]
    alpha = picture.alpha
    if alpha is not None:
        size = (width * upscale, height * upscale)
        alpha = np.asarray(Image.fromarray(alpha).resize(size, Image.Resampling.BICUBIC))
    return Picture(pixels, alpha, picture.icc_profile)


def write_image(picture: Picture, path: Path, *, overwrite: bool = False) -> None:
    """Write the picture; the file is there whole or not at all.

    Args:
        picture: what is written, with its profile.
        path: its suffix says the format; JPEG has quality 95, WebP no loss.
        overwrite: whether a file that is there may be replaced.

    Raises:
        ImageError: the format cannot hold the picture, the file is there already, or cannot be written.
    """
    import numpy as np  # noqa: PLC0415
    from PIL import Image  # noqa: PLC0415

    kind = format_of(path)
    pixels = picture.pixels
    if picture.alpha is not None:
        pixels = np.dstack([pixels, picture.alpha])
    options = {**_SAVING.get(kind, {}), "icc_profile": picture.icc_profile}
    try:
        with replacing(path, overwrite=overwrite) as stream:
            Image.fromarray(pixels).save(stream, format=kind, **options)
    except FileExistsError as error:
        raise ImageError(f"{path} is there already, and stays; --overwrite replaces it") from error
    except (OSError, ValueError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or _line(error) or type(error).__name__
        raise ImageError(f"{path} cannot be written: {reason}") from error


def format_of(path: Path) -> str:
    """Return Pillow's name of the format that the suffix of `path` stands for.

    Raises:
        ImageError: Pillow writes no such files.
    """
    from PIL import Image  # noqa: PLC0415

    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind is None or kind not in Image.SAVE:
        raise ImageError(f"{path} must end like an image that Pillow writes, e.g. in .png")
    return kind


def looks_like_image(path: Path) -> bool:
    """Return whether the suffix of `path` is that of images which Pillow reads."""
    from PIL import Image  # noqa: PLC0415

    return Image.registered_extensions().get(path.suffix.lower()) in Image.OPEN


def _luma(images: Tensor) -> Tensor:
    return (images * images.new_tensor(_LUMA).view(3, 1, 1)).sum(dim=1, keepdim=True)


def _line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
