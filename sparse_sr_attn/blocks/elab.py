"""ELAB, the block of ELAN: local feature extraction and window attention in turn, with shared attention weights."""

from collections.abc import Sequence
from typing import cast

from jaxtyping import Float
from torch import Tensor, nn

from sparse_sr_attn.config import Finite, PositiveInt, WindowSize, checked
from sparse_sr_attn.functional.channels_last import channels_last, in_format_of
from sparse_sr_attn.layers.base import LAYERS, AttentionLayer, check_map, reject_state
from sparse_sr_attn.layers.gmsa import GMSA
from sparse_sr_attn.layers.shift_conv import LFE


@LAYERS.register("ELAB", kind="layer", source="Zhang et al., arXiv 2203.06697")
class ELAB(AttentionLayer):
    r"""Efficient long-range attention block: $x + \rho\,\mathrm{LFE}(x)$ followed by attention, `share` times.

    The first attention is a GMSA; the others are SharedGMSA with its weights. The block takes no state.

    Args:
        embed_dim: channels of the feature map, >= 1.
        share: number of attentions, >= 1, which share the weights that the first computes.
        window_sizes: as in `GMSA`.
        shift: as in `GMSA`, for all attentions of the block.
        exact_shift: as in `GMSA`.
        expansion: as in `LFE`.
        res_scale: $\rho$, factor on every residual branch; 0 disables the block.
        zero_init: initialise the last convolution of every branch with zeros, so that the block starts as the identity.

    Raises:
        ConfigError: options are invalid; the message names all of them.

    Source:
        ELAB of arXiv 2203.06697; `share` is its `n_share` + 1, `expansion` its `r_expand`.

    Examples:
        >>> ELAB(60, share=2)(torch.rand(1, 60, 24, 24)).shape
        torch.Size([1, 60, 24, 24])
    """

    @checked
    def __init__(
        self,
        embed_dim: PositiveInt,
        *,
        share: PositiveInt = 1,
        window_sizes: Sequence[WindowSize] = (4, 8, 16),
        shift: bool = False,
        exact_shift: bool = True,
        expansion: PositiveInt = 2,
        res_scale: Finite = 1.0,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        self.res_scale = res_scale
        self.lfe = nn.ModuleList(LFE(embed_dim, expansion=expansion) for _ in range(share))
        provider = GMSA(
            embed_dim,
            window_sizes=window_sizes,
            shift=shift,
            exact_shift=exact_shift,
            res_scale=res_scale,
            zero_init=zero_init,
        )
        self.attention = nn.ModuleList([provider, *(provider.make_consumer() for _ in range(share - 1))])
        if zero_init:
            for lfe in self.lfe:
                for parameter in cast(LFE, lfe).conv2.parameters():
                    nn.init.zeros_(parameter)

    def extra_repr(self) -> str:
        """Return the options that are not visible from shapes."""
        return f"res_scale={self.res_scale}"

    def forward(self, x: Float[Tensor, "b c h w"], state: object = None) -> Float[Tensor, "b c h w"]:
        """Return a map of the same size, for any h, w >= 1.

        Raises:
            SharingError: `state` is given.
            ShapeError: `x` is not a map of `embed_dim` channels.
        """
        reject_state(self, state)
        check_map(x, cast(GMSA, self.attention[0]).embed_dim)
        given, x = x, channels_last(x)
        shared = None
        for lfe, attention in zip(self.lfe, self.attention, strict=True):
            x = cast(LFE, lfe).add_to(x, self.res_scale)
            if shared is None and len(self.attention) > 1:
                x, shared = cast(AttentionLayer, attention).attend_and_apply(x)
            else:
                x = attention(x, shared)
        return in_format_of(x, given)
