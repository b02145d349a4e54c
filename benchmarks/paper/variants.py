"""What the papers compare with and the library has no option for, made of the library's parts."""

from collections.abc import Sequence
from typing import Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparse_sr_attn.backbones.base import Network
from sparse_sr_attn.backbones.lcoan import CollaborativeGroup
from sparse_sr_attn.blocks import ELAB
from sparse_sr_attn.functional.window import split_groups, window_attention
from sparse_sr_attn.layers.base import AttentionLayer, check_map, output_proj, reject_state
from sparse_sr_attn.layers.batch_norm import ConvNorm
from sparse_sr_attn.layers.gmsa import GMSA, window_shifts
from sparse_sr_attn.layers.shift_conv import LFE

Norm = Literal["layer", "batch"]


def with_plain_convolutions(model: Network, *, kernel_size: int) -> None:
    """Put ordinary convolutions in place of the shift convolutions of every LFE.

    Args:
        model: an ELAN.
        kernel_size: 1, which does not see neighbours, or 3, which sees as many as a shift convolution (and the corners)
            with nine times its weights.
    """
    for module in list(model.modules()):
        if isinstance(module, ELAB):
            for index, lfe in enumerate(cast(list[LFE], list(module.lfe))):
                first, second = (
                    nn.Conv2d(old.in_channels, old.out_channels, kernel_size, padding=kernel_size // 2)
                    for old in (lfe.conv1, lfe.conv2)
                )
                module.lfe[index] = nn.Sequential(first, nn.ReLU(), second)


def with_standard_attention(model: Network, *, norm: Norm) -> None:
    """Put `StandardWindowAttention` in place of every GMSA of an ELAN whose layers share nothing."""
    for module in list(model.modules()):
        if isinstance(module, ELAB):
            (gmsa,) = module.attention
            if not isinstance(gmsa, GMSA):
                raise TypeError(f"the attention of an ELAB must be a GMSA, got a {type(gmsa).__name__}")
            module.attention[0] = StandardWindowAttention(
                gmsa.embed_dim, window_sizes=gmsa.window_sizes, shift=gmsa.shift, norm=norm
            )


def without_attention(model: Network) -> None:
    """Take the attention out of an ELAN or an LCoAN, and leave all else as it is."""
    for module in list(model.modules()):
        if isinstance(module, ELAB):
            module.attention = nn.ModuleList(NoAttention(cast(GMSA, old).embed_dim) for old in module.attention)
        elif isinstance(module, CollaborativeGroup):
            module.attention = NoAttention(module.conv.in_channels)


class NoAttention(AttentionLayer):
    """Stands where attention stood: returns the map as it is.

    Args:
        embed_dim: channels of the map that stood there.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.embed_dim = embed_dim

    def attend(self, x: Float[Tensor, "b c h w"]) -> None:
        """Return no state."""

    def forward(self, x: Float[Tensor, "b c h w"], state: object = None) -> Float[Tensor, "b c h w"]:
        """Return `x`."""
        return x


class StandardWindowAttention(AttentionLayer):
    r"""Window attention before ELAN accelerates it: $x + \mathrm{conv}(\mathrm{softmax}(Q K^\top / \sqrt d)\,V)$.

    Queries, keys and values are three projections, and nothing is shared. Groups and windows are GMSA's, so that only
    what is asked about differs.

    Args:
        embed_dim: channels, >= 1.
        window_sizes: as in `GMSA`.
        shift: as in `GMSA`; opposite borders meet here, too.
        norm: "layer": layer normalisation before the projections, as transformers have it; "batch": batch normalisation
            after each, which evaluation folds into them.

    Source:
        What arXiv 2203.06697 calls the original self-attention, as in SwinIR, without its position bias and its mask.
    """

    def __init__(
        self, embed_dim: int, *, window_sizes: Sequence[int] = (4, 8, 16), shift: bool = False, norm: Norm = "layer"
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.window_sizes = tuple(window_sizes)
        self.shift = shift
        self.norm = nn.LayerNorm(embed_dim) if norm == "layer" else None
        self.query, self.key, self.value = (
            nn.Conv2d(embed_dim, embed_dim, 1) if norm == "layer" else ConvNorm(embed_dim, embed_dim) for _ in range(3)
        )
        self.output = output_proj(embed_dim, zero_init=False)

    def forward(self, x: Float[Tensor, "b c h w"], state: object = None) -> Float[Tensor, "b c h w"]:
        """Return a map of the same size.

        Raises:
            SharingError: a state is given.
            ShapeError: `x` is not a map of `embed_dim` channels.
        """
        reject_state(self, state)
        check_map(x, self.embed_dim)
        entering = x if self.norm is None else self.norm(x.movedim(1, -1)).movedim(-1, 1)
        num_groups = len(self.window_sizes)
        groups = zip(
            *(split_groups(project(entering), num_groups) for project in (self.query, self.key, self.value)),
            self.window_sizes,
            strict=True,
        )
        attended = []
        for query, key, value, size in groups:
            shift, unshift = window_shifts(size, self.shift, True)
            scale = query.shape[1] ** -0.5
            attended.append(
                window_attention(query, key, value, window_size=size, shift=shift, unshift=unshift, scale=scale)
            )
        branch: Tensor = self.output(torch.cat(attended, dim=1))
        return x + branch
