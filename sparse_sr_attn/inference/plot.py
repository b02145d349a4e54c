"""Figures of matplotlib for notebooks and papers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor, nn

from sparse_sr_attn.inference.visualize import (
    attention_entropy,
    attention_picture,
    attention_states,
    cluster_picture,
    pixel_attention,
)
from sparse_sr_attn.states import ClusterAttention

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SIDE = 3.2  # inches
_COLUMNS = 4


def plot_attention(
    model: nn.Module,
    image: Float[Tensor, "*b c h w"],
    *,
    pixel: tuple[int, int] | None = None,
    layers: Sequence[str] | None = None,
) -> "Figure":
    """Plot what a pixel attends to: the image, the clusters of the first LCoA, and one map for each state.

    Needs matplotlib. Layers that share a state share a map, drawn by `attention_picture`.

    Args:
        model: a network whose layers have states: an LCoAN, an ELAN, an EDSR with LCoA or GMSA, or your own.
        image: values in 0..1, `(c, h, w)` or `(1, c, h, w)`.
        pixel: (row, column) in `image`; by default the middle.
        layers: names of the layers to draw; by default all that have states.

    Returns:
        A figure; `figure.savefig("attention.png")` writes it.

    Raises:
        ValueError: no layer of `model` has a state, a layer of `layers` has none, or `pixel` is outside the image.
        ShapeError: `image` is not a single image.

    Examples:
        >>> figure = plot_attention(load_model("LCoAN-light_x2"), torch.rand(3, 24, 32), pixel=(10, 20))
        >>> [axes.get_title() for axes in figure.axes][:2]
        ['image', 'clusters']
    """
    from matplotlib.figure import Figure  # noqa: PLC0415

    height, width = image.shape[-2:]
    row, column = (height // 2, width // 2) if pixel is None else pixel
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(f"pixel must lie in the image, 0..{height - 1} and 0..{width - 1}, got {(row, column)}")
    states = attention_states(model, image)
    if unknown := [name for name in layers or () if name not in states]:
        raise ValueError(
            f"layers must compute or reuse a state, got {', '.join(unknown)} (layers that do: {', '.join(states)})"
        )
    readers: dict[int, list[str]] = {}
    for name in states if layers is None else layers:
        readers.setdefault(id(states[name]), []).append(name)
    panels: list[tuple[str, Tensor, str | None]] = [
        ("image", image.reshape(-1, height, width).permute(1, 2, 0).clamp(0, 1).float().cpu(), "grey")
    ]
    for names in readers.values():
        state = states[names[0]]
        if isinstance(state, ClusterAttention):
            panels.append(("clusters", cluster_picture(model.get_submodule(names[0]), state), None))
            break
    for names in readers.values():
        state = states[names[0]]
        weights, side = pixel_attention(state, (height, width), (row, column))
        picture = attention_picture(weights.float(), side, image, (row, column))
        title = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        panels.append((f"{title}\nentropy {attention_entropy(state):.2f}", picture, None))
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    size = (_SIDE * columns, rows * (_SIDE * height / width + 0.6))
    figure = Figure(figsize=size, layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (title, picture, colours) in zip(places, panels, strict=False):
        axes.imshow(picture.numpy(), cmap=colours, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
        axes.plot(column, row, "+", color="lime", markersize=12, markeredgewidth=2)
        axes.set_title(title, fontsize="medium")
    for axes in figure.axes:
        axes.set_axis_off()
    return figure
