"""The range of images that a network was trained in, as far as its weights show it."""

import torch
from torch import nn
from torch.nn import functional as F

from sparse_sr_attn.backbones.trunks import evaluating

RANGES = (1.0, 255.0)
"""What `img_range` is in practice."""

_CLOSE = 0.1  # distance of images at which a network may count as trained


def distances(network: nn.Module) -> dict[float, float]:
    """Return how far off a network is at its own `img_range` and at the usual ones.

    A trained network returns a larger version of its input. So a small image is compared with the output, made as
    small as the input. Weights of range 255 at range 1 are far off, because their biases count 255 times as much.

    Args:
        network: a network with an `img_range`, which is restored.

    Returns:
        Root mean square of the difference, by range; images are in 0..1.
    """
    ours = float(network.img_range)  # type: ignore[arg-type]
    weight = next(network.parameters())
    channels = next((m.in_channels for m in network.modules() if isinstance(m, nn.Conv2d)), 3)
    image = torch.rand(1, channels, 5, 5, generator=torch.Generator().manual_seed(0)).to(weight)
    image = F.interpolate(image, size=24, mode="bicubic").clamp(0, 1)
    found: dict[float, float] = {}
    with evaluating(network):
        try:
            for img_range in dict.fromkeys((ours, *RANGES)):
                network.img_range = img_range  # type: ignore[assignment]
                output = F.interpolate(network(image), size=image.shape[-2:], mode="area")
                found[img_range] = float((output - image).square().mean().sqrt())
        finally:
            network.img_range = ours  # type: ignore[assignment]
    return found


def best_range(found: dict[float, float]) -> float | None:
    """Return the range at which a network is closest, or `None` if it does not seem trained for any."""
    best = min(found, key=lambda img_range: found[img_range])
    return best if found[best] < _CLOSE else None
