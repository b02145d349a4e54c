"""LCoA: a sparse pattern learnt by k-means (LSP) and attention that reuses it in later layers (CoA).

Zhao et al., "Efficient Learnable Collaborative Attention for Single Image Super-Resolution", arXiv 2404.04922. Written
from the paper and from the behaviour of the released code; each departure is listed in `docs/deviations.md`.
"""

from typing import ClassVar

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_sr_attn.config import Finite, NonNegative, NonNegativeInt, PositiveInt, UnitInterval, checked
from sparse_sr_attn.errors import ShapeError, SharingError
from sparse_sr_attn.functional.cluster import (
    apply_cluster_weights,
    cluster_attention,
    cluster_pattern,
    cluster_weights,
)
from sparse_sr_attn.functional.cluster_layout import score_precision
from sparse_sr_attn.functional.kmeans import KMeansState, assign, initial_state, kmeans_step
from sparse_sr_attn.layers.base import LAYERS, AttentionLayer
from sparse_sr_attn.states import ClusterAttention, ClusterPattern

_SOURCE = "Zhao et al., arXiv 2404.04922"
_KEY_EPS = 5e-5  # published floor of a key's length


@LAYERS.register("LSP", kind="provider", source=_SOURCE)
class LSP(nn.Module):
    r"""Learnable sparse pattern: cluster the tokens of a map, and attend within chunks of similar ones.

    $$E = \mathrm{conv}_{3\times3}(x), \quad c_i = \arg\max_k \langle e_i, \mu_k \rangle, \quad
    P_t = \mathrm{softmax}(E_t [\hat E_{t-a}, \dots, \hat E_{t+a}]^\top)$$

    One embedding is query (raw: its length is a learnt temperature) and key (unit length). Tokens sorted by cluster are
    cut into chunks; each sees its own and the adjacent ones. In training, each forward moves the centroids once.

    Args:
        embed_dim: channels of the feature map, >= 1.
        num_clusters: centroids, >= 1; more than there are tokens is allowed.
        chunk_size: sorted tokens that attend to each other, >= 1; cut to the number of tokens.
        reduction: `embed_dim` over the length of queries and keys, >= 1; at least one channel stays.
        num_adjacent: neighbouring chunks seen on each side, >= 0.
        ema_decay: share of the old centroid that an update keeps, in [0, 1]; 1 freezes the centroids, as published.
        reseed_threshold: a cluster used less than this fraction of the mean is reseeded; 0 switches that off, as
            published.
        exact_keys: count every key once; `False` is the published counting.
        seed: of the first centroids, which are random unit vectors.

    Raises:
        ConfigError: an option breaks its rule; all that do are named.

    Note:
        `state_dict` holds all that is needed to go on: centroids, their usage, and the update not applied yet.

    Source:
        LSP of arXiv 2404.04922, published with reduction 1, 128 clusters, chunks of 384. The default width of queries
        and chunks follows NLSA (Mei et al., CVPR 2021). Deviations 1-6 and 8-10 of `docs/deviations.md`.
    """

    centroids: Tensor
    usage: Tensor
    pending_sums: Tensor
    pending_counts: Tensor
    pending_seeds: Tensor
    num_updates: Tensor
    num_skipped: Tensor

    @checked
    def __init__(
        self,
        embed_dim: PositiveInt,
        *,
        num_clusters: PositiveInt = 128,
        chunk_size: PositiveInt = 144,
        reduction: PositiveInt = 4,
        num_adjacent: NonNegativeInt = 1,
        ema_decay: UnitInterval = 0.999,
        reseed_threshold: NonNegative = 0.01,
        exact_keys: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.chunk_size = chunk_size
        self.num_adjacent = num_adjacent
        self.ema_decay = ema_decay
        self.reseed_threshold = reseed_threshold
        self.exact_keys = exact_keys
        query_dim = max(1, embed_dim // reduction)
        self.embed = nn.Conv2d(embed_dim, query_dim, 3, padding=1)
        for name, value in initial_state(num_clusters, query_dim, seed)._asdict().items():
            self.register_buffer(name, value)

    def extra_repr(self) -> str:
        """Return the options that shapes do not show."""
        return (
            f"num_clusters={len(self.centroids)}, chunk_size={self.chunk_size}, num_adjacent={self.num_adjacent}, "
            f"ema_decay={self.ema_decay}, reseed_threshold={self.reseed_threshold}, exact_keys={self.exact_keys}"
        )

    def forward(self, x: Float[Tensor, "b c h w"]) -> ClusterAttention:
        """Return the pattern of `x` and its weights, for any h, w >= 1.

        Raises:
            ShapeError: `x` is not a map of `embed_dim` channels.
        """
        query, key, pattern = self.route(x)
        return ClusterAttention(pattern, cluster_weights(query, key, pattern), *x.shape[-2:])

    def route(
        self, x: Float[Tensor, "b c h w"]
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b n d"], ClusterPattern]:
        """Return (query, key, pattern) of `x`; in training this moves the centroids once.

        Raises:
            ShapeError: `x` is not a map of `embed_dim` channels.
        """
        _check_map(x, self.embed_dim)
        embedding = _tokens(self.embed(x))
        query = embedding.to(score_precision(embedding))
        if self.training and self.ema_decay < 1:
            assignment = kmeans_step(
                query, self._kmeans(), ema_decay=self.ema_decay, reseed_threshold=self.reseed_threshold
            )
        else:
            assignment = assign(query, self.centroids)
        pattern = cluster_pattern(
            assignment, chunk_size=self.chunk_size, num_adjacent=self.num_adjacent, exact_keys=self.exact_keys
        )
        return query, F.normalize(query, dim=-1, eps=_KEY_EPS), pattern

    def _kmeans(self) -> KMeansState:
        return KMeansState(*(getattr(self, name) for name in KMeansState._fields))


@LAYERS.register("CoA", kind="consumer", source=_SOURCE)
class CoA(AttentionLayer):
    r"""Collaborative attention: $x + \rho\,P\,\mathrm{conv}_{1\times1}(x)$ with the weights $P$ of another layer.

    Args:
        embed_dim: channels of the feature map, >= 1; that of the provider may differ.
        res_scale: $\rho$, factor on the attention; 0 switches it off.
        zero_init: start with a zero value convolution, hence as the identity.

    Raises:
        ConfigError: an option breaks its rule; all that do are named.

    Note:
        Gradient flows into the state, hence into the one query/key convolution of all who share it.

    Source:
        CoA of arXiv 2404.04922. Deviation 7: it has no query convolution, which the released one has and never uses.
    """

    requires: ClassVar[type | None] = ClusterAttention

    @checked
    def __init__(self, embed_dim: PositiveInt, *, res_scale: Finite = 0.1, zero_init: bool = False) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.res_scale = res_scale
        self.value = nn.Conv2d(embed_dim, embed_dim, 1)
        if zero_init:
            nn.init.zeros_(self.value.weight)
            nn.init.zeros_(self.value.bias)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """Return the options that shapes do not show."""
        return f"res_scale={self.res_scale}"

    def forward(self, x: Float[Tensor, "b c h w"], state: ClusterAttention | None = None) -> Float[Tensor, "b c h w"]:
        """Return `x` plus the values that the state's weights gather.

        Raises:
            SharingError: `state` is missing or no ClusterAttention.
            ShapeError: `x` is not a map of `embed_dim` channels, or the state was made for another size.
        """
        _check_map(x, self.embed_dim)
        state = _fitting(state, x)
        return self.add(x, apply_cluster_weights(state.weights, self.values(x), state.pattern))

    def values(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n c"]:
        """Return the value of each token."""
        return _tokens(self.value(x))

    def add(self, x: Float[Tensor, "b c h w"], attended: Float[Tensor, "b n c"]) -> Float[Tensor, "b c h w"]:
        """Return the residual sum."""
        return x + self.res_scale * rearrange(attended, "b (h w) c -> b c h w", h=x.shape[-2])


@LAYERS.register("LCoA", kind="layer", source=_SOURCE)
class LCoA(AttentionLayer):
    """Learnable collaborative attention: an LSP and a CoA in one drop-in layer.

    `y = LCoA(64)(x)` on its own; `first.attend(x)` gives the state that later `CoA`s read, and `first(x, shared)`
    uses it instead of computing it again.

    Args:
        embed_dim: channels of the feature map, >= 1.
        num_clusters: as in `LSP`.
        chunk_size: as in `LSP`.
        reduction: as in `LSP`.
        num_adjacent: as in `LSP`.
        ema_decay: as in `LSP`.
        reseed_threshold: as in `LSP`.
        exact_keys: as in `LSP`.
        seed: as in `LSP`.
        res_scale: as in `CoA`.
        zero_init: as in `CoA`.

    Raises:
        ConfigError: an option breaks its rule; all that do are named.

    Note:
        Alone it stores no weights: memory stays at a few feature maps. A state keeps `3 * chunk_size` numbers a token.

    Source:
        arXiv 2404.04922; see `LSP` and `CoA`.
    """

    provides: ClassVar[type | None] = ClusterAttention

    @checked
    def __init__(
        self,
        embed_dim: PositiveInt,
        *,
        num_clusters: PositiveInt = 128,
        chunk_size: PositiveInt = 144,
        reduction: PositiveInt = 4,
        num_adjacent: NonNegativeInt = 1,
        ema_decay: UnitInterval = 0.999,
        reseed_threshold: NonNegative = 0.01,
        exact_keys: bool = True,
        seed: int = 0,
        res_scale: Finite = 0.1,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        self.lsp = LSP(
            embed_dim,
            num_clusters=num_clusters,
            chunk_size=chunk_size,
            reduction=reduction,
            num_adjacent=num_adjacent,
            ema_decay=ema_decay,
            reseed_threshold=reseed_threshold,
            exact_keys=exact_keys,
            seed=seed,
        )
        self.coa = CoA(embed_dim, res_scale=res_scale, zero_init=zero_init)
        self.zero_init = zero_init

    def attend(self, x: Float[Tensor, "b c h w"]) -> ClusterAttention:
        """Return the pattern and weights of `x`; in training this moves the centroids once."""
        state: ClusterAttention = self.lsp(x)
        return state

    def forward(self, x: Float[Tensor, "b c h w"], state: ClusterAttention | None = None) -> Float[Tensor, "b c h w"]:
        """Return `x` plus what it attends to: by `state` if given, else by its own pattern.

        Raises:
            SharingError: `state` is no ClusterAttention.
            ShapeError: `x` is not a map of `embed_dim` channels, or the state was made for another size.
        """
        if state is not None:
            output: Tensor = self.coa(x, state)
            return output
        query, key, pattern = self.lsp.route(x)
        return self.coa.add(x, cluster_attention(query, key, self.coa.values(x), pattern))

    def make_consumer(self) -> CoA:
        """Return a fresh `CoA` of this width, `res_scale` and `zero_init`."""
        return CoA(self.coa.embed_dim, res_scale=self.coa.res_scale, zero_init=self.zero_init)


def _tokens(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n c"]:
    return rearrange(x, "b c h w -> b (h w) c")


def _check_map(x: Tensor, embed_dim: int) -> None:
    if x.ndim != 4 or x.shape[1] != embed_dim or 0 in x.shape[2:]:
        raise ShapeError(
            f"x must be a feature map (b, {embed_dim}, h >= 1, w >= 1), because embed_dim is {embed_dim}; "
            f"got shape {tuple(x.shape)}"
        )


def _fitting(state: object, x: Tensor) -> ClusterAttention:
    """Return the state, if it is one and was made for maps of this size."""
    if not isinstance(state, ClusterAttention):
        got = "none" if state is None else f"a {type(state).__name__}"
        raise SharingError(
            f"CoA needs the state of another layer, a ClusterAttention, got {got}; "
            "call shared = LCoA(...).attend(x) and pass it: coa(x, shared)"
        )
    made_for = (state.pattern.order.shape[0], state.height, state.width)
    if made_for != (x.shape[0], *x.shape[2:]):
        b, h, w = made_for
        raise ShapeError(
            f"a state fits maps of the size it was made for: it was made for {b} of {h}x{w}, "
            f"got {x.shape[0]} of {x.shape[2]}x{x.shape[3]}"
        )
    return state
