"""Draw the pictures of README.md and docs/concepts.md with the library itself, on photographs from scikit-image.

python docs/draw.py [--output FOLDER]

README.md shows included weights, which never saw these photographs. For docs/concepts.md no network is trained: the
features are colours and random convolutions of colours; only k-means is fitted.
"""

import argparse
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch, FancyBboxPatch, Rectangle
from PIL import Image
from skimage import data
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_sr_attn import EDSR, GMSA, NLA, LCoA, load_model
from sparse_sr_attn.backbones.base import Network
from sparse_sr_attn.data.images import Picture
from sparse_sr_attn.data.imresize import crop_to_multiple, imresize, matlab_bicubic
from sparse_sr_attn.data.metrics import luma, score
from sparse_sr_attn.functional.cluster.layout import ClusterLayout
from sparse_sr_attn.functional.shift import shift2d
from sparse_sr_attn.inference.evaluate import attention_off
from sparse_sr_attn.inference.upscale import upscale_image
from sparse_sr_attn.inference.visualize import (
    attention_map_of,
    attention_states,
    heatmap,
    pixel_attention,
    similarity_palette,
)
from sparse_sr_attn.states import ClusterPattern

CHANNELS = 16
AMBER = torch.tensor([255.0, 170.0, 0.0])
RED, BLUE, GREY = "#e03131", "#1c5d99", "#868e96"


def photograph(shrink: int = 3) -> Tensor:
    """The cat of scikit-image, `(1, 3, h, w)` in 0..1, a token a pixel."""
    pixels = torch.from_numpy(data.chelsea().copy()).permute(2, 0, 1)[None].float() / 255
    return F.avg_pool2d(pixels, shrink)


def features(image: Tensor) -> Tensor:
    """What stands for a network's features: random convolutions of the colours."""
    torch.manual_seed(3)
    x = nn.Conv2d(3, CHANNELS, 5, padding=2, padding_mode="reflect")(image - image.mean(dim=(2, 3), keepdim=True))
    return (x / x.std()).detach()


def learnt_layer(x: Tensor, *, num_clusters: int, chunk_size: int) -> LCoA:
    """A layer whose centroids have moved over `x` until they rest; nothing else in it has learnt."""
    torch.manual_seed(0)
    layer = LCoA(CHANNELS, num_clusters=num_clusters, chunk_size=chunk_size, reduction=1, ema_decay=0.9)
    with torch.no_grad():
        nn.init.dirac_(layer.lsp.embed.weight)  # the embedding is the features, six times as long: sharper weights
        layer.lsp.embed.weight.mul_(6)
        nn.init.zeros_(layer.lsp.embed.bias)
        for _ in range(100):
            layer(x)
    return layer.eval()


WEIGHTS = "EDSR-LCoA_x2"
DETAIL = 64  # side in high-resolution pixels


