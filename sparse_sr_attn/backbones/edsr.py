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
        img_range: internal factor on the image. 255 is BasicSR's default, which its weights expect; there, raw queries
            (`similarity: dot`) saturate the softmax, which gives a warning.
        rgb_mean: one number in 0..1 per channel; `None` for DIV2K's mean with 3 channels, and 0 otherwise.
        attention: `None`, a mapping, or a list of mappings: `{type: LCoA, every: 4, share: 4, num_clusters: 128}` adds
            an LCoA after block 3 and CoAs that reuse its state after blocks 7, 11 and 15. The keys are those of
            `blocks.AttentionConfig` and the options of the layer. Layers start as the identity (`zero_init`). A list of
            mappings combines layers. The name of a layer alone means every 4th block, with sharing if possible.
        block: `None` for EDSR's residual blocks, or a mapping like `{type: ELAB, share: 2}` to replace them by any
            registered layer. `res_scale` then has no effect; of layers with an option `shift`, every second shifts.
        activation_checkpointing: in training, recompute the body in the backward instead of storing it.

    Raises:
        ConfigError: options are invalid; the message names all of them.

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
