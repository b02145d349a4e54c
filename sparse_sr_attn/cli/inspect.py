"""`sparse-sr inspect`: the clusters of an image, and where its pixels attend."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_sr_attn.cli.common import UsageError, add_weights, check_new, load_with_attention, name, require, show
from sparse_sr_attn.data.images import MAX_PIXELS, Picture, check_format, read_image, write_image
from sparse_sr_attn.errors import ImageError, ShapeError, SparseSRError, first_line
from sparse_sr_attn.inference.upscale import network_input
from sparse_sr_attn.inference.visualize import (
    attention_entropy,
    attention_picture,
    attention_states,
    cluster_picture,
    pixel_attention,
)
from sparse_sr_attn.states import ClusterAttention, WindowAttention

if TYPE_CHECKING:
    from PIL import Image

DESCRIPTION = """\
Draw what the attention of a network does with an image.

examples:
  sparse-sr inspect clusters  photo.png --weights w.pth          the cluster of each pixel
  sparse-sr inspect attention photo.png --weights w.pth --pixel 40 25
                                                                 where that pixel attends, brighter for more

Clusters with similar centroids have similar colours."""
EPILOG = "The whole image goes through the network at once; crop a large one. Pixels are those of the input."

_SHORTEST = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("what", choices=["clusters", "attention"], help="what to draw")
    parser.add_argument("image", type=Path, metavar="IMAGE", help="any image that Pillow reads")
    add_weights(parser)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="image to write (default: IMAGE_WHAT.png)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing image")
    parser.add_argument(
        "--pixel", type=int, nargs=2, metavar=("X", "Y"), help="column and row, from 0 (default: the centre)"
    )
    parser.add_argument("--layer", type=int, default=0, metavar="N", help="attention layer, from 0 (default: 0)")


def run(arguments: argparse.Namespace) -> int:
    """Draw the requested picture; return the exit status."""
    require("PIL", "numpy")
    import numpy as np  # noqa: PLC0415

    if not os.path.lexists(arguments.image):
        raise UsageError(f"{name(arguments.image)}: no such image")
    output = arguments.output or arguments.image.with_name(f"{arguments.image.stem}_{arguments.what}.png")
    try:
        check_format(output, Picture(np.zeros((1, 1, 3), np.uint8)))
    except ImageError as error:
        raise UsageError(f"--output {error}") from error
    model = load_with_attention(arguments)
    try:
        low = network_input(read_image(arguments.image, max_pixels=MAX_PIXELS), model.num_in_ch)
    except ImageError as error:
        raise ImageError(f"{name(arguments.image)}: {error}") from error
    pixel = _pixel(arguments.pixel, low)
    check_new(output, arguments)
    try:
        states = attention_states(model, low.to(model.mean.device))
    except (ShapeError, MemoryError, RuntimeError) as error:  # torch's own are RuntimeErrors
        raise SparseSRError(f"{name(arguments.image)}: {first_line(error) or 'out of memory'}") from error
    except ValueError as error:
        raise SparseSRError(f"{name(arguments.weights)}: {error}") from error
    if not 0 <= arguments.layer < len(states):
        raise UsageError(f"--layer must be from 0 to {len(states) - 1}, got {arguments.layer}")
    layer = list(states)[arguments.layer]
    if arguments.what == "clusters":
        if not isinstance(states[layer], ClusterAttention):
            raise UsageError(f"only LCoA and CoA have clusters, but {layer} has windows; --layer selects another")
        picture = _clusters(model.get_submodule(layer), states[layer])
    else:
        picture = _attention(states[layer], low, pixel)
    _write(picture, output, arguments)
    return 0


def _write(picture: "Image.Image", output: Path, arguments: argparse.Namespace) -> None:
    import numpy as np  # noqa: PLC0415

    write_image(Picture(np.asarray(picture)), output, overwrite=arguments.overwrite)
    show(f"{name(arguments.image)} -> {name(output)}, with weights {name(arguments.weights)}")


def _pixel(asked: list[int] | None, low: Tensor) -> tuple[int, int]:
    height, width = low.shape[-2:]
    x, y = asked or (width // 2, height // 2)
    if not (0 <= x < width and 0 <= y < height):
        raise UsageError(f"--pixel must lie in the image, 0..{width - 1} and 0..{height - 1}, got {x} {y}")
    return x, y


def _clusters(layer: nn.Module, state: ClusterAttention) -> "Image.Image":
    sizes = state.pattern.assignment[0].bincount()
    show(f"{int((sizes > 0).sum())} clusters in use, the largest with {int(sizes.max())} pixels")
    return _large(cluster_picture(layer, state))


def _attention(state: ClusterAttention | WindowAttention, low: Tensor, pixel: tuple[int, int]) -> "Image.Image":
    x, y = pixel
    weights, side = pixel_attention(state, (low.shape[2], low.shape[3]), (y, x))
    width = weights.shape[1]
    strongest = weights.flatten().topk(min(5, weights.numel()))
    for weight, token in zip(strongest.values.tolist(), strongest.indices.tolist(), strict=True):
        show(f"{weight:.4f} at pixel {token % width * side} {token // width * side}")
    show(f"entropy over the image: {attention_entropy(state):.2f} of the largest possible")
    return _large(attention_picture(weights, side, low, (y, x)))


def _large(colours: Tensor) -> "Image.Image":
    """Return a picture in which each pixel of the map is a visible square."""
    from PIL import Image  # noqa: PLC0415

    factor = max(1, -(-_SHORTEST // max(colours.shape[:2])))
    large = F.interpolate(colours.permute(2, 0, 1)[None].float(), scale_factor=factor)[0].permute(1, 2, 0)
    return Image.fromarray(large.to(torch.uint8).numpy())
