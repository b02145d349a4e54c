"""`sparse-sr demo`: a local web page to try a network on images."""

import argparse
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from sparse_sr_attn.backbones.base import Network
from sparse_sr_attn.cli.common import add_weights, load, require
from sparse_sr_attn.data.images import Picture
from sparse_sr_attn.data.imresize import imresize
from sparse_sr_attn.errors import ImageError
from sparse_sr_attn.inference.upscale import network_input, upscale_image
from sparse_sr_attn.inference.visualize import attention_picture, attention_states, pixel_attention

if TYPE_CHECKING:
    import gradio as gr
    import numpy as np

T = TypeVar("T")

DESCRIPTION = """\
Start a web page on this machine: drop an image, compare the result with bicubic interpolation, and click a pixel to see
what it attends to.

examples:
  sparse-sr demo
  sparse-sr demo --weights net_g_latest.pth --port 8000"""
EPILOG = "Only browsers on this machine can open the page, and images stay here. Ctrl+C stops it."

_TILE, _OVERLAP = 256, 32
_CROP = 160
"""Side of the part of the image around a pixel that attention is shown on."""
_ZOOM = 3
"""Side of a pixel of that part on the page, where single pixels would be hard to see."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_weights(parser)
    parser.add_argument("--port", type=int, metavar="N", help="port of the page (default: the first free from 7860)")
    parser.add_argument("--no-browser", dest="browser", action="store_false", help="do not open a browser")


def run(arguments: argparse.Namespace) -> int:
    """Serve the page until interrupted; return the exit status."""
    require("PIL", "numpy", "gradio")
    make_page(load(arguments), str(arguments.weights)).launch(
        server_name="127.0.0.1", server_port=arguments.port, inbrowser=arguments.browser
    )
    return 0


def enlarge(model: Network, pixels: "np.ndarray") -> "tuple[np.ndarray, np.ndarray]":
    """Return an image (h, w, 3) enlarged by bicubic interpolation and by the network.

    Raises:
        ImageError: the network cannot be used for images.
    """
    result = upscale_image(model, Picture(pixels), tile=_TILE, overlap=_OVERLAP, blend=_OVERLAP // 2).pixels
    return imresize(torch.from_numpy(pixels.copy()), size=result.shape[:2]).numpy(), result


def attend(model: Network, pixels: "np.ndarray", x: int, y: int) -> "np.ndarray":
    """Return a picture of what a pixel attends to in the part of the image around it.

    Raises:
        ImageError: the network cannot be used for images.
        ValueError: the network has no attention that can be shown.
    """
    height, width = pixels.shape[:2]
    top = min(max(0, y - _CROP // 2), max(0, height - _CROP))
    left = min(max(0, x - _CROP // 2), max(0, width - _CROP))
    part = Picture(pixels[top : top + _CROP, left : left + _CROP])
    low = network_input(part, model.num_in_ch).to(model.mean.device)
    state = next(iter(attention_states(model, low).values()))
    pixel = (y - top, x - left)
    weights, side = pixel_attention(state, (low.shape[2], low.shape[3]), pixel)
    return attention_picture(weights, side, low, pixel).numpy()


def make_page(model: Network, title: str) -> "gr.Blocks":
    """Return the page for a network."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nothing leaves the machine
    import gradio as gr  # noqa: PLC0415

    def change(pixels):  # type: ignore[no-untyped-def]
        return None if pixels is None else _shown(enlarge, model, pixels)

    def click(pixels, event: gr.SelectData):  # type: ignore[no-untyped-def]
        return _shown(attend, model, pixels, *event.index).repeat(_ZOOM, axis=0).repeat(_ZOOM, axis=1)

    with gr.Blocks(title="sparse_sr_attn") as page:
        gr.Markdown(
            f"# {title}, ×{model.upscale}\nDrop an image. Click a pixel of it to see what it attends to, among the "
            f"{_CROP}×{_CROP} pixels around it."
        )
        with gr.Row():
            image = gr.Image(type="numpy", image_mode="RGB", label="image", sources=["upload", "clipboard"])
            # The button "share" would upload the picture.
            buttons: list[Any] = ["download", "fullscreen"]
            attention = gr.Image(
                label="what the green pixel attends to", interactive=False, format="png", buttons=buttons
            )
        result = gr.ImageSlider(label="bicubic | network", format="png", max_height=900)
        image.change(change, image, result, api_name="upscale")
        image.change(lambda: None, None, attention)  # it was that of the last image
        image.select(click, image, attention)
    return page


def _shown(act: Callable[..., T], *arguments: Any) -> T:
    """Return what `act` returns; the page shows its errors."""
    import gradio as gr  # noqa: PLC0415

    try:
        return act(*arguments)
    except (ImageError, ValueError) as error:
        raise gr.Error(str(error)) from error