def draw_upscaled() -> Figure:
    """Details of photographs upscaled with attention, without it and by bicubic, and what one pixel attends to."""
    model = load_model(WEIGHTS).eval()
    rows = (("rocket", data.rocket(), (304, 16), (356, 42)), ("page", data.page(), (48, 240), (76, 266)))
    figure, axes = plt.subplots(
        len(rows), 6, figsize=(15, 5.6), layout="constrained", width_ratios=(1.5,) * 2 + (1,) * 4
    )
    for line, (name, pixels, corner, pixel) in zip(axes, rows, strict=True):
        high = torch.from_numpy(pixels.copy())
        high = crop_to_multiple(high if high.dim() == 3 else high[..., None].expand(-1, -1, 3).contiguous(), 2)
        low = matlab_bicubic(high, 2)
        with_attention = enlarged(model, low)
        with attention_off(model):
            without = enlarged(model, low)
        square = {"xy": (corner[1], corner[0]), "width": DETAIL, "height": DETAIL}
        show(line[0], high, name)
        line[0].add_patch(Rectangle(**square, fill=False, edgecolor=RED, linewidth=2.5))
        image = low.permute(2, 0, 1)[None].float() / 255
        token = (pixel[0] // 2, pixel[1] // 2)
        weights, _ = pixel_attention(next(iter(attention_states(model, image).values())), low.shape[:2], token)
        weights = F.max_pool2d(weights[None], 3, stride=1, padding=1)[0]  # single pixels would hardly show
        show(line[1], glowing(image * 0.8, weights), "what one pixel attends to")
        line[1].plot(
            token[1], token[0], marker="o", markersize=9, markerfacecolor="none", markeredgecolor="#22b8cf", mew=2
        )
        pictures = {"bicubic": imresize(low, scale=2), "attention off": without, "with attention": with_attention}
        for axis, (title, picture) in zip(line[2:], pictures.items(), strict=False):
            psnr = score(luma(picture), luma(high), border=2).psnr
            show(axis, detail(picture, corner), f"{title}\n{psnr:.2f} dB")
        show(line[5], detail(high, corner), "high resolution\n")
    for axis in axes.flat:
        axis.title.set_fontsize(13)
    return figure


def enlarged(model: Network, low: Tensor) -> Tensor:
    return torch.from_numpy(upscale_image(model, Picture(low.numpy()), tile=max(low.shape), overlap=0).pixels)


def detail(picture: Tensor, corner: tuple[int, int]) -> Tensor:
    top, left = corner
    return picture[top : top + DETAIL, left : left + DETAIL]


def draw_clusters() -> Figure:
    """A photograph, its clusters, and the pixels of one of them."""
    image = photograph()
    x = features(image)
    layer = learnt_layer(x, num_clusters=32, chunk_size=144)
    clusters = layer.attend(x).pattern.assignment.view(x.shape[-2:])
    counts = torch.bincount(clusters.flatten(), minlength=32)
    light = image[0].mean(0)[..., None]
    eye = clusters[37, 62]  # a pixel in the cat's eye
    one = torch.where((clusters == eye)[..., None], AMBER, 255 * (0.1 + 0.5 * light))
    painted = similarity_palette(layer.lsp.centroids, counts)[clusters] * (0.45 + 0.55 * light)
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.05), layout="constrained")
    show(axes[0], as_picture(image), f"{x.shape[2] * x.shape[3]:,} tokens")
    show(axes[1], painted.byte(), "32 clusters")
    show(axes[2], one.byte(), "one of them")
    return figure


def small_pattern() -> tuple[Tensor, ClusterPattern, Tensor, LCoA, Tensor]:
    """A photograph of 16x24 pixels, its pattern in chunks of 48 slots, and the colour of each cluster."""
    image = F.adaptive_avg_pool2d(photograph(), (16, 24))
    x = features(image)
    layer = learnt_layer(x, num_clusters=8, chunk_size=48)
    pattern = layer.attend(x).pattern
    counts = torch.bincount(pattern.assignment[0], minlength=8)
    return image, pattern, similarity_palette(layer.lsp.centroids, counts), layer, x


def draw_chunks() -> Figure:
    """Tokens in image order, sorted by cluster, and cut into chunks; what one chunk sees."""
    image, pattern, colours, _, _ = small_pattern()
    layout = ClusterLayout.of(pattern)
    tokens = as_picture(image).reshape(-1, 3)
    order, assignment = pattern.order[0], pattern.assignment[0]
    rows = [
        ("tokens in image order ...", tokens, colours[assignment]),
        ("... sorted by cluster: a place is a slot", tokens[order], colours[assignment[order]]),
    ]
    figure, axes = plt.subplots(3, 1, figsize=(12, 5.2), layout="constrained", height_ratios=(1, 1, 1.15))
    for axis, (title, pixels, cluster) in zip(axes, rows, strict=False):
        axis.imshow(torch.stack([pixels, cluster]).numpy(), aspect="auto", interpolation="nearest")
        axis.set_title(title, fontsize=21, loc="left")
        axis.set_yticks([0, 1], ["pixel", "cluster"], fontsize=18)
        axis.set_xticks([])
    draw_ring(axes[2], colours[assignment[order]], layout, chunk=3)
    return figure


def draw_ring(axis: Axes, cluster: Tensor, layout: ClusterLayout, chunk: int) -> None:
    """The sorted tokens in chunks, apart from each other, and an arrow from one to each that it sees."""
    gap, size = 6, layout.chunk_size
    for index, part in enumerate(cluster.split(size)):
        left = index * (size + gap)
        seen = abs(index - chunk) <= layout.num_adjacent
        axis.imshow(part[None].numpy(), extent=(left, left + size, 0, 1), aspect="auto", alpha=1.0 if seen else 0.3)
        edge, width = (RED, 3) if index == chunk else (BLUE, 3) if seen else (GREY, 1)
        axis.add_patch(Rectangle((left, 0), size, 1, fill=False, edgecolor=edge, linewidth=width))
        if seen and index != chunk:
            start, end = chunk * (size + gap) + size / 2, left + size / 2
            arrow = ConnectionPatch(
                (start, 1.05), (end, 1.05), "data", "data", axesA=axis, axesB=axis, arrowstyle="-|>", mutation_scale=18,
                connectionstyle=f"arc3,rad={0.35 if end < start else -0.35}", color=BLUE, linewidth=2,
            )  # fmt: skip
            axis.add_artist(arrow)
    axis.set(xlim=(-gap, layout.num_chunks * (size + gap)), ylim=(-0.1, 1.75))
    axis.set_title(f"chunks of {size} slots: each sees its own and the two beside it", fontsize=21, loc="left")
    axis.set_axis_off()


