"""RCAN, with attention between its residual groups by config."""

from collections.abc import Sequence

from sparse_sr_attn.backbones.base import TrunkNetwork, store_init_args
from sparse_sr_attn.blocks import ResidualGroup, read_trunk
from sparse_sr_attn.blocks.residual import ChannelAttentionBlock
from sparse_sr_attn.blocks.upsample import Upscale
from sparse_sr_attn.config import Finite, Positive, PositiveInt, checked


class RCAN(TrunkNetwork):
    """RCAN (Zhang et al., ECCV 2018) whose body can hold any registered attention layer after its residual groups.

    Args:
        num_in_ch: channels of the input image, >= 1.
        num_out_ch: channels of the output image, >= 1.
        num_feat: channels inside, >= 1.
        num_group: residual groups, >= 1.
        num_block: channel-attention blocks in a group, >= 1.
        squeeze_factor: ratio of `num_feat` to the channels inside a channel attention, from 1 to `num_feat`.
        upscale: factor, one of 2, 3, 4, 8.
        res_scale: factor on the residual branch of each block, not of groups.
        img_range: as in `EDSR`.
        rgb_mean: one number in 0..1 per channel; `None` for DIV2K's mean with 3 channels, and 0 otherwise.
        attention: as in `EDSR`, where `every` and `after` count residual groups from 0.
        block: as in `EDSR`, for the blocks inside the groups; `squeeze_factor` and `res_scale` then have no effect.
        activation_checkpointing: in training, recompute the body in the backward instead of storing it.

    Raises:
        ConfigError: options are invalid; the message names all of them.

    Note:
        State-dict keys are those of `TrunkNetwork`.

    Examples:
        >>> attention = {"type": "LCoA", "every": 1, "share": 2}
        >>> model = RCAN(num_feat=16, num_group=2, num_block=2, upscale=2, attention=attention, img_range=1.0)
        >>> model(torch.rand(1, 3, 12, 12)).shape
        torch.Size([1, 3, 24, 24])
    """

    @store_init_args
    @checked
    def __init__(
        self,
        num_in_ch: PositiveInt = 3,
        num_out_ch: PositiveInt = 3,
        num_feat: PositiveInt = 64,
        num_group: PositiveInt = 10,
        num_block: PositiveInt = 16,
        squeeze_factor: PositiveInt = 16,
        upscale: Upscale = 4,
        res_scale: Finite = 1.0,
        img_range: Positive = 255.0,
        rgb_mean: Sequence[Finite] | None = None,
        attention: object = None,
        block: object = None,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__(num_in_ch, num_out_ch, num_feat, upscale, img_range, rgb_mean)
        build, configs = read_trunk(block, attention, num_group)
        build = build or (lambda index, num_feat: ChannelAttentionBlock(num_feat, squeeze_factor, res_scale))
        groups = (range(num_block * group, num_block * (group + 1)) for group in range(num_group))
        parts = [ResidualGroup(num_feat, [build(index, num_feat) for index in group]) for group in groups]
        self._build_trunk(parts, configs, activation_checkpointing=activation_checkpointing)
