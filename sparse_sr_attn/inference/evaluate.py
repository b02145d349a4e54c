"""Measure networks on folders of images, as the tables of papers do."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from sparse_sr_attn.backbones.base import Network
from sparse_sr_attn.backbones.trunks import evaluating
from sparse_sr_attn.checkpoints.foreign import network_name
from sparse_sr_attn.data.images import Picture, as_rgb
from sparse_sr_attn.data.imresize import crop_to_multiple, matlab_bicubic
from sparse_sr_attn.data.metrics import Protocol, Score, luma, score
from sparse_sr_attn.inference.upscale import upscale_image
from sparse_sr_attn.layers.base import AttentionLayer


def evaluate(
    model: Network,
    pictures: Iterable[UInt8[Tensor, "h w *c"]],
    *,
    border: int | None = None,
    protocol: Protocol = "basicsr",
) -> list[Score]:
    """Downsample pictures by MATLAB's bicubic, upscale them with `model`, and compare the luma.

    Args:
        model: a network on any device. It is run in evaluation mode; its mode is restored. Each picture goes through it
            whole.
        pictures: the ground truth, (h, w, 3) or (h, w), cropped to multiples of the factor.
        border: pixels of border to leave out, by default the factor.
        protocol: as in `luma`; with "basicsr", grey pictures count as RGB.

    Returns:
        PSNR in dB and SSIM of each picture.

    Raises:
        ImageError: the network has neither 1 nor 3 channels, or its output is not finite.
        ShapeError: a picture is too small.

    Examples:
        >>> picture = torch.randint(256, (48, 64, 3), dtype=torch.uint8)
        >>> len(evaluate(load_model("LCoAN-light_x2"), [picture, picture]))
        2
    """
    with evaluating(model):
        return [_score(model, picture, border, protocol) for picture in pictures]


def has_attention(model: nn.Module) -> bool:
    """Return whether a model has attention layers of this library.

    Examples:
        >>> has_attention(EDSR(num_block=2)), has_attention(load_model("LCoAN-light_x2"))
        (False, True)
    """
    return any(isinstance(module, AttentionLayer) for module in model.modules())


@contextmanager
def attention_off(model: nn.Module) -> Iterator[None]:
    """Switch all attention of a model off inside, to measure how much a trained network relies on it.

    Layers return their input, except for the convolutions of an ELAB. A network trained without attention may be better
    than one that lost it; train one to compare the two.

    Args:
        model: a model with layers of this library.

    Raises:
        ValueError: `model` has no attention, or has layers that cannot be switched off.

    Examples:
        >>> model = load_model("LCoAN-light_x2").eval()
        >>> with attention_off(model):
        ...     output = model(torch.rand(1, 3, 16, 16))
    """
    layers = [
        layer
        for layer in model.modules()
        if isinstance(layer, AttentionLayer) and not any(map(has_attention, layer.children()))
    ]
    if not layers:
        raise ValueError(f"model must have attention layers of this library, but {network_name(model)} has none")
    if fixed := sorted({type(layer).__name__ for layer in layers if not hasattr(layer, "res_scale")}):
        raise ValueError(f"attention layers must have res_scale to be switched off, but {', '.join(fixed)} has none")
    scales = [layer.res_scale for layer in layers]
    try:
        for layer in layers:
            layer.res_scale = 0.0  # type: ignore[assignment]
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.res_scale = scale


def _score(model: Network, picture: UInt8[Tensor, "h w *c"], border: int | None, protocol: Protocol) -> Score:
    high = crop_to_multiple(as_rgb(picture) if protocol == "basicsr" else picture, model.upscale)
    low = Picture(matlab_bicubic(high, model.upscale).numpy())
    result = torch.from_numpy(upscale_image(model, low, tile=max(low.pixels.shape), overlap=0).pixels)
    return score(luma(result, protocol), luma(high, protocol), border=model.upscale if border is None else border)
