"""ELAN: shift convolutions, and window attention in three sizes with weights shared by later layers."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_sr_attn.backbones.base import Network, store_init_args
from sparse_sr_attn.blocks.body import maybe_checkpoint
from sparse_sr_attn.blocks.elab import ELAB
from sparse_sr_attn.blocks.upsample import Upscale
from sparse_sr_attn.config import Finite, Positive, PositiveInt, WindowSize, checked
from sparse_sr_attn.functional._torch import larger, modulo
from sparse_sr_attn.functional.channels_last import channels_last


class ELAN(Network):
    """Efficient long-range attention network. The defaults are the published configuration.

    Args:
        num_in_ch: channels of the input image, >= 1.
        num_out_ch: channels of the output image, >= 1.
        num_feat: channels inside, >= 1.
        num_block: ELABs, >= 1; every second one shifts its windows.
        share: number of attentions in an ELAB, >= 1, which share their weights.
        upscale: factor, one of 2, 3, 4, 8.
        window_sizes: as in `GMSA`. The image is padded by reflection to a common multiple.
        exact_shift: as in `GMSA`.
        expansion: as in `LFE`.
        img_range: internal factor on the image; 255 as published.
        rgb_mean: one number in 0..1 per channel; `None` for DIV2K's mean with 3 channels, and 0 otherwise.
        activation_checkpointing: in training, recompute the body in the backward instead of storing it.

    Raises:
        ConfigError: options are invalid; the message names all of them.

    Note:
        In training, normalisation uses the statistics of the batch, including padding, as published. If a side is
        shorter than its padding, the reflection is repeated; the released network fails there.

    Source:
        arXiv 2203.06697 and the configuration of its released code, whose `m_elan` is `num_block * share` here.
        8,254,092 parameters at x2; 582,012 for ELAN-light.

    Examples:
        >>> model = ELAN(num_feat=60, num_block=2, upscale=2)
        >>> model(torch.rand(1, 3, 20, 20)).shape
        torch.Size([1, 3, 40, 40])
    """

    @store_init_args
    @checked
    def __init__(
        self,
        num_in_ch: PositiveInt = 3,
        num_out_ch: PositiveInt = 3,
        num_feat: PositiveInt = 180,
        num_block: PositiveInt = 36,
        share: PositiveInt = 1,
        upscale: Upscale = 2,
        window_sizes: Sequence[WindowSize] = (4, 8, 16),
        exact_shift: bool = True,
        expansion: PositiveInt = 2,
        img_range: Positive = 255.0,
        rgb_mean: Sequence[Finite] | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__(num_in_ch, num_out_ch, upscale, img_range, rgb_mean)
        self.activation_checkpointing = activation_checkpointing
        self.multiple = math.lcm(*window_sizes)
        self.conv_first = nn.Conv2d(num_in_ch, num_feat, 3, padding=1)
        self.body = nn.Sequential(
            *(
                ELAB(
                    num_feat,
                    share=share,
                    window_sizes=window_sizes,
                    shift=index % 2 == 1,
                    exact_shift=exact_shift,
                    expansion=expansion,
                )
                for index in range(num_block)
            )
        )
        self.conv_last = nn.Conv2d(num_feat, num_out_ch * upscale**2, 3, padding=1)

    def forward_body(self, x: Float[Tensor, "b c_in h w"]) -> Float[Tensor, "b c_out H W"]:
        """Super-resolve an image already centred and scaled to `img_range`."""
        height, width = x.shape[2] * self.upscale, x.shape[3] * self.upscale
        first = self.conv_first(channels_last(_padded(x, self.multiple)))
        return _cut(F.pixel_shuffle(self.conv_last(self.features(first) + first), self.upscale), height, width)

    def features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Run the ELABs on the first features."""
        for block in self.body:
            x = maybe_checkpoint(block, x, enabled=self.activation_checkpointing and self.training)
        return x


def _padded(x: Tensor, multiple: int) -> Tensor:
    """Pad a map at the bottom and the right by repeated reflection to multiples of `multiple`."""
    if not torch.compiler.is_compiling():
        below, right = -x.shape[2] % multiple, -x.shape[3] % multiple
        if not below and not right:
            return x
        # Only without gradients, because those of `F.pad` are not deterministic on GPUs.
        if below < x.shape[2] and right < x.shape[3] and not x.requires_grad:
            return F.pad(x, (0, right, 0, below), mode="reflect")
    return _reflected(_reflected(x, 2, multiple), 3, multiple)


def _cut(x: Tensor, height: int, width: int) -> Tensor:
    """Return the part of a map at the top and the left, as a contiguous map."""
    if torch.compiler.is_compiling():  # for a compiler the strides of a slice would tell whether there was padding
        for dim, side in ((2, height), (3, width)):
            x = x.index_select(dim, torch.arange(side, device=x.device))
        return x
    return x[:, :, :height, :width].contiguous() if x.shape[2:] != (height, width) else x.contiguous()


def _reflected(x: Tensor, dim: int, multiple: int) -> Tensor:
    """Pad side `dim` of a map by repeated reflection to a multiple of `multiple`."""
    side = x.shape[dim]
    period = larger(2 * (side - 1), 1)  # there and back; a side of 1 stays where it is
    padded = (side + multiple - 1) // multiple * multiple
    place = modulo(torch.arange(padded, device=x.device), period)
    return x.index_select(dim, torch.minimum(place, period - place))
