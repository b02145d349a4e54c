"""EDSR, with attention between its blocks by config."""

from collections.abc import Sequence

from sparse_sr_attn.backbones.base import TrunkNetwork, store_init_args
from sparse_sr_attn.blocks import ResidualBlock, read_trunk
from sparse_sr_attn.blocks.upsample import Upscale
from sparse_sr_attn.config import Finite, Positive, PositiveInt, checked


class EDSR(TrunkNetwork):
    """EDSR (Lim et al., CVPRW 2017) whose body can hold any registered attention layer.

    Args:
        num_in_ch: channels of the input image, >= 1.
        num_out_ch: channels of the output image, >= 1.
        num_feat: channels inside, >= 1.
        num_block: residual blocks, >= 1.
        upscale: factor, one of 2, 3, 4, 8.
        res_scale: factor on each residual branch.
        img_range: factor on the image, inside. 255 is BasicSR's default and what its weights expect; raw queries
            (`similarity: dot`) saturate the softmax there, of which a warning tells.
        rgb_mean: one number in 0..1 a channel; `None` for DIV2K's mean with 3 channels and for 0 otherwise.
        attention: `None`, a map, or a list of maps: `{type: LCoA, every: 4, share: 4, num_clusters: 128}` puts an
            LCoA after block 3, which computes, and CoAs that reuse its state after blocks 7, 11 and 15. The keys are
            those of `blocks.AttentionMap` and the options of the layer. Layers start as the identity (`zero_init`).
            A list of maps mixes layers. The name of a layer alone stands for every 4th block, all sharing if they can.
        block: a map like `{type: ELAB, share: 2}`, of any registered layer, puts these in place of the residual blocks;
            of layers with an option `shift` every second shifts, and `res_scale` has no effect. `None` for EDSR's
            own.
        activation_checkpointing: in training, compute the body again in the backward instead of keeping it.

    Raises:
        ConfigError: options break their rules; all that do are named.

    Note:
        State-dict keys are those of `TrunkNetwork`.

    Examples:
        >>> model = EDSR(num_feat=16, num_block=4, upscale=2, attention={"type": "LCoA", "every": 2}, img_range=1.0)
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
        num_block: PositiveInt = 16,
        upscale: Upscale = 4,
        res_scale: Finite = 1.0,
        img_range: Positive = 255.0,
        rgb_mean: Sequence[Finite] | None = None,
        attention: object = None,
        block: object = None,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__(num_in_ch, num_out_ch, num_feat, upscale, img_range, rgb_mean)
        build, configs = read_trunk(block, attention, num_block)
        build = build or (lambda index, num_feat: ResidualBlock(num_feat, res_scale))
        parts = [build(index, num_feat) for index in range(num_block)]
        self._build_trunk(parts, configs, activation_checkpointing=activation_checkpointing)
