"""Pictures of what a network has learnt: which cluster each pixel belongs to."""

import math

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from sparse_sr_attn.errors import ShapeError
from sparse_sr_attn.functional.kmeans import assign
from sparse_sr_attn.layers.lcoa import LSP

_GOLDEN = 0.6180339887498949


def cluster_map(model: nn.Module, image: Float[Tensor, "*b c h w"]) -> Int[Tensor, "h2 w2"]:
    """The k-means cluster of each token of `image`, as the first LSP that `model` runs sees it.

    Args:
        model: a network with an LSP in it: an LCoAN, an EDSR with LCoA, or one of your own. It is run as in evaluation
            and left as it was: neither its mode nor its centroids change.
        image: what the model takes: one image `(c, h, w)` or a batch of one, `(1, c, h, w)`.

    Returns:
        A cluster number in `0..num_clusters - 1` for each pixel of the feature map: that of the low-resolution image
        in networks that upscale at their end.

    Raises:
        ValueError: `model` has no LSP, or its forward reaches none.
        ShapeError: `image` is not one image.
    """
    batch = image[None] if image.dim() == 3 else image
    if batch.dim() != 4 or len(batch) != 1:
        raise ShapeError(f"image must be one image, (c, h, w) or (1, c, h, w), got shape {tuple(image.shape)}")
    patterns = [module for module in model.modules() if isinstance(module, LSP)]
    if not patterns:
        raise ValueError(
            f"a cluster map needs a network with an LSP (LCoA has one), but {type(model).__name__} has none; "
            "build it with attention, e.g. EDSR(attention={'type': 'LCoA', 'every': 4})"
        )
    maps: list[Tensor] = []

    def note(pattern: LSP, embedding: Tensor) -> None:
        if not maps:
            tokens = embedding.flatten(2).transpose(1, 2)
            maps.append(assign(tokens, pattern.centroids).view(embedding.shape[-2:]))

    hooks = [
        # One hook each, and `pattern` bound as a default: a closure would see the last of them only.
        pattern.embed.register_forward_hook(lambda _, __, output, pattern=pattern: note(pattern, output))
        for pattern in patterns
    ]
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            model(batch)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    if not maps:
        raise ValueError(f"{type(model).__name__} has an LSP, but its forward does not reach it")
    return maps[0]


def palette(num_clusters: int) -> UInt8[Tensor, "k 3"]:
    """Colours (RGB) that differ between neighbours in number; the same in every run and on every machine.

    The hue turns by the golden ratio from each to the next, so that any first few are spread evenly, while saturation
    and brightness take turns.

    Args:
        num_clusters: colours wanted, `>= 1`.

    Raises:
        ValueError: `num_clusters < 1`.
    """
    if num_clusters < 1:
        raise ValueError(f"num_clusters must be >= 1, got {num_clusters}")
    index = torch.arange(num_clusters, dtype=torch.float64)
    return _rgb((index * _GOLDEN) % 1, 0.85 - 0.2 * (index % 3), 1.0 - 0.2 * (index // 3 % 3))


def kinship_palette(centroids: Float[Tensor, "k d"], counts: Int[Tensor, "k"] | None = None) -> UInt8[Tensor, "k 3"]:
    """Colours (RGB) that are alike where centroids are alike, so that a map shows more than borders.

    The plane of the two main components of the centroids becomes the circle of hues, the distance from its centre
    saturation, and the third component brightness, each spread evenly.

    Args:
        centroids: those of an `LSP`, one row a cluster.
        counts: how many pixels each cluster has, to spread the colours evenly over a picture instead of over the
            clusters: `torch.bincount(clusters.flatten(), minlength=len(centroids))`.

    Raises:
        ShapeError: `centroids` is no matrix with at least one row and one column, or `counts` is not one number a row.
        ValueError: `counts` has a negative number, or nothing else than zeros.
    """
    if centroids.dim() != 2 or 0 in centroids.shape:
        raise ShapeError(f"centroids must be (k >= 1, d >= 1), got shape {tuple(centroids.shape)}")
    if counts is None:
        counts = torch.ones(len(centroids), dtype=torch.int64)
    if counts.shape != centroids.shape[:1]:
        raise ShapeError(
            f"counts must be one number for each of {len(centroids)} rows, got shape {tuple(counts.shape)}"
        )
    if int(counts.min()) < 0 or int(counts.max()) == 0:
        raise ValueError(f"counts must be >= 0 and not all 0, got {counts.tolist()}")
    weights = counts.detach().to("cpu", torch.float64)
    weights = weights / weights.sum()
    points = centroids.detach().to("cpu", torch.float64)
    points = points - weights @ points
    directions = torch.linalg.svd(weights.sqrt()[:, None] * points, full_matrices=False).Vh[:3]
    # The sign of a singular vector is the library's whim; the largest entry shall be positive.
    directions = directions * directions.gather(1, directions.abs().argmax(dim=1, keepdim=True)).sign()
    x, y, z = torch.nn.functional.pad(points @ directions.T, (0, 3 - len(directions))).unbind(dim=1)
    angle = torch.atan2(y, x) / (2 * math.pi) % 1
    hue = (angle + _spread(angle, weights)) / 2
    return _rgb(hue, 0.55 + 0.4 * _spread(torch.hypot(x, y), weights), 0.55 + 0.45 * _spread(z, weights))


def _spread(values: Float[Tensor, "k"], weights: Float[Tensor, "k"]) -> Float[Tensor, "k"]:
    """The share of all weight that lies at lower values, from 0 to 1."""
    order = values.argsort(stable=True)
    below = weights[order].cumsum(0) - weights[order] / 2
    return torch.empty_like(values).scatter_(0, order, below.clamp(0, 1))


def _rgb(
    hue: Float[Tensor, "k"], saturation: Float[Tensor, "k"], brightness: Float[Tensor, "k"]
) -> UInt8[Tensor, "k 3"]:
    # Each channel is a trapezium over the circle of hues; the three are a third of the circle apart.
    turns = (hue[:, None] * 6 + torch.tensor([5.0, 3.0, 1.0], dtype=torch.float64)) % 6
    lack = torch.minimum(turns, 4 - turns).clamp(0, 1)
    return (255 * brightness[:, None] * (1 - saturation[:, None] * lack)).round().to(torch.uint8)


def colour_map(clusters: Int[Tensor, "h w"], colours: UInt8[Tensor, "k 3"] | None = None) -> UInt8[Tensor, "h w 3"]:
    """Paint each cluster in a colour of its own.

    Args:
        clusters: from `cluster_map`.
        colours: RGB of each cluster; `palette` of as many as needed if not given.

    Returns:
        A picture with channels last, as image files have it.

    Raises:
        ShapeError: `clusters` is not a map, or there are fewer colours than clusters.
    """
    if clusters.dim() != 2 or 0 in clusters.shape:
        raise ShapeError(f"clusters must be a map (h, w) with no empty axis, got shape {tuple(clusters.shape)}")
    needed = int(clusters.max()) + 1
    if colours is None:
        colours = palette(needed).to(clusters.device)
    if colours.dim() != 2 or colours.shape[1] != 3 or len(colours) < needed:
        raise ShapeError(f"colours must be (k, 3) with k >= {needed} clusters, got shape {tuple(colours.shape)}")
    return colours[clusters]
