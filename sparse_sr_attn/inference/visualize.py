"""Visualisations of a network: the cluster of each pixel, and where pixels attend."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sparse_sr_attn.backbones.trunks import evaluating
from sparse_sr_attn.checkpoints.foreign import network_name
from sparse_sr_attn.errors import ShapeError
from sparse_sr_attn.functional.cluster.layout import ClusterLayout
from sparse_sr_attn.functional.window import window_weights
from sparse_sr_attn.functional.window.grid import WindowGrid
from sparse_sr_attn.layers.base import AttentionLayer
from sparse_sr_attn.layers.gmsa import group_queries, window_shifts
from sparse_sr_attn.layers.lcoa import LCoA, weights_of
from sparse_sr_attn.states import ClusterAttention, WindowAttention

_ROWS_AT_A_TIME = 16
_REMEDY = "build it with attention, e.g. EDSR(attention={'type': 'LCoA', 'every': 4})"


def attention_states(model: nn.Module, image: Float[Tensor, "*b c h w"]) -> dict[str, Any]:
    """Return the state of each attention layer of `model` on `image`, in the order in which they run.

    Args:
        model: a network with layers that compute or read a state. It is run in evaluation mode; its mode is restored.
        image: an input of the model: one image `(c, h, w)`, or a batch of one, `(1, c, h, w)`.

    Returns:
        The state of each layer by its name in `model`. Layers that share a state have the same object.

    Raises:
        ValueError: no layer of `model` has a state.
        ShapeError: `image` is not a single image.

    Examples:
        >>> model = EDSR(num_feat=16, num_block=4, attention={"type": "LCoA", "every": 2}, img_range=1.0)
        >>> list(attention_states(model, torch.rand(3, 12, 16)))
        ['attention.0', 'attention.1']
    """
    batch = _one_image(image)
    states: dict[str, Any] = {}

    def note(name: str, layer: AttentionLayer, x: Tensor, state: Any = None) -> None:
        states[name] = layer.attend(x) if state is None else state

    hooks = [
        layer.register_forward_pre_hook(
            lambda layer, args, kwargs, name=name: note(name, layer, *args, **kwargs), with_kwargs=True
        )
        for name, layer in _outermost(model)
    ]
    _run(model, batch, hooks)
    if not states:
        raise ValueError(
            "attention can be shown for layers with a state (LCoA, GMSA, consumers, and layers that set `provides`),"
            f" and {network_name(model)} runs none; {_REMEDY}"
        )
    return states


def attention_map_of(state: ClusterAttention | WindowAttention, tokens: Int[Tensor, "s"]) -> Float[Tensor, "s h w"]:
    """Return the attention of tokens as weights over the whole map.

    Args:
        state: the state of one image, from `attention_states`, `LCoA.attend` or `GMSA.attend`.
        tokens: indices of the tokens in raster order: y * w + x.

    Returns:
        A map for each token, summed over rounds or averaged over window sizes; each sums to 1. With the published
        counting, weights of a key that appears several times are added.

    Raises:
        ShapeError: `state` is of several images, or a token is outside the map.
        TypeError: `state` is neither a ClusterAttention nor a WindowAttention.

    Examples:
        >>> state = LCoA(16, chunk_size=32).attend(torch.rand(1, 16, 12, 16))
        >>> attention_map_of(state, torch.tensor([0, 5 * 16 + 7])).shape  # of the pixels (0, 0) and (5, 7)
        torch.Size([2, 12, 16])
    """
    if not isinstance(state, (ClusterAttention, WindowAttention)):
        raise TypeError(f"state must be a ClusterAttention or a WindowAttention, got a {type(state).__name__}")
    num_images, height, width = state.map_size()
    if num_images != 1:
        raise ShapeError(f"state must be of one image, got one of {num_images}")
    last = height * width - 1
    if tokens.dim() != 1 or (len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) <= last):
        raise ShapeError(f"tokens must be a list of numbers from 0 to {last}, got {tokens.tolist()}")
    look = _in_clusters(state, tokens) if isinstance(state, ClusterAttention) else _in_windows(state, tokens)
    return look.view(-1, height, width)


def _in_clusters(state: ClusterAttention, tokens: Tensor) -> Tensor:
    pattern, layout = state.pattern, ClusterLayout.of(state.pattern)
    every = weights_of(state)
    maps = every.new_zeros(len(tokens), layout.num_tokens)
    key = torch.arange(layout.num_offsets * layout.chunk_size, device=pattern.order.device)
    around = torch.arange(layout.num_chunks, device=key.device)[:, None] + torch.arange(
        -layout.num_adjacent, layout.num_adjacent + 1, device=key.device
    )
    tables = [around % layout.num_chunks] * len(every) if pattern.neighbors is None else pattern.neighbors
    for order, table, weights in zip(pattern.order, tables, every, strict=True):
        slot = order.argsort()[tokens]
        chunk, row = slot // layout.chunk_size, slot % layout.chunk_size
        key_chunk = table[chunk][:, key // layout.chunk_size]
        keys = order[layout.rank(key_chunk * layout.chunk_size + key % layout.chunk_size)]
        maps.scatter_add_(1, keys, weights[chunk, row])
    return maps


def _in_windows(state: WindowAttention, tokens: Tensor) -> Tensor:
    total = torch.zeros((), device=tokens.device)
    for kept, query, size in zip(state.weights, group_queries(state), state.window_sizes, strict=True):
        grid = WindowGrid(state.height, state.width, size)
        shift, _ = window_shifts(size, state.shift, state.exact_shift)
        weights = window_weights(cast(Tensor, query), window_size=size, shift=shift) if kept is None else kept
        slot = grid.slots(shift, weights.device)[tokens]
        window, row = slot // size**2, slot % size**2
        keys = grid.pixels(shift, weights.device).view(-1, size**2)[window]
        maps = weights.new_zeros(len(tokens), state.height * state.width + 1)  # the last one is for pads
        total = total + maps.scatter_(1, keys, weights[0, window, row])[:, :-1]
    return total / len(state.weights)


def attention_entropy(state: ClusterAttention | WindowAttention, *, num_tokens: int = 256) -> float:
    r"""Return the mean normalised entropy of the attention of tokens.

    $$\frac{1}{|S|} \sum_{i \in S} \frac{-\sum_j P(i, j) \log P(i, j)}{\log |\{j : P(i, j) > 0\}|}$$

    Args:
        state: the state of one image, from `attention_states`, `LCoA.attend` or `GMSA.attend`.
        num_tokens: number of pixels $S$ to sample evenly; at most all.

    Returns:
        A number in [0, 1]: 0 if each token attends to a single key, 1 if all keys have equal weight.

    Raises:
        ShapeError: `state` is of several images.
        TypeError: `state` is neither a ClusterAttention nor a WindowAttention.

    Examples:
        >>> state = LCoA(16, chunk_size=32).attend(torch.rand(1, 16, 12, 16))
        >>> 0 <= attention_entropy(state) <= 1
        True
    """
    total = 0.0
    tokens = _spread_tokens(state.height, state.width, num_tokens)
    for some in tokens.to(_device_of(state)).split(_ROWS_AT_A_TIME):
        weights = attention_map_of(state, some).detach().flatten(1).double()
        entropy = -torch.xlogy(weights, weights).sum(dim=1)
        total += float((entropy / (weights > 0).sum(dim=1).clamp(min=2).log()).sum())
    return total / len(tokens)


def _spread_tokens(height: int, width: int, num_tokens: int) -> Tensor:
    last = height * width - 1
    return torch.linspace(0, last, min(num_tokens, last + 1), dtype=torch.float64).round().long()


def _device_of(state: ClusterAttention | WindowAttention) -> torch.device:
    return next(leaf.device for leaf in tree_leaves(state) if isinstance(leaf, Tensor))


def attention_overlap(
    states: Sequence[ClusterAttention | WindowAttention], *, num_tokens: int = 256
) -> Float[Tensor, "l l"]:
    r"""Return the overlap of the attention of each pair of layers.

    $$o_{ab} = \frac{1}{|S|} \sum_{i \in S} \sum_j \min(P_a(i, j), P_b(i, j))$$

    Args:
        states: states of several layers on one image, for maps of equal size.
        num_tokens: number of pixels $S$ to sample evenly; at most all.

    Returns:
        A symmetric matrix with values from 0, for layers without common keys, to 1, for layers with equal attention,
        such as those that share a state. The diagonal is 1.

    Raises:
        ShapeError: there is no state, or their maps differ in size.

    Source:
        Figure 5 of arXiv 2404.04922 asks how similar the attention of different layers is; this measure is the
        library's own.

    Examples:
        >>> x = torch.rand(1, 16, 12, 16)
        >>> attention_overlap([LCoA(16, chunk_size=32).attend(x), GMSA(16).attend(x)]).shape
        torch.Size([2, 2])
    """
    sizes = {(state.height, state.width) for state in states}
    if len(sizes) != 1:
        raise ShapeError(f"layers must have maps of one size, got {sorted(sizes) or 'no layer'}")
    ((height, width),) = sizes
    tokens = _spread_tokens(height, width, num_tokens)
    total = torch.zeros(len(states), len(states), dtype=torch.float64)
    for some in tokens.to(_device_of(states[0])).split(_ROWS_AT_A_TIME):
        maps = [attention_map_of(state, some) for state in states]
        for a, one in enumerate(maps):
            for b, other in enumerate(maps[: a + 1]):
                total[a, b] += torch.minimum(one, other).double().sum().cpu()
    lower = total / len(tokens)
    return lower + lower.tril(-1).T


def heatmap(values: Float[Tensor, "h w"]) -> UInt8[Tensor, "h w 3"]:
    """Map values >= 0 to colours from black over red and yellow to white, white for the largest value.

    Examples:
        >>> heatmap(torch.tensor([[0.0, 1.0]]))
        tensor([[[  0,   0,   0],
                 [255, 255, 255]]], dtype=torch.uint8)
    """
    rising = 3 * values.float() / values.max().clamp(min=1e-12)
    return (255 * torch.stack([rising, rising - 1, rising - 2], dim=-1).clamp(0, 1)).round().to(torch.uint8)


def _one_image(image: Tensor) -> Tensor:
    batch = image[None] if image.dim() == 3 else image
    if batch.dim() != 4 or len(batch) != 1:
        raise ShapeError(f"image must be one image, (c, h, w) or (1, c, h, w), got shape {tuple(image.shape)}")
    return batch


def _run(model: nn.Module, batch: Tensor, hooks: Sequence[Any]) -> None:
    """Run the model in evaluation mode, and remove the hooks."""
    try:
        with evaluating(model):
            model(batch)
    finally:
        for hook in hooks:
            hook.remove()


def _outermost(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, AttentionLayer]]:
    """Yield the layers with a state and their names, except those inside another."""
    for name, child in model.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, AttentionLayer) and (child.provides or child.requires):
            yield path, child
        else:
            yield from _outermost(child, f"{path}.")


def similarity_palette(centroids: Float[Tensor, "k d"], counts: Int[Tensor, "k"] | None = None) -> UInt8[Tensor, "k 3"]:
    """Return RGB colours that are similar for similar centroids.

    In the plane of the first two principal components of the centroids, the angle gives the hue and the distance from
    the centre the saturation. The third component gives the brightness. Each is spread evenly.

    Args:
        centroids: centroids of an `LSP`, one row per cluster.
        counts: number of pixels of each cluster, to spread the colours evenly over a picture instead of the clusters:
            `torch.bincount(clusters.flatten(), minlength=len(centroids))`.

    Raises:
        ShapeError: `centroids` is not a matrix with at least one row and column, or `counts` has not one entry per row.
        ValueError: `counts` has negative entries or only zeros.

    Examples:
        >>> similarity_palette(LSP(64, num_clusters=16).centroids).shape
        torch.Size([16, 3])
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
    """Return the share of the total weight at lower values, from 0 to 1."""
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


