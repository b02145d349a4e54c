"""Upsampling by sub-pixel convolution."""

from typing import Literal

from torch import nn

from sparse_sr_attn.config import PositiveInt, checked

Upscale = Literal[2, 3, 4, 8]
"""The super-resolution factors that networks support."""


class Upsample(nn.Sequential):
    """Convolution and pixel shuffle, once for x3 and once per doubling for x2, x4, x8.

    Args:
        upscale: factor, one of 2, 3, 4, 8.
        num_feat: channels in and out.

    Source:
        Shi et al., CVPR 2016; state-dict keys as in BasicSR and EDSR-PyTorch.

    Examples:
        >>> Upsample(3, 64)(torch.rand(1, 64, 12, 12)).shape
        torch.Size([1, 64, 36, 36])
    """

    @checked
    def __init__(self, upscale: Upscale, num_feat: PositiveInt) -> None:
        factors = [3] if upscale == 3 else [2] * (upscale.bit_length() - 1)
        stages: list[nn.Module] = []
        for factor in factors:
            stages += [nn.Conv2d(num_feat, factor**2 * num_feat, 3, padding=1), nn.PixelShuffle(factor)]
        super().__init__(*stages)
