"""NLSA: sparse attention inside the buckets of a locality-sensitive hash.

Mei, Fan, Zhou, "Image Super-Resolution with Non-Local Sparse Attention", CVPR 2021. Written from the paper; deviations
are listed in `docs/deviations.md`.
"""

from typing import Annotated

from jaxtyping import Float, Int
from torch import Tensor, nn

from sparse_sr_attn.config import Finite, NonNegativeInt, Positive, PositiveInt, Rule, checked
from sparse_sr_attn.functional.cluster import cluster_attention_rounds, cluster_pattern
from sparse_sr_attn.functional.lsh import HashState, bucket_count, hash_step, hash_tokens, initial_hash
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

BucketCount = Annotated[int, Rule(">= 2", lambda value: value >= 2)]


@LAYERS.register("NLSA", kind="layer", source="Mei et al., CVPR 2021")
class NLSA(AttentionLayer):
    r"""Non-local sparse attention: tokens of similar direction share a hash bucket and attend within chunks.

    $$E = \mathrm{conv}_{3\times3}(x), \quad c_i^r = \arg\max([R_r e_i, -R_r e_i]), \quad y = x + \rho \sum_r
    \frac{Z_r}{\sum_{r'} Z_{r'}} P_r\,\mathrm{conv}_{1\times1}(x)$$

    One embedding is the query (raw) and the key (unit length). In each round, tokens are sorted by bucket and cut into
    chunks, and each attends to its own chunk and the adjacent ones; $Z_r$ is the denominator of that softmax.

    Args:
        embed_dim: channels of the feature map, >= 1.
        chunk_size: sorted tokens that attend to each other, >= 1; at most the number of tokens is used.
        num_rounds: number of hashes per map, >= 1; time grows with it.
        max_buckets: a map has a bucket for every `chunk_size` tokens, from 2 to this number; >= 2.
        reduction: ratio of `embed_dim` to the channels of queries and keys, >= 1; at least one channel is kept.
        num_adjacent: neighbouring chunks seen on each side, >= 0.
        count_keys_once: count every key once in a round; `False` counts as published.
        redraw: draw new hashes in every training step, as published; `False` keeps those of `seed`.
        seed: seed of all hashes.
        similarity: "dot", or "cosine" as in `LSP`.
        logit_scale: as in `LSP`.
        res_scale: $\rho$, factor on the attention; 0 disables it.
        zero_init: initialise the value convolution with zeros, so that the layer starts as the identity.

    Raises:
        ConfigError: options are invalid; the message names all of them.

    Note:
        Evaluation is deterministic: it uses the hashes of the last training step, which are in the state dict.
        Neither memory nor time grows with the square of the number of pixels; no weights are stored.

    Source:
        NLSA of CVPR 2021, published with reduction 4, chunks of 144, 4 rounds and 128 buckets. Deviations P1-P3 of
        `docs/deviations.md`.

    Examples:
        >>> NLSA(64, chunk_size=36)(torch.rand(1, 64, 12, 12)).shape
        torch.Size([1, 64, 12, 12])
    """

    rotations: Tensor
    num_draws: Tensor

    @checked
    def __init__(
        self,
        embed_dim: PositiveInt,
        *,
        chunk_size: PositiveInt = 144,
        num_rounds: PositiveInt = 4,
        max_buckets: BucketCount = 128,
        reduction: PositiveInt = 4,
        num_adjacent: NonNegativeInt = 1,
        count_keys_once: bool = True,
        redraw: bool = True,
        seed: int = 0,
        similarity: Similarity = "dot",
        logit_scale: Positive = 10.0,
        res_scale: Finite = 0.1,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.chunk_size = chunk_size
        self.num_adjacent = num_adjacent
        self.count_keys_once = count_keys_once
        self.redraw = redraw
        self.seed = seed
        self.res_scale = res_scale
        query_dim = max(1, embed_dim // reduction)
        self.embed = nn.Conv2d(embed_dim, query_dim, 3, padding=1)
        self.similarity = similarity
        self.scale_logits = ScaledCosine(logit_scale) if similarity == "cosine" else nn.Identity()
        self.value = output_proj(embed_dim, zero_init=zero_init)
        for name, value in initial_hash(num_rounds, max_buckets, query_dim, seed)._asdict().items():
            self.register_buffer(name, value)

    @property
    def has_raw_queries(self) -> bool:
        """Whether queries are unscaled features, whose norm acts as the temperature."""
        return self.similarity == "dot"

    def extra_repr(self) -> str:
        """Return the options that are not visible from shapes."""
        return (
            f"chunk_size={self.chunk_size}, num_rounds={len(self.rotations)}, "
            f"max_buckets={2 * self.rotations.shape[1]}, num_adjacent={self.num_adjacent}, "
            f"count_keys_once={self.count_keys_once}, redraw={self.redraw}, seed={self.seed}, "
            f"similarity={self.similarity!r}, res_scale={self.res_scale}"
        )

    def forward(self, x: Float[Tensor, "b c h w"], state: object = None) -> Float[Tensor, "b c h w"]:
        """Return `x` plus its attention, for any h, w >= 1; in training, draw new hashes once.

        Raises:
            SharingError: `state` is given.
            ShapeError: `x` is not a map of `embed_dim` channels.
        """
        reject_state(self, state)
        check_map(x, self.embed_dim)
        query = self.scale_logits(tokens(self.embed(x)).contiguous())
        pattern = cluster_pattern(
            self._hash(query).flatten(0, 1),
            chunk_size=self.chunk_size,
            num_adjacent=self.num_adjacent,
            count_keys_once=self.count_keys_once,
        )
        rows = query, query, tokens(self.value(x)).contiguous()
        attended = cluster_attention_rounds(*rows, pattern, len(self.rotations), normalize_keys=True)
        return x + self.res_scale * feature_map(attended, x)

    def _hash(self, points: Float[Tensor, "b n d"]) -> Int[Tensor, "b r n"]:
        state = HashState(self.rotations, self.num_draws)
        num_buckets = bucket_count(points.shape[1], self.chunk_size, 2 * self.rotations.shape[1])
        if self.training and self.redraw:
            return hash_step(points, state, num_buckets, seed=self.seed)
        return hash_tokens(points, state.rotations, num_buckets)