def draw_matrix() -> Figure:
    """Who attends to whom: dense, and the pattern in image order and in the order of the slots."""
    _, pattern, _, layer, x = small_pattern()
    order = pattern.order[0]
    n = order.numel()
    with torch.no_grad():
        sparse = attention_map_of(layer.attend(x), torch.arange(n)).flatten(1)
        rows = layer.lsp.route(x)[0][0]
        dense = (rows @ F.normalize(rows, dim=1).T).softmax(dim=1)
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.4), layout="constrained")
    titles = ("dense attention", "the pattern", "the same, by slot")
    for axis, matrix, title in zip(axes, (dense, sparse, sparse[order][:, order]), titles, strict=True):
        show(axis, heatmap(matrix.clamp(max=float(sparse.quantile(0.98))) ** 0.6 + 0.12 * (matrix > 0)), title)
    share = float((sparse > 0).float().mean())
    figure.supxlabel(f"{n} by {n} pairs of tokens; the pattern keeps {share:.0%} of them", fontsize=19)
    return figure


def draw_attention() -> Figure:
    """Where one pixel may look, and does: densely, by LCoA and by windows."""
    image = photograph()
    x = features(image)
    height, width = x.shape[-2:]
    y, x_of = 44, 78  # on the edge of the other eye
    layer = learnt_layer(x, num_clusters=32, chunk_size=144)
    token = torch.tensor([y * width + x_of])
    with torch.no_grad():
        rows = layer.lsp.route(x)[0][0]
        scores = rows[token] @ F.normalize(rows, dim=1).T
        dense = scores.softmax(dim=1).view(height, width)
        (sparse,) = attention_map_of(layer.attend(x), token)
        windows = GMSA(CHANNELS).eval()
        (near,) = attention_map_of(windows.attend(x), token)
    pictures = {
        f"{type(NLA(CHANNELS)).__name__}: {height * width:,} keys": dense,
        f"LCoA: {int((sparse > 0).sum())} keys, alike": sparse,
        f"GMSA: {int((near > 0).sum())} keys, near": near,
    }
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.1), layout="constrained")
    for axis, (title, weights) in zip(axes, pictures.items(), strict=True):
        show(axis, glowing(image, weights), title)
        axis.plot(x_of, y, marker="o", markersize=13, markerfacecolor="none", markeredgecolor="#22b8cf", mew=2.5)
    return figure


def glowing(image: Tensor, weights: Tensor) -> Tensor:
    """A dark photograph on which the keys of a token are lit: the brighter, the more weight they have."""
    light = 255 * (0.08 + 0.42 * image[0].mean(0))[..., None]
    strength = (weights / weights.flatten().topk(30).values[-1]).clamp(max=1).sqrt()[..., None]
    return (light * (1 - strength) + AMBER * strength).byte()


def draw_sharing() -> Figure:
    """An EDSR with attention after every fourth block: which layers compute, and which read."""
    options = {"type": "LCoA", "every": 4, "share": 4}
    model = EDSR(num_feat=8, num_block=16, upscale=2, img_range=1.0, attention=options)
    names = iter(type(layer).__name__ for layer in model.attention)
    figure, axis = plt.subplots(figsize=(12, 2.7), layout="constrained")
    left, centres = 0.0, []
    for block in range(len(model.body)):
        box(axis, left, 0.8, "#e9ecef", "")
        left += 1
        if (block + 1) % options["every"] == 0:
            name = next(names)
            box(axis, left, 2.1, "#ffd8a8" if name == "LCoA" else "#a5d8ff", name)
            centres.append(left + 1.05)
            left += 2.3
    for reader in centres[1:]:
        axis.add_artist(
            ConnectionPatch(
                (centres[0], 1.05), (reader, 1.1), "data", "data", axesA=axis, axesB=axis, arrowstyle="-|>",
                mutation_scale=20, connectionstyle="arc3,rad=-0.25", color=BLUE, linewidth=2,
            )
        )  # fmt: skip
    axis.text(left / 2 - 1, 2.75, "the state: pattern, weights", fontsize=21, color=BLUE, ha="center", va="center")
    axis.plot((-0.9, left), (0.5, 0.5), color=GREY, zorder=0)
    axis.set(xlim=(-1, left + 0.2), ylim=(-0.1, 3.1))
    axis.set_axis_off()
    return figure


