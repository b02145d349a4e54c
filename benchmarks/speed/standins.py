"""Stand-ins for the released codes: the published mathematics, written here, with the costs that the originals have.

They are no part of the library. They exist so that a benchmark has something to be held against where the original may
not be copied, and they keep what makes the originals expensive: softmax as an exponential of scores minus their
log-sum-exp, `gather` on transposed views, copies of neighbouring chunks side by side, weights of all tokens at once;
batch normalisation that is not folded, depthwise convolutions with one-hot kernels, windows by rolling and reshaping.
Whether one is as fast as its original is checked in each run (`docs/benchmarks-method.md`).

Each takes its weights from one of our layers (`of`), so that both compute the same function; they count keys as
published, ours counts each once.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_sr_attn.backbones.elan import ELAN
from sparse_sr_attn.blocks.elab import ELAB
from sparse_sr_attn.functional.window.grid import group_widths
from sparse_sr_attn.layers.batch_norm import ConvNorm
from sparse_sr_attn.layers.gmsa import GMSA, SharedGMSA
from sparse_sr_attn.layers.lcoa import CoA, LCoA
from sparse_sr_attn.layers.nla import NLA
from sparse_sr_attn.layers.nlsa import NLSA
from sparse_sr_attn.layers.shift_conv import LFE, ShiftConv2d

_EPS = 5e-5
"""Shortest length by which a key is divided."""


def _rows(x: Tensor) -> Tensor:
    """Return a map as rows: a transposed view, as published."""
    return x.flatten(2).transpose(1, 2)


def _select(rows: Tensor, index: Tensor) -> Tensor:
    """Return the rows (b, n, c) at `index` (b, m)."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))


def _chunks(rows: Tensor, chunk_size: int) -> Tensor:
    """Cut rows (..., n, c) into chunks (..., k, i, c); the last rows are repeated to fill the last chunk."""
    padding = -rows.shape[-2] % chunk_size
    if padding:
        rows = torch.cat([rows, rows[..., -padding:, :]], dim=-2)
    return rows.unflatten(-2, (-1, chunk_size))


def _with_neighbours(chunks: Tensor) -> Tensor:
    """Return each chunk (..., k, i, c) with the previous and the next one, in a ring: (..., k, 3i, c)."""
    return torch.cat([chunks, chunks.roll(1, dims=-3), chunks.roll(-1, dims=-3)], dim=-2)


