"""ENLA: attention to all tokens at linear cost, by random features that estimate the softmax.

Xia et al., "Efficient Non-Local Contrastive Attention for Image Super-Resolution", AAAI 2022, arXiv 2201.03794. Written
from the paper; deviations are listed in `docs/deviations.md`.
"""

import math

from jaxtyping import Float
from torch import Tensor, nn

from sparse_sr_attn.config import Finite, Positive, PositiveInt, checked
from sparse_sr_attn.functional.l2_normalize import l2_normalize
from sparse_sr_attn.functional.random_features import contrastive_loss, kernel_attention, random_directions
from sparse_sr_attn.layers.base import (
    LAYERS,
    AttentionLayer,
    check_map,
    feature_map,
    output_proj,
    reject_state,
    tokens,
)


@LAYERS.register("ENLA", kind="layer", source="Xia et al., arXiv 2201.03794")
class ENLA(AttentionLayer):
    r"""Efficient non-local attention: $\mathrm{softmax}(\alpha\,\hat Q \hat K^\top) V$, estimated by random features.

    $$y_i = x_i + \rho\,\frac{\phi(q_i) \sum_j \phi(k_j)^\top v_j}{\phi(q_i) \sum_j \phi(k_j)^\top}, \quad \phi_w(u) =
    e^{\langle w, u \rangle - \lVert u \rVert^2 / 2}$$

    $Q$, $K$ and $V$ are 1x1 convolutions; queries and keys have the length $\sqrt\alpha$.

    Args:
        embed_dim: channels of the feature map, >= 1.
        reduction: ratio of `embed_dim` to the channels of queries and keys, >= 1; at least one channel is kept.
        num_features: number of random features, >= 1; more give a better estimate at proportional cost.
        amplification: $\alpha$, > 0; larger values put more weight on the most similar tokens and worsen the estimate.
        seed: seed of the features, which are fixed and part of the state dict.
        res_scale: $\rho$, factor on the attention; 0 disables it.
        zero_init: initialise the value convolution with zeros, so that the layer starts as the identity.

    Raises:
        ConfigError: options are invalid; the message names all of them.

    Note:
        Time and memory grow as pixels times features. The paper's `contrastive_loss`, which pulls similar tokens
        together, is not part of `forward`; add it to your loss.

    Source:
        ENLCA of arXiv 2201.03794, published with reduction 4, 128 features and amplification 6. Deviations P4-P6 of
        `docs/deviations.md`.

    Examples:
        >>> ENLA(64, num_features=32)(torch.rand(1, 64, 12, 12)).shape
        torch.Size([1, 64, 12, 12])
    """

    directions: Tensor

    @checked
    def __init__(
        self,
        embed_dim: PositiveInt,
        *,
        reduction: PositiveInt = 4,
        num_features: PositiveInt = 128,
        amplification: Positive = 6.0,
        seed: int = 0,
        res_scale: Finite = 0.1,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.amplification = amplification
        self.res_scale = res_scale
        query_dim = max(1, embed_dim // reduction)
        self.query = nn.Conv2d(embed_dim, query_dim, 1)
        self.key = nn.Conv2d(embed_dim, query_dim, 1)
        self.value = output_proj(embed_dim, zero_init=zero_init)
        self.register_buffer("directions", random_directions(num_features, query_dim, seed))

    def extra_repr(self) -> str:
        """Return the options that are not visible from shapes."""
        return f"num_features={len(self.directions)}, amplification={self.amplification}, res_scale={self.res_scale}"

    def forward(self, x: Float[Tensor, "b c h w"], state: object = None) -> Float[Tensor, "b c h w"]:
        """Return `x` plus its attention, for any h, w >= 1.

        Raises:
            SharingError: `state` is given.
            ShapeError: `x` is not a map of `embed_dim` channels.
        """
        reject_state(self, state)
        check_map(x, self.embed_dim)
        attended = kernel_attention(*self._query_and_key(x), tokens(self.value(x)), self.directions)
        return x + self.res_scale * feature_map(attended, x)

    def contrastive_loss(
        self, x: Float[Tensor, "b c h w"], *, num_queries: PositiveInt = 256, seed: int = 0
    ) -> Float[Tensor, ""]:
        """Return the contrastive loss of the queries and keys of `x`, an input of `forward`.

        Args:
            x: a map with at least two pixels.
            num_queries: queries drawn from each sample, >= 1.
            seed: seed for drawing queries; pass the step number.

        Raises:
            ShapeError: `x` is not a map of `embed_dim` channels, or has one pixel.

        Source:
            `functional.random_features.contrastive_loss`.

        Examples:
            >>> layer, x = ENLA(64), torch.rand(1, 64, 12, 12)
            >>> layer.contrastive_loss(x).shape  # add it to your loss
            torch.Size([])
        """
        check_map(x, self.embed_dim)
        return contrastive_loss(*self._query_and_key(x), num_queries=num_queries, seed=seed)

    def _query_and_key(self, x: Tensor) -> tuple[Tensor, Tensor]:
        length = math.sqrt(self.amplification)
        return length * l2_normalize(tokens(self.query(x))), length * l2_normalize(tokens(self.key(x)))