def pixel_attention(
    state: ClusterAttention | WindowAttention, size: tuple[int, int], pixel: tuple[int, int]
) -> tuple[Float[Tensor, "h2 w2"], int]:
    """Return the attention of a pixel of an image, and the side of a token in pixels, which is 1 for most networks.

    Args:
        state: from `attention_states` of the image.
        size: height and width of the image.
        pixel: (row, column) in the image.

    Returns:
        The weights of the tokens that the image covers, on the CPU; networks that pad the image have more.

    Examples:
        >>> model = EDSR(num_feat=16, num_block=4, attention={"type": "LCoA", "every": 4}, img_range=1.0)
        >>> states = attention_states(model, torch.rand(3, 12, 16))
        >>> weights, side = pixel_attention(states["attention.0"], (12, 16), (3, 5))
        >>> weights.shape, side
        (torch.Size([12, 16]), 1)
    """
    (height, width), (row, column) = size, pixel
    side = max(1, round(width / state.width))  # some networks work on smaller maps
    token = torch.tensor([row // side * state.width + column // side], device=_device_of(state))
    return attention_map_of(state, token)[0, : -(-height // side), : -(-width // side)].cpu(), side


def attention_picture(
    weights: Float[Tensor, "h2 w2"], side: int, image: Float[Tensor, "*b c h w"], pixel: tuple[int, int]
) -> UInt8[Tensor, "h w 3"]:
    """Draw where a pixel attends to, over a dark copy of the image; the pixel itself is green.

    Args:
        weights: from `pixel_attention`.
        side: likewise.
        image: values in 0..1, one image `(c, h, w)` or `(1, c, h, w)`.
        pixel: (row, column) in `image`.

    Examples:
        >>> model, image = EDSR(num_feat=16, num_block=4, attention={"type": "LCoA", "every": 4}), torch.rand(3, 12, 16)
        >>> weights, side = pixel_attention(attention_states(model, image)["attention.0"], (12, 16), (3, 5))
        >>> attention_picture(weights, side, image, (3, 5)).shape
        torch.Size([12, 16, 3])
    """
    (low,) = _one_image(image)
    _, height, width = low.shape
    roots = weights.sqrt()  # they show weak ones, too
    roots = roots.repeat_interleave(side, 0).repeat_interleave(side, 1)[:height, :width]
    behind = (low.mean(dim=0).clamp(0, 1) * 90).round().to(torch.uint8).cpu()
    colours = torch.maximum(behind[..., None], heatmap(roots))
    colours[pixel] = torch.tensor([0, 255, 0], dtype=torch.uint8)
    return colours


def cluster_picture(layer: nn.Module, state: ClusterAttention) -> UInt8[Tensor, "h w 3"]:
    """Draw the clusters of a state; similar ones have similar colours if `layer` has their centroids, else any.

    Args:
        layer: an LCoA, or a layer that only reads the state.
        state: from `attention_states`, of one image.

    Examples:
        >>> model = EDSR(num_feat=16, num_block=4, attention={"type": "LCoA", "every": 4}, img_range=1.0)
        >>> states = attention_states(model, torch.rand(3, 12, 16))
        >>> cluster_picture(model.get_submodule("attention.0"), states["attention.0"]).shape
        torch.Size([12, 16, 3])
    """
    clusters = state.pattern.assignment[0].view(state.height, state.width).cpu()
    counts = clusters.flatten().bincount()
    if isinstance(layer, LCoA):
        centroids = layer.lsp.centroids.cpu()
        return similarity_palette(centroids, nn.functional.pad(counts, (0, len(centroids) - len(counts))))[clusters]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (len(counts), 3), generator=generator, dtype=torch.uint8)[clusters]
