"""Upscale pictures of any kind and bit depth with a network. Needs Pillow and NumPy."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_sr_attn.data.images import Picture
from sparse_sr_attn.errors import ImageError
from sparse_sr_attn.inference.tiling import Progress, upscaled_strips

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow has it

_VISIBLE = 16
"""Alpha (of 255) from which a pixel's own colour is fully used."""


def network_input(picture: Picture, num_channels: int) -> Float[Tensor, "1 c h w"]:
    """Return the picture without alpha as input in 0..1 for a network of `num_channels`, 1 or 3, channels.

    Examples:
        >>> import numpy as np
        >>> network_input(Picture(np.zeros((12, 16, 3), np.uint8)), num_channels=3).shape
        torch.Size([1, 3, 12, 16])
    """
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
    """Upscale a picture with `model`; the result has the same kind and bit depth.

    For a network of three channels, grey is repeated and the result converted back to grey; a network of one channel
    gets each colour separately. Alpha is upscaled by bicubic interpolation. Transparent pixels first take the colours
    of visible pixels around them, so that no hidden colour shows at an edge.

    Args:
        model: a network of this library with one or three channels, in evaluation mode, on any device.
        picture: from `read_image`.
        tile: as in `upscale_tiled`.
        overlap: as in `upscale_tiled`.
        blend: as in `upscale_tiled`.
        progress: as in `upscale_tiled`.

    Raises:
        ImageError: `model` has another number of channels, or its output is not finite.
        ValueError: `tile`, `overlap` or `blend` is out of range.

    Examples:
        >>> import numpy as np
        >>> model, picture = load_model("LCoAN-light_x2"), Picture(np.zeros((12, 16, 3), np.uint8))
        >>> upscale_image(model, picture, tile=12, overlap=4).pixels.shape
        (24, 32, 3)
    """
    import numpy as np  # noqa: PLC0415
    from PIL import Image  # noqa: PLC0415

    height, width = picture.pixels.shape[:2]
    upscale, num_channels = int(model.upscale), int(model.num_in_ch)  # type: ignore[arg-type]
    if num_channels not in (1, 3):
        raise ImageError(f"the network must have 1 or 3 channels for images, got {num_channels}")
    peak = int(np.iinfo(picture.pixels.dtype).max)
    device = next(model.parameters()).device
    grey = picture.pixels.ndim == 2

    def net(part: Tensor) -> Tensor:
        low = part.float().to(device) / peak
        low = low.transpose(0, 1) if num_channels == 1 else low.expand(-1, 3, -1, -1)
        high: Tensor = model(low)
        if high.shape[1] != num_channels:
            raise ImageError(
                f"the network must have {num_channels} output channels, like its input, got {high.shape[1]}"
            )
        if num_channels == 1:
            return high.transpose(0, 1)
        return _luma(high) if grey else high

    source = picture.pixels[None] if grey else picture.pixels.transpose(2, 0, 1)
    images = torch.from_numpy(np.array(source, order="C"))[None]
    if picture.alpha is not None:
        images = _without_hidden_colours(images, torch.from_numpy(picture.alpha.copy()))
    try:
        pixels = np.empty((height * upscale, width * upscale, *picture.pixels.shape[2:]), picture.pixels.dtype)
    except (MemoryError, ValueError) as error:
        raise ImageError(f"becomes {width * upscale}x{height * upscale}, which does not fit in memory") from error
    first = 0
    with torch.inference_mode():
        for strip in upscaled_strips(net, images, tile, overlap, blend=blend, progress=progress):
            if not strip.isfinite().all():
                raise ImageError("the output of the network is not finite")
            values = (strip[0] * peak).round().clamp(0, peak).to("cpu", torch.int32).numpy()
            pixels[first : first + strip.shape[-2]] = values[0] if grey else values.transpose(1, 2, 0)
            first += strip.shape[-2]
    alpha = picture.alpha
    if alpha is not None:
        size = (width * upscale, height * upscale)
        alpha = np.asarray(Image.fromarray(alpha).resize(size, Image.Resampling.BICUBIC))
    return Picture(pixels, alpha, picture.icc_profile)


def _without_hidden_colours(images: Tensor, alpha: UInt8[Tensor, "h w"]) -> Tensor:
    """Return `images` (1, c, h, w) with transparent pixels filled with colours around them."""
    certainty = (alpha[None, None].float() / _VISIBLE).clamp(max=1)
    if not 0 < certainty.mean() < 1:
        return images
    return _filled(images.float(), certainty).round().to(images.dtype)


def _filled(colours: Tensor, certainty: Tensor) -> Tensor:
    """Fill uncertain pixels with the certain colours around them, from a coarser image first."""
    if max(colours.shape[2:]) == 1 or bool((certainty == 1).all()):
        return colours
    coverage = F.avg_pool2d(certainty, 2, ceil_mode=True)
    coarse = F.avg_pool2d(colours * certainty, 2, ceil_mode=True) / coverage.clamp(min=1e-9)
    around = F.interpolate(_filled(coarse, (4 * coverage).clamp(max=1)), scale_factor=2, mode="bilinear")
    return torch.lerp(around[..., : colours.shape[2], : colours.shape[3]], colours, certainty)


def _luma(images: Tensor) -> Tensor:
    return (images * images.new_tensor(_LUMA).view(3, 1, 1)).sum(dim=1, keepdim=True)
