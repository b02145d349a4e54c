"""HSPA: dense non-local attention that gives most tokens a weight of exactly 0.

Su et al., "High-Similarity-Pass Attention for Single Image Super-Resolution", IEEE TIP 2024, arXiv 2305.15768.
"""

from jaxtyping import Float
from torch import Tensor, nn

from sparse_sr_attn.config import Finite, Positive, PositiveInt, checked
from sparse_sr_attn.functional.l2_normalize import l2_normalize
from sparse_sr_attn.functional.sparsemax import sparsemax_attention
from sparse_sr_attn.layers.base import (
    LAYERS,
    AttentionLayer,
    check_map,
    feature_map,
    output_proj,
    reject_state,
    tokens,
)


@LAYERS.register("HSPA", kind="layer", source="Su et al., arXiv 2305.15768")
class HSPA(AttentionLayer):
    r"""High-similarity-pass attention: `NLA` with sparsemax in place of the softmax.

    $$E = \mathrm{conv}_{3\times3}(x), \quad y = x + \rho\,\mathrm{sparsemax}(\sigma E \hat
    E^\top)\,\mathrm{conv}_{1\times1}(x)$$

    Scores that are 1 or more below the largest of their row get a weight of exactly 0, so the norm of queries times
    $\sigma$ controls how many tokens a query attends to.

    Args:
        embed_dim: channels of the feature map, >= 1.
        reduction: ratio of `embed_dim` to the channels of queries and keys, >= 1; at least one channel is kept.
        scale: $\sigma$, factor on the scores, > 0; larger values give sparser attention.
        res_scale: $\rho$, factor on the attention; 0 disables it.
        zero_init: initialise the value convolution with zeros, so that the layer starts as the identity.

    Raises:
        ConfigError: options are invalid; the message names all of them.

    Note:
        Time grows with the square of the number of pixels; memory does not. A token without attention from any query
        gets no gradient, except through its own query.

    Source:
        HSPA of arXiv 2305.15768. Deviations P7-P8 of `docs/deviations.md`.

    Examples:
        >>> HSPA(64)(torch.rand(1, 64, 12, 12)).shape
        torch.Size([1, 64, 12, 12])
    """

    has_raw_queries = True

    @checked
    def __init__(
        self,
        embed_dim: PositiveInt,
        *,
        reduction: PositiveInt = 4,
        scale: Positive = 1.0,
        res_scale: Finite = 0.1,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.scale = scale
        self.res_scale = res_scale
        self.embed = nn.Conv2d(embed_dim, max(1, embed_dim // reduction), 3, padding=1)
        self.value = output_proj(embed_dim, zero_init=zero_init)

    def extra_repr(self) -> str:
        """Return the options that are not visible from shapes."""
        return f"scale={self.scale}, res_scale={self.res_scale}"

    def forward(self, x: Float[Tensor, "b c h w"], state: object = None) -> Float[Tensor, "b c h w"]:
        """Return `x` plus its attention, for any h, w >= 1.

        Raises:
            SharingError: `state` is given.
            ShapeError: `x` is not a map of `embed_dim` channels.
        """
        reject_state(self, state)
        check_map(x, self.embed_dim)
        query = tokens(self.embed(x))
        attended = sparsemax_attention(query, l2_normalize(query), tokens(self.value(x)), scale=self.scale)
        return x + self.res_scale * feature_map(attended, x)
