"""LCoAN: one sparse pattern, learnt in the first group and shared by all."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparse_sr_attn.backbones.base import ResidualNetwork, store_init_args
from sparse_sr_attn.blocks import ResidualBlock
from sparse_sr_attn.blocks.body import maybe_checkpoint
from sparse_sr_attn.blocks.upsample import Upscale
from sparse_sr_attn.config import Finite, Positive, PositiveInt, checked, takes_options_of
from sparse_sr_attn.layers.base import AttentionLayer, warn_of_range
from sparse_sr_attn.layers.lcoa import LSP, LCoA
from sparse_sr_attn.states import ClusterAttention


class CollaborativeGroup(nn.Module):
    r"""Residual blocks, attention, a convolution: $x + \rho\,\mathrm{conv}(\mathrm{attention}(\mathrm{blocks}(x)))$.

    Args:
        num_feat: channels.
        num_block: residual blocks.
        res_scale: $\rho$, factor on the branch.
        attention: an LCoA, or a CoA that reads the state of an earlier group.
    """

    def __init__(self, num_feat: int, num_block: int, res_scale: float, attention: AttentionLayer) -> None:
        super().__init__()
        self.res_scale = res_scale
        self.blocks = nn.Sequential(*(ResidualBlock(num_feat) for _ in range(num_block)))
        self.attention = attention
        self.conv = nn.Conv2d(num_feat, num_feat, 3, padding=1)

    def forward(
        self, x: Float[Tensor, "b c h w"], state: ClusterAttention | None, *, sharing: bool
    ) -> tuple[Float[Tensor, "b c h w"], ClusterAttention | None]:
        """Run the group; return the features and the state for the next group.

        Args:
            x: input features.
            state: the state of an earlier group; `None` for a group that computes its own.
            sharing: whether the next group reads the state.
        """
        branch = self.blocks(x)
        if state is None and sharing:
            state = self.attention.attend(branch)
        branch = self.conv(self.attention(branch, state))
        return torch.add(x, branch, alpha=self.res_scale), state if sharing else None


class LCoAN(ResidualNetwork):
    """Learnable collaborative attention network.

    The defaults are the published sizes with this library's attention; `create_model("LCoAN")` is as published.

    Args:
        num_in_ch: channels of the input image, >= 1.
        num_out_ch: channels of the output image, >= 1.
        num_feat: channels inside, >= 1.
        num_group: residual groups, >= 1.
        num_block: residual blocks in a group, >= 1.
        upscale: factor, one of 2, 3, 4, 8.
        res_scale: factor on the branch of each group and on its attention.
        img_range: internal factor on the image.
        rgb_mean: one number in 0..1 per channel; `None` for DIV2K's mean with 3 channels, and 0 otherwise.
        share: number of groups that share a state, computed by the first. `None` for all, as published; 1 for none.
        chunk_size: as in `LSP`.
        reduction: as in `LSP`.
        zero_init: start with attention as the identity; `False` as published.
        activation_checkpointing: in training, recompute the groups in the backward instead of storing them.
        options: other options of `LSP`: `num_clusters`, `similarity`, `neighbors`, ...

    Raises:
        ConfigError: options are invalid; the message names all of them.

    Source:
        arXiv 2404.04922 and the configuration of its released code, with 14,340,227 parameters at x2. The released
        network has another 1,328,281 that it never uses.

    Examples:
        >>> model = LCoAN(num_feat=16, num_group=3, num_block=1, upscale=2, num_clusters=32)
        >>> model(torch.rand(1, 3, 12, 12)).shape
        torch.Size([1, 3, 24, 24])
    """

    @store_init_args
    @checked
    @takes_options_of(LSP)
    def __init__(
        self,
        num_in_ch: PositiveInt = 3,
        num_out_ch: PositiveInt = 3,
        num_feat: PositiveInt = 128,
        num_group: PositiveInt = 10,
        num_block: PositiveInt = 4,
        upscale: Upscale = 2,
        res_scale: Finite = 0.1,
        img_range: Positive = 1.0,
        rgb_mean: Sequence[Finite] | None = None,
        share: PositiveInt | None = None,
        chunk_size: PositiveInt = 384,
        reduction: PositiveInt = 1,
        zero_init: bool = True,
        activation_checkpointing: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(num_in_ch, num_out_ch, num_feat, upscale, img_range, rgb_mean)
        self.activation_checkpointing = activation_checkpointing
        self.share = num_group if share is None else share
        self.body = nn.ModuleList()
        for index in range(num_group):
            attention: AttentionLayer
            if index % self.share == 0:
                attention = provider = LCoA(
                    num_feat,
                    chunk_size=chunk_size,
                    reduction=reduction,
                    res_scale=res_scale,
                    zero_init=zero_init,
                    **options,
                )
            else:
                attention = provider.make_consumer()
            self.body.append(CollaborativeGroup(num_feat, num_block, res_scale, attention))
        warn_of_range(self, img_range)

    def features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Run the groups on the first features."""
        state: ClusterAttention | None = None
        again = self.activation_checkpointing and self.training
        for index, group in enumerate(self.body):
            sharing = index + 1 < len(self.body) and (index + 1) % self.share != 0
            x, state = maybe_checkpoint(group, x, state, sharing=sharing, enabled=again)
        return x