def _log_softmax_parts(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the softmax of scores as published, and the log-sum-exp of each row."""
    lse = torch.logsumexp(scores, dim=-1, keepdim=True)
    return torch.exp(scores - lse), lse


def _embedding(layer: nn.Conv2d | ShiftConv2d) -> nn.Conv2d:
    """Return a convolution with a copy of the weights, which is none of our classes."""
    _, width, *size = layer.weight.shape
    conv = nn.Conv2d(width, len(layer.weight), size, padding=[side // 2 for side in size]).to(layer.weight)  # type: ignore[arg-type]
    conv.load_state_dict(layer.state_dict())
    return conv


# --- dense attention --------------------------------------------------------------------------------------------------


class DenseSDPA(nn.Module):
    """Dense attention by torch's `scaled_dot_product_attention`: what any sparse one has to beat.

    Args:
        layer: whose weights are taken.
    """

    def __init__(self, layer: NLA) -> None:
        super().__init__()
        self.embed, self.value = _embedding(layer.embed), _embedding(layer.value)
        self.res_scale = layer.res_scale

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` plus what it attends to."""
        query, value = _rows(self.embed(x)), _rows(self.value(x))
        key = F.normalize(query, dim=-1, eps=_EPS)
        # The fused kernel of the CPU wants queries as wide as values; else it stores all weights.
        width = max(query.shape[-1], value.shape[-1])
        q, k, v = (F.pad(rows, (0, width - rows.shape[-1])).contiguous()[:, None] for rows in (query, key, value))
        attended = F.scaled_dot_product_attention(q, k, v, scale=1.0)[:, 0, :, : value.shape[-1]]
        return x + self.res_scale * attended.transpose(1, 2).reshape(x.shape)


# --- LCoA -------------------------------------------------------------------------------------------------------------


class PlainState(NamedTuple):
    """What the released LSP hands on: the order of the tokens, its inverse, and the weights of all."""

    order: Tensor
    inverse: Tensor
    weights: Tensor


class PlainCoA(nn.Module):
    """The released CoA, without the query convolution that it never uses.

    Args:
        layer: whose weights are taken.
    """

    def __init__(self, layer: CoA) -> None:
        super().__init__()
        self.value = _embedding(layer.value)
        self.res_scale = layer.res_scale

    def forward(self, x: Tensor, state: PlainState) -> Tensor:
        """Return `x` plus the values that the state's weights gather."""
        values = _with_neighbours(_chunks(_select(_rows(self.value(x)), state.order), state.weights.shape[-2]))
        attended = torch.einsum("bkij,bkjc->bkic", state.weights, values)
        rows = _select(attended.flatten(1, 2), state.inverse)
        return x + self.res_scale * rows.transpose(1, 2).reshape(x.shape)


class PlainLCoA(nn.Module):
    """The released LSP followed by a value: one embedding, k-means, chunks of sorted tokens, weights stored.

    In training it computes the sums of its clusters and their moving average, and drops them, as published.

    Args:
        layer: whose weights are taken.
    """

    centroids: Tensor

    def __init__(self, layer: LCoA) -> None:
        super().__init__()
        self.chunk_size = layer.lsp.chunk_size
        self.embed = _embedding(layer.lsp.embed)
        self.coa = PlainCoA(layer.coa)
        self.register_buffer("centroids", layer.lsp.centroids.clone())

    def attend(self, x: Tensor) -> PlainState:
        """Return the order of the tokens and the weights of all."""
        rows = _rows(self.embed(x))
        order = self.assign(rows.detach()).argsort(dim=-1, stable=True)
        inverse = order.argsort(dim=-1)
        query = _chunks(_select(rows, order), self.chunk_size)
        key = _with_neighbours(F.normalize(query, dim=-1, eps=_EPS))
        weights, _ = _log_softmax_parts(torch.einsum("bkid,bkjd->bkij", query, key))
        return PlainState(order, inverse, weights)

    def assign(self, rows: Tensor) -> Tensor:
        """Return the cluster of each row."""
        directions = F.normalize(rows, dim=-1)
        assignment = torch.einsum("bnd,kd->bnk", directions, self.centroids).argmax(dim=-1)
        if self.training:
            batch, _, width = rows.shape
            sums = rows.new_zeros(batch, len(self.centroids), width)
            sums.scatter_add_(1, assignment[..., None].expand_as(rows), directions)
            0.999 * self.centroids + 0.001 * F.normalize(sums.sum(dim=0), dim=-1)
        return assignment

    def forward(self, x: Tensor, state: PlainState | None = None) -> Tensor:
        """Return `x` plus what it attends to."""
        return self.coa(x, self.attend(x) if state is None else state)


# --- NLSA -------------------------------------------------------------------------------------------------------------


class PlainNLSA(nn.Module):
    """NLSA as published: all hashes in one long sequence, which is sorted, gathered and attended to as a whole.

    Args:
        layer: whose weights are taken.
        redraw: draw new hashes in every forward, as published; else take those of the layer.
    """

    rotations: Tensor

    def __init__(self, layer: NLSA, *, redraw: bool = True) -> None:
        super().__init__()
        self.chunk_size, self.res_scale, self.redraw = layer.chunk_size, layer.res_scale, redraw
        self.embed, self.value = _embedding(layer.embed), _embedding(layer.value)
        self.register_buffer("rotations", layer.rotations.clone())

    def hashes(self, rows: Tensor) -> Tensor:
        """Return the bucket of each row in each round (b, r, n), buckets of later rounds counting on."""
        num_rounds, half, width = self.rotations.shape
        num_chunks = rows.shape[1] // self.chunk_size
        num_buckets = max(2, min(num_chunks + num_chunks % 2, 2 * half))
        if self.redraw:
            rotations = torch.randn(num_rounds, num_buckets // 2, width, dtype=rows.dtype, device=rows.device)
        else:
            rotations = self.rotations[:, : num_buckets // 2]
        along = torch.einsum("bnd,rmd->brnm", rows, rotations)
        buckets: Tensor = torch.cat([along, -along], dim=-1).argmax(dim=-1)
        return buckets + num_buckets * torch.arange(num_rounds, device=rows.device)[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` plus what it attends to."""
        num_rounds = self.rotations.shape[0]
        rows, values = _rows(self.embed(x)), _rows(self.value(x))
        num_tokens = rows.shape[1]
        order = self.hashes(rows.detach()).flatten(1).argsort(dim=-1, stable=True)
        inverse = order.argsort(dim=-1)
        token = order % num_tokens
        query = _chunks(_select(rows, token).unflatten(1, (num_rounds, -1)), self.chunk_size)
        value = _chunks(_select(values, token).unflatten(1, (num_rounds, -1)), self.chunk_size)
        key = _with_neighbours(F.normalize(query, dim=-1, eps=_EPS))
        weights, lse = _log_softmax_parts(torch.einsum("brkid,brkjd->brkij", query, key))
        attended = torch.einsum("brkij,brkjc->brkic", weights, _with_neighbours(value))
        each, share = (
            _select(part.flatten(2, 3)[:, :, :num_tokens].flatten(1, 2), inverse).unflatten(1, (num_rounds, -1))
            for part in (attended, lse)
        )
        merged: Tensor = (each * share.softmax(dim=1)).sum(dim=1)
        return x + self.res_scale * merged.transpose(1, 2).reshape(x.shape)


# --- ELAN -------------------------------------------------------------------------------------------------------------


class PlainShiftConv2d(nn.Module):
    """Shift convolution as published: a depthwise 3x3 convolution with frozen one-hot kernels, then a 1x1 one.

    Args:
        layer: whose weights are taken.
    """

    def __init__(self, layer: ShiftConv2d | nn.Conv2d) -> None:
        super().__init__()
        channels = layer.in_channels
        share = channels // 5
        kernels = torch.zeros(channels, 1, 3, 3)
        for index, (row, column) in enumerate(((1, 2), (1, 0), (2, 1), (0, 1))):
            kernels[index * share : (index + 1) * share, 0, row, column] = 1
        kernels[4 * share :, 0, 1, 1] = 1
        self.kernels = nn.Parameter(kernels, requires_grad=False)
        self.conv = _embedding(layer)

    def forward(self, x: Tensor) -> Tensor:
        """Return the map."""
        return self.conv(F.conv2d(x, self.kernels, padding=1, groups=x.shape[1]))


class PlainLFE(nn.Module):
    """Two shift convolutions as published, with a ReLU between.

    Args:
        layer: whose weights are taken.
    """

    def __init__(self, layer: LFE) -> None:
        super().__init__()
        self.conv1, self.conv2 = PlainShiftConv2d(layer.conv1), PlainShiftConv2d(layer.conv2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the map."""
        return self.conv2(F.relu(self.conv1(x)))


def _project(layers: Sequence[ConvNorm], channels: Tensor) -> nn.Sequential:
    """Return one convolution and normalisation for the output channels of several, in the order of `channels`."""
    width = layers[0].conv.in_channels
    conv, norm = nn.Conv2d(width, len(channels), 1), nn.BatchNorm2d(len(channels))
    both = nn.Sequential(conv, norm).to(layers[0].conv.weight)

    def joined(values: Sequence[Tensor]) -> Tensor:
        return torch.cat([value.detach() for value in values])[channels]

    conv.load_state_dict(
        {
            "weight": joined([layer.conv.weight for layer in layers]),
            "bias": joined([cast(Tensor, layer.conv.bias) for layer in layers]),
        }
    )
    names = ("weight", "bias", "running_mean", "running_var")
    norm.load_state_dict(
        {
            **{name: joined([getattr(layer.norm, name) for layer in layers]) for name in names},
            "num_batches_tracked": layers[0].norm.num_batches_tracked,
        }
    )
    return both


def _to_windows(x: Tensor, size: int, shift: bool) -> Tensor:
    """Roll a map and cut it into windows (windows, pixels, channels)."""
    if shift:
        x = torch.roll(x, shifts=(-(size // 2), -(size // 2)), dims=(2, 3))
    b, c, h, w = x.shape
    x = x.view(b, c, h // size, size, w // size, size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(-1, size * size, c)


def _from_windows(windows: Tensor, x: Tensor, size: int, shift: bool) -> Tensor:
    """Put windows back into a map of the size of `x`, and roll it back."""
    b, _, h, w = x.shape
    c = windows.shape[-1]
    x = windows.reshape(b, h // size, w // size, size, size, c).permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)
    return torch.roll(x, shifts=(size // 2, size // 2), dims=(2, 3)) if shift else x


class PlainSharedGMSA(nn.Module):
    """Shared window attention as published.

    Args:
        layer: whose weights are taken.
        window_sizes: of the state; they divide the map.
        shift: of the state.
    """

    def __init__(self, layer: SharedGMSA, window_sizes: Sequence[int], shift: bool) -> None:
        super().__init__()
        self.window_sizes, self.shift, self.res_scale = tuple(window_sizes), shift, layer.res_scale
        self.widths = group_widths(layer.embed_dim, len(self.window_sizes))
        self.project = _project([layer.value], torch.arange(layer.embed_dim))
        self.output = _embedding(layer.output)

    def forward(self, x: Tensor, state: Sequence[Tensor]) -> Tensor:
        """Return `x` plus the values that the state's weights gather."""
        attended = []
        for weights, value, size in zip(
            state, self.project(x).split(self.widths, dim=1), self.window_sizes, strict=True
        ):
            windows = weights @ _to_windows(value, size, self.shift)
            attended.append(_from_windows(windows, x, size, self.shift))
        branch: Tensor = self.output(torch.cat(attended, dim=1))
        return x + self.res_scale * branch


class PlainGMSA(nn.Module):
    """Window attention in groups as published: one projection to queries and values, all weights stored.

    Args:
        layer: whose weights are taken; it must not move odd windows differently from the released code.
    """

    def __init__(self, layer: GMSA) -> None:
        super().__init__()
        self.window_sizes, self.shift = layer.window_sizes, layer.shift
        self.res_scale = layer.shared.res_scale
        self.widths = group_widths(layer.embed_dim, len(self.window_sizes))
        query = torch.arange(layer.embed_dim).split(self.widths)
        both = torch.cat([torch.cat([group, group + layer.embed_dim]) for group in query])
        self.project = _project([layer.query, layer.shared.value], both)
        self.output = _embedding(layer.shared.output)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` plus what it attends to."""
        return self.both(x)[0]

    def attend(self, x: Tensor) -> list[Tensor]:
        """Return the weights."""
        return self.both(x)[1]

    def both(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return `x` plus what it attends to, and the weights."""
        attended, kept = [], []
        groups = self.project(x).split([2 * width for width in self.widths], dim=1)
        for group, size in zip(groups, self.window_sizes, strict=True):
            query, value = _to_windows(group, size, self.shift).chunk(2, dim=-1)
            weights = (query @ query.transpose(-2, -1)).softmax(dim=-1)
            attended.append(_from_windows(weights @ value, x, size, self.shift))
            kept.append(weights)
        branch: Tensor = self.output(torch.cat(attended, dim=1))
        return x + self.res_scale * branch, kept


class PlainELAN(nn.Module):
    """ELAN as published, of the plain pieces above.

    Args:
        network: whose weights are taken.
    """

    mean: Tensor

    def __init__(self, network: ELAN) -> None:
        super().__init__()
        self.upscale, self.img_range, self.multiple = network.upscale, network.img_range, network.multiple
        self.register_buffer("mean", network.mean.clone())
        self.head, self.tail = _embedding(network.conv_first), _embedding(network.conv_last)
        self.lfe, self.attention = nn.ModuleList(), nn.ModuleList()
        for block in cast(Sequence[ELAB], network.body):
            for lfe in block.lfe:
                self.lfe.append(PlainLFE(cast(LFE, lfe)))
            provider, *consumers = cast(Any, block.attention)
            self.attention.append(PlainGMSA(provider))
            for consumer in consumers:
                self.attention.append(PlainSharedGMSA(consumer, provider.window_sizes, provider.shift))

    def forward(self, x: Tensor) -> Tensor:
        """Return the image at `upscale` times the size."""
        height, width = x.shape[-2:]
        right, below = -width % self.multiple, -height % self.multiple
        x = F.pad((x - self.mean) * self.img_range, (0, right, 0, below), mode="reflect")
        first = features = self.head(x)
        state: list[Tensor] = []
        for lfe, attention in zip(self.lfe, self.attention, strict=True):
            features = features + lfe(features)
            if isinstance(attention, PlainGMSA):
                features, state = attention.both(features)
            else:
                features = attention(features, state)
        image = F.pixel_shuffle(self.tail(features + first), self.upscale)
        image = image[..., : self.upscale * height, : self.upscale * width]
        return image / self.img_range + self.mean
