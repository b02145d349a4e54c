"""Residual blocks of convolutional super-resolution networks."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_sr_attn.config import Finite, PositiveInt, checked
from sparse_sr_attn.errors import ConfigError


class ResidualBlock(nn.Module):
    r"""EDSR's block without normalisation: $x + \rho\,\mathrm{conv}(\mathrm{ReLU}(\mathrm{conv}(x)))$.

    Args:
        num_feat: channels.
        res_scale: $\rho$, factor on the residual branch.

    Source:
        Lim et al., "Enhanced Deep Residual Networks", CVPRW 2017; state-dict keys as in BasicSR.

    Examples:
        >>> ResidualBlock(64)(torch.rand(1, 64, 12, 12)).shape
        torch.Size([1, 64, 12, 12])
    """

    @checked
    def __init__(self, num_feat: PositiveInt, res_scale: Finite = 1.0) -> None:
        super().__init__()
        self.res_scale = res_scale
        self.conv1 = nn.Conv2d(num_feat, num_feat, 3, padding=1)
        self.conv2 = nn.Conv2d(num_feat, num_feat, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return a map of the same size."""
        branch: Tensor = self.conv2(F.relu(self.conv1(x)))
        return torch.add(x, branch, alpha=self.res_scale)


class ChannelAttention(nn.Module):
    r"""RCAN's gate: $x \cdot \sigma(W_2\,\mathrm{ReLU}(W_1 \bar x))$, a factor in 0..1 per channel.

    Args:
        num_feat: channels.
        squeeze_factor: ratio of `num_feat` to the channels between $W_1$ and $W_2$; at least one channel is kept.

    Raises:
        ConfigError: `squeeze_factor` exceeds `num_feat`.

    Source:
        Zhang et al., "Image Super-Resolution Using Very Deep Residual Channel Attention Networks", ECCV 2018;
        state-dict keys as in BasicSR.

    Examples:
        >>> ChannelAttention(64)(torch.rand(1, 64, 12, 12)).shape
        torch.Size([1, 64, 12, 12])
    """

    @checked
    def __init__(self, num_feat: PositiveInt, squeeze_factor: PositiveInt = 16) -> None:
        super().__init__()
        if squeeze_factor > num_feat:
            message = f"must be at most num_feat, {num_feat}, got {squeeze_factor}"
            raise ConfigError.at("squeeze_factor", message)
        squeezed = num_feat // squeeze_factor
        self.attention = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(num_feat, squeezed, 1),
            nn.ReLU(),
            nn.Conv2d(squeezed, num_feat, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return a map of the same size."""
        gate: Tensor = self.attention(x)
        return x * gate


class ChannelAttentionBlock(nn.Module):
    r"""RCAN's block (RCAB): $x + \rho\,\mathrm{gate}(\mathrm{conv}(\mathrm{ReLU}(\mathrm{conv}(x))))$.

    Args:
        num_feat: channels.
        squeeze_factor: as in `ChannelAttention`.
        res_scale: $\rho$, factor on the residual branch.

    Raises:
        ConfigError: `squeeze_factor` exceeds `num_feat`.

    Source:
        As `ChannelAttention`.

    Examples:
        >>> ChannelAttentionBlock(64)(torch.rand(1, 64, 12, 12)).shape
        torch.Size([1, 64, 12, 12])
    """

    @checked
    def __init__(self, num_feat: PositiveInt, squeeze_factor: PositiveInt = 16, res_scale: Finite = 1.0) -> None:
        super().__init__()
        self.res_scale = res_scale
        self.rcab = nn.Sequential(
            nn.Conv2d(num_feat, num_feat, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(num_feat, num_feat, 3, padding=1),
            ChannelAttention(num_feat, squeeze_factor),
        )

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return a map of the same size."""
        branch: Tensor = self.rcab(x)
        return torch.add(x, branch, alpha=self.res_scale)


class ResidualGroup(nn.Module):
    r"""RCAN's group: $x + \mathrm{conv}(\mathrm{blocks}(x))$, without a factor.

    Args:
        num_feat: channels.
        blocks: blocks that keep the number of channels; in RCAN, `ChannelAttentionBlock`s.

    Source:
        As `ChannelAttention`.

    Examples:
        >>> group = ResidualGroup(64, [ChannelAttentionBlock(64) for _ in range(2)])
        >>> group(torch.rand(1, 64, 12, 12)).shape
        torch.Size([1, 64, 12, 12])
    """

    def __init__(self, num_feat: int, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.residual_group = nn.Sequential(*blocks)
        self.conv = nn.Conv2d(num_feat, num_feat, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return a map of the same size."""
        branch: Tensor = self.conv(self.residual_group(x))
        return x + branch
