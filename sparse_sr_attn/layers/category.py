"""Category attention: tokens attend to those of their own category, and to all categories.

After CATANet (Liu et al., CVPR 2025, arXiv 2503.06896), which finds categories by k-means, and ATD (Zhang et al., CVPR
2024, arXiv 2401.08209), which learns a dictionary of them. Written from the papers; deviations are listed in
`docs/deviations.md`.
"""

from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor, nn

from sparse_sr_attn.config import Finite, NonNegative, NonNegativeInt, PositiveInt, UnitInterval, checked
from sparse_sr_attn.functional.cluster import cluster_attention, cluster_pattern
from sparse_sr_attn.functional.dense import dense_attention
from sparse_sr_attn.functional.kmeans import assign, initial_state
from sparse_sr_attn.functional.l2_normalize import l2_normalize
from sparse_sr_attn.layers.base import (
    LAYERS,
    AttentionLayer,
    check_map,
    feature_map,
    output_proj,
    reject_state,
    tokens,
)
from sparse_sr_attn.layers.running_state import KMeansModule, state_of

Categories = Literal["kmeans", "learnt"]
"""How categories are found."""


@LAYERS.register("CategoryAttention", kind="layer", source="Liu et al., arXiv 2503.06896; Zhang et al., 2401.08209")
class CategoryAttention(KMeansModule, AttentionLayer):
    r"""Attention within categories of tokens (long range, detailed), and to the categories themselves (global, coarse).

    $$c_i = \arg\max_j \langle \hat k_i, \mu_j \rangle, \quad y = x + \rho\,\mathrm{conv}(P V +
    \mathrm{softmax}(Q M^\top)\,M U)$$

    $Q$, $K$ and $V$ are 1x1 convolutions of $x$; $\mu_j$, the rows of $M$, are the unit vectors of the categories; $P$
    is cluster attention over tokens sorted by category; $U$ is learnt.

    Args:
        embed_dim: channels of the feature map, >= 1.
        categories: "kmeans" for centroids of the keys, updated once per training step, as in CATANet; "learnt" for a
            dictionary trained by gradients, as in ATD.
        num_clusters: number of categories, >= 1.
        chunk_size: sorted tokens that attend to each other, >= 1; at most the number of tokens is used.
        num_adjacent: neighbouring chunks seen on each side, >= 0.
        reduction: ratio of `embed_dim` to the channels of queries and keys, >= 1; at least one channel is kept.
        ema_decay: weight of the old centroid in an update of k-means, in [0, 1]; 1 freezes the centroids.
        reseed_threshold: k-means reseeds a category used less than this fraction of the mean; 0 disables reseeding, as
            published.
        seed: seed of the initial categories, which are random unit vectors.
        res_scale: $\rho$, factor on the attention; 0 disables it.
        zero_init: initialise the output convolution with zeros, so that the layer starts as the identity.

    Raises:
        ConfigError: options are invalid; the message names all of them.

    Note:
        Neither memory nor time grows with the square of the number of pixels; no weights are stored.

    Source:
        Token aggregation with intra- and inter-group attention of arXiv 2503.06896; dictionary of arXiv 2401.08209.
        Deviations P9-P12 of `docs/deviations.md`.

    Examples:
        >>> CategoryAttention(64, num_clusters=16)(torch.rand(1, 64, 12, 12)).shape
        torch.Size([1, 64, 12, 12])
    """

    centroids: Tensor
    has_raw_queries = True

    @checked
    def __init__(
        self,
        embed_dim: PositiveInt,
        *,
        categories: Categories = "kmeans",
        num_clusters: PositiveInt = 64,
        chunk_size: PositiveInt = 128,
        num_adjacent: NonNegativeInt = 1,
        reduction: PositiveInt = 4,
        ema_decay: UnitInterval = 0.999,
        reseed_threshold: NonNegative = 0.01,
        seed: int = 0,
        res_scale: Finite = 0.1,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.categories = categories
        self.chunk_size = chunk_size
        self.num_adjacent = num_adjacent
        self.ema_decay = ema_decay
        self.reseed_threshold = reseed_threshold
        self.res_scale = res_scale
        query_dim = max(1, embed_dim // reduction)
        self.query = nn.Conv2d(embed_dim, query_dim, 1)
        self.key = nn.Conv2d(embed_dim, query_dim, 1)
        self.value = nn.Conv2d(embed_dim, embed_dim, 1)
        self.category_value = nn.Linear(query_dim, embed_dim, bias=False)
        self.output = output_proj(embed_dim, zero_init=zero_init)
        first = initial_state(num_clusters, query_dim, seed)
        if categories == "learnt":
            self.centroids = nn.Parameter(first.centroids)
        else:
            for name, value in first._asdict().items():
                self.register_buffer(name, value)

    def extra_repr(self) -> str:
        """Return the options that are not visible from shapes."""
        return (
            f"categories={self.categories!r}, num_clusters={len(self.centroids)}, chunk_size={self.chunk_size}, "
            f"num_adjacent={self.num_adjacent}, ema_decay={self.ema_decay}, reseed_threshold={self.reseed_threshold}, "
            f"res_scale={self.res_scale}"
        )

    def forward(self, x: Float[Tensor, "b c h w"], state: object = None) -> Float[Tensor, "b c h w"]:
        """Return `x` plus its attention, for any h, w >= 1; in training, k-means updates the centroids once.

        Raises:
            SharingError: `state` is given.
            ShapeError: `x` is not a map of `embed_dim` channels.
        """
        reject_state(self, state)
        check_map(x, self.embed_dim)
        query, key, value = tokens(self.query(x)), l2_normalize(tokens(self.key(x))), tokens(self.value(x))
        pattern = cluster_pattern(self._assign(key), chunk_size=self.chunk_size, num_adjacent=self.num_adjacent)
        within = cluster_attention(query, key, value, pattern)
        categories = l2_normalize(
            self.centroids
        )  # new numbers: the next forward pass may move the centroids before a backward
        category_value = self.category_value(categories.to(query.dtype))
        batch = x.shape[0]
        among = dense_attention(query, categories.expand(batch, -1, -1), category_value.expand(batch, -1, -1))
        branch: Tensor = self.output(feature_map(within + among, x))
        return x + self.res_scale * branch

    def updates_state(self) -> bool:
        """Return whether a forward pass would update the centroids now."""
        return self.categories == "kmeans" and self.training and self.ema_decay < 1

    def _assign(self, points: Float[Tensor, "b n d"]) -> Int[Tensor, "b n"]:
        if self.updates_state():
            return self.assign_points(points, state_of(self))
        return assign(points, l2_normalize(self.centroids.detach()))