def box(axis: Axes, left: float, width: float, colour: str, text: str) -> None:
    style = "round,pad=0,rounding_size=0.15"
    axis.add_patch(FancyBboxPatch((left, 0), width, 1, boxstyle=style, facecolor=colour, edgecolor="#495057"))
    axis.text(left + width / 2, 0.5, text, ha="center", va="center", fontsize=20)


def draw_windows() -> Figure:
    """What a pixel sees through windows of 4, 8 and 16 pixels, as they stand and moved by half their size."""
    image = photograph()[..., 24:60, 44:80]
    sizes, pixel = (4, 8, 16), (15, 16)
    figure, axes = plt.subplots(1, 2, figsize=(12, 6.2), layout="constrained")
    token = torch.tensor([pixel[0] * image.shape[-1] + pixel[1]])
    for axis, shift in zip(axes, (False, True), strict=True):
        show(axis, (as_picture(image) * 0.75).byte(), "moved by half their size" if shift else "windows as they stand")
        for size, colour in zip(sizes, ("#ffe066", "#22b8cf", "#ff8787"), strict=True):
            layer = GMSA(3, window_sizes=(size,), shift=shift).eval()
            with torch.no_grad():
                (weights,) = attention_map_of(layer.attend(image), token)
            rows, columns = (weights > 0).nonzero(as_tuple=True)
            low, left = float(rows.min()) - 0.5, float(columns.min()) - 0.5
            axis.add_patch(Rectangle((left, low), size, size, fill=False, edgecolor=colour, linewidth=4))
            axis.text(left + size - 0.6, low + 0.4, str(size), color=colour, fontsize=20, ha="right", va="top")
        axis.plot(*reversed(pixel), marker="o", markersize=9, color="white", markeredgecolor="black")
    return figure


def draw_shift() -> Figure:
    """What a shift convolution reads: each fifth of the channels from another neighbour."""
    mark = torch.zeros(1, 5, 5, 5)
    mark[..., 2, 2] = 1
    moved = shift2d(mark)[0]
    names = ("from the right", "from the left", "from below", "from above", "from itself")
    figure, axes = plt.subplots(1, 5, figsize=(12, 2.9), layout="constrained")
    for index, (axis, name) in enumerate(zip(axes, names, strict=True)):
        axis.imshow(moved[index].numpy(), cmap="Blues", vmin=0, vmax=1.3)
        axis.set_xticks(np.arange(-0.5, 5), [])
        axis.set_yticks(np.arange(-0.5, 5), [])
        axis.grid(color="#ced4da")
        axis.tick_params(length=0)
        axis.add_patch(Rectangle((1.5, 1.5), 1, 1, fill=False, edgecolor=RED, linewidth=2.5))
        axis.set_title(name, fontsize=21)
    return figure


def as_picture(image: Tensor) -> Tensor:
    return image[0].permute(1, 2, 0).mul(255).round().byte()


def show(axis: Axes, picture: Tensor, title: str) -> None:
    axis.imshow(picture.numpy(), interpolation="nearest")
    axis.set_title(title, fontsize=22)
    axis.set_axis_off()


PICTURES = {
    "upscaled": draw_upscaled,
    "clusters": draw_clusters,
    "chunks": draw_chunks,
    "matrix": draw_matrix,
    "attention": draw_attention,
    "sharing": draw_sharing,
    "windows": draw_windows,
    "shift": draw_shift,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "-o", "--output", type=Path, default=Path(__file__).parent / "assets" / "pictures", help="folder to write"
    )
    out: Path = parser.parse_args().output
    out.mkdir(parents=True, exist_ok=True)
    mpl.use("Agg")
    for name, draw in PICTURES.items():
        figure = draw()
        figure.get_layout_engine().set(h_pad=0.1)
        figure.savefig(out / f"{name}.png", dpi=100, facecolor="white")
        plt.close(figure)
        if name != "upscaled":  # 256 colours are a third of the bytes, and not enough for photographs
            with Image.open(out / f"{name}.png") as drawn:
                fewer = drawn.convert("RGB").quantize(256)
            fewer.save(out / f"{name}.png", optimize=True)
        print(f"written: {out / name}.png")


if __name__ == "__main__":
    main()
