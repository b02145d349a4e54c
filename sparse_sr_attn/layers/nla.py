"""NLA: dense non-local attention, the baseline of the sparse layers."""

from jaxtyping import Float
from torch import Tensor, nn

from sparse_sr_attn.config import Finite, Positive, PositiveInt, checked
from sparse_sr_attn.functional.dense import dense_attention
from sparse_sr_attn.functional.l2_normalize import l2_normalize
from sparse_sr_attn.layers.base import (
    LAYERS,
    AttentionLayer,
    ScaledCosine,
    Similarity,
    check_map,
    feature_map,
    output_proj,
    reject_state,
    tokens,
)

_SOURCE = "Wang et al., CVPR 2018, arXiv 1711.07971; as the baseline of arXiv 2404.04922"


@LAYERS.register("NLA", kind="layer", source=_SOURCE)
class NLA(AttentionLayer):
    r"""Non-local attention: every token attends to every token.

    $$E = \mathrm{conv}_{3\times3}(x), \quad y = x + \rho\,\mathrm{softmax}(E \hat
    E^\top)\,\mathrm{conv}_{1\times1}(x)$$

    One embedding is the query (raw; its norm acts as a learnt temperature) and the key (unit length). With
    `similarity="cosine"`, it differs from `LCoA` only in the keys that a token attends to.

    Args:
        embed_dim: channels of the feature map, >= 1.
        reduction: ratio of `embed_dim` to the channels of queries and keys, >= 1; at least one channel is kept.
        similarity: "dot", or "cosine" as in `LSP`.
        logit_scale: as in `LSP`.
        res_scale: $\rho$, factor on the attention; 0 disables it.
        zero_init: initialise the value convolution with zeros, so that the layer starts as the identity.

    Raises:
        ConfigError: options are invalid; the message names all of them.

    Note:
        Time grows with the square of the number of pixels; memory does not, if torch has a fused kernel.

    Source:
        Non-local networks (arXiv 1711.07971), in the form that arXiv 2404.04922 compares LCoAN with.

    Examples:
        >>> NLA(64)(torch.rand(1, 64, 12, 12)).shape
        torch.Size([1, 64, 12, 12])
    """

    @checked
    def __init__(
        self,
        embed_dim: PositiveInt,
        *,
        reduction: PositiveInt = 4,
        similarity: Similarity = "dot",
        logit_scale: Positive = 10.0,
        res_scale: Finite = 0.1,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.res_scale = res_scale
        self.embed = nn.Conv2d(embed_dim, max(1, embed_dim // reduction), 3, padding=1)
        self.similarity = similarity
        self.scale_logits = ScaledCosine(logit_scale) if similarity == "cosine" else nn.Identity()
        self.value = output_proj(embed_dim, zero_init=zero_init)

    @property
    def has_raw_queries(self) -> bool:
        """Whether queries are unscaled features, whose norm acts as the temperature."""
        return self.similarity == "dot"

    def extra_repr(self) -> str:
        """Return the options that are not visible from shapes."""
        return f"similarity={self.similarity!r}, res_scale={self.res_scale}"

    def forward(self, x: Float[Tensor, "b c h w"], state: object = None) -> Float[Tensor, "b c h w"]:
        """Return `x` plus its attention, for any h, w >= 1.

        Raises:
            SharingError: `state` is given.
            ShapeError: `x` is not a map of `embed_dim` channels.
        """
        reject_state(self, state)
        check_map(x, self.embed_dim)
        query = self.scale_logits(tokens(self.embed(x)))
        attended = dense_attention(query, l2_normalize(query), tokens(self.value(x)))
        return x + self.res_scale * feature_map(attended, x)
