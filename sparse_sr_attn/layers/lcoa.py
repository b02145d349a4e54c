"""LCoA: a sparse pattern learnt by k-means (LSP) and attention that reuses it in later layers (CoA).

Zhao et al., "Efficient Learnable Collaborative Attention for Single Image Super-Resolution", arXiv 2404.04922. Written
from the paper and from the behaviour of the released code; each departure is listed in `docs/deviations.md`.
"""

from typing import Any, ClassVar, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparse_sr_attn.config import (
    Finite,
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    UnitInterval,
    checked,
    takes_options_of,
)
from sparse_sr_attn.errors import ConfigError, Problem
from sparse_sr_attn.functional._torch import working_precision
from sparse_sr_attn.functional.cluster import (
    apply_cluster_weights,
    cluster_attention_rounds,
    cluster_pattern,
    cluster_weights_rounds,
    with_nearest_chunks,
)
from sparse_sr_attn.functional.cluster.order import chain_rank, order_clusters
from sparse_sr_attn.functional.kmeans import KMeansState, hash_directions, initial_state
from sparse_sr_attn.layers.base import (
    LAYERS,
    AttentionLayer,
    ScaledCosine,
    Similarity,
    check_map,
    check_state,
    feature_map,
    output_proj,
    tokens,
)
from sparse_sr_attn.layers.running_state import KMeansModule, KMeansRound, state_of
from sparse_sr_attn.states import ClusterAttention, ClusterPattern

_SOURCE = "Zhao et al., arXiv 2404.04922"
Routing = Literal["kmeans", "lsh"]
"""How tokens find their cluster."""

ClusterOrder = Literal["chain", "index"]
"""In which order clusters are sorted."""

Neighbors = Literal["ring", "nearest"]
"""Which other chunks a chunk sees."""

Reuse = Literal["auto", "weights", "pattern"]
"""What a state keeps for later layers."""

_HINT = "call shared = LCoA(...).attend(x) and pass it: coa(x, shared)"


class Choice(nn.Module):
    """A choice of a pattern, passed on: a place for forward hooks, which can record it or put another in its place."""

    def forward(self, chosen: Tensor, *reasons: object) -> Tensor:
        """Return `chosen`; `reasons` are what it was chosen by, for hooks."""
        return chosen


@LAYERS.register("LSP", kind="provider", source=_SOURCE)
class LSP(KMeansModule):
    r"""Learnable sparse pattern: cluster the tokens of a map, and attend within chunks of similar ones.

    $$E = \mathrm{conv}_{3\times3}(x), \quad c_i = \arg\max_k \langle e_i, \mu_k \rangle, \quad
    P_t = \mathrm{softmax}(\tau \hat E_t [\hat E_{t-a}, \dots, \hat E_{t+a}]^\top)$$

    One embedding is query and key; $\tau$, the exponential of a learnt number, makes cosines sharp. Tokens sorted by
    cluster are cut into chunks; each sees its own and the adjacent ones. Similar clusters are neighbours. In training,
    each forward moves the centroids once.

    Args:
        embed_dim: channels of the feature map, >= 1.
        num_clusters: centroids, >= 1; more than there are tokens is allowed.
        chunk_size: sorted tokens that attend to each other, >= 1; cut to the number of tokens.
        reduction: `embed_dim` over the length of queries and keys, >= 1; at least one channel stays.
        num_adjacent: neighbouring chunks seen on each side, >= 0; of `neighbors="nearest"`, half of how many.
        neighbors: "ring" for the chunks beside a chunk; "nearest" for as many whose mean keys are most similar to its
            own, wherever they stand (`functional.cluster.with_nearest_chunks`). With smaller chunks and more of them,
            it sees more of what matters.
        ema_decay: share of the old centroid that an update keeps, in [0, 1]; 1 freezes the centroids, as published.
        reseed_threshold: a cluster used less than this fraction of the mean is reseeded; 0 switches that off, as
            published.
        exact_keys: count every key once; `False` is the published counting, of a ring.
        similarity: "cosine" for $\tau$ times the cosine, or "dot", as published: the query is raw, so its length is the
            temperature, and the key has unit length.
        logit_scale: $\tau$ at first, > 0; it is learnt, and at most 100. Only with "cosine".
        cluster_order: "chain" puts similar clusters beside each other (`functional.cluster.order`); "index" keeps the
            order of their indices, which means nothing, as published.
        routing: "kmeans", or "lsh" for a locality-sensitive hash with `num_clusters` buckets that never learns, the
            paper's ablation: the centroids are the directions of the hash.
        num_rounds: patterns from different seeds, >= 1; a token attends in each, and they are merged by how much
            similar each finds. Time and memory grow with it.
        seed: of the first centroids, which are random unit vectors.
        reuse: what later layers get: "weights", which cost memory; "pattern", with the query and the key, of which each
            computes the weights again; "auto": weights on the CPU, where that is faster, else the pattern.
        half_weights: keep weights as bfloat16, and let later layers gather their values in it too: half the memory,
            and faster where the machine multiplies bfloat16; relative error 4e-3.

    Raises:
        ConfigError: an option breaks its rule; all that do are named.

    Note:
        `state_dict` holds all that is needed to go on: centroids, their usage, and the update not applied yet.

    Source:
        LSP of arXiv 2404.04922, published with reduction 1, 128 clusters, chunks of 384. The default width of queries
        and chunks follows NLSA (Mei et al., CVPR 2021). Deviations 1-6 and 8-10 of `docs/deviations.md`.

    Examples:
        >>> state = LSP(64, chunk_size=36)(torch.rand(1, 64, 12, 12))
        >>> state.pattern.order.shape, state.weights.shape  # 4 chunks of 36 tokens, each sees 3 chunks
        (torch.Size([1, 144]), torch.Size([1, 4, 36, 108]))
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
        neighbors: Neighbors = "ring",
        ema_decay: UnitInterval = 0.999,
        reseed_threshold: NonNegative = 0.01,
        exact_keys: bool = True,
        similarity: Similarity = "cosine",
        logit_scale: Positive = 10.0,
        cluster_order: ClusterOrder = "chain",
        routing: Routing = "kmeans",
        num_rounds: PositiveInt = 1,
        seed: int = 0,
        reuse: Reuse = "auto",
        half_weights: bool = False,
    ) -> None:
        super().__init__()
        if neighbors == "nearest" and not exact_keys:
            rule = "must be 'ring' with exact_keys=False, whose published counting is of a ring, got 'nearest'"
            raise ConfigError([Problem("neighbors", rule)])
        self.embed_dim = embed_dim
        self.similarity = similarity
        self.cluster_order = cluster_order
        self.chunk_size = chunk_size
        self.num_adjacent = num_adjacent
        self.neighbors = neighbors
        self.ema_decay = ema_decay
        self.reseed_threshold = reseed_threshold
        self.exact_keys = exact_keys
        self.routing = routing
        self.reuse = reuse
        self.half_weights = half_weights
        query_dim = max(1, embed_dim // reduction)
        self.embed = nn.Conv2d(embed_dim, query_dim, 3, padding=1)
        self.scale_logits = ScaledCosine(logit_scale) if similarity == "cosine" else nn.Identity()
        self.cluster_choice, self.neighbor_choice = Choice(), Choice()
        # The first round's state stands here, under the names that files have; the others' in modules of their own.
        self.further_rounds = nn.ModuleList(KMeansRound() for _ in range(num_rounds - 1))
        for turn, module in enumerate(self._rounds()):
            state = initial_state(num_clusters, query_dim, seed + turn)
            if routing == "lsh":
                state = state._replace(centroids=hash_directions(num_clusters, query_dim, seed + turn))
            for name, value in state._asdict().items():
                module.register_buffer(name, value)
            if cluster_order == "chain":
                rank = chain_rank(state.centroids)
                module.register_buffer("rank", rank.to(state.usage.device))

    @property
    def has_raw_queries(self) -> bool:
        """Whether the length of the features sets the temperature."""
        return self.similarity == "dot"

    def extra_repr(self) -> str:
        """Return the options that shapes do not show."""
        return (
            f"num_clusters={len(self.centroids)}, chunk_size={self.chunk_size}, num_adjacent={self.num_adjacent}, "
            f"neighbors={self.neighbors!r}, ema_decay={self.ema_decay}, reseed_threshold={self.reseed_threshold}, "
            f"exact_keys={self.exact_keys}, similarity={self.similarity!r}, cluster_order={self.cluster_order!r}, "
            f"routing={self.routing!r}, reuse={self.reuse!r}, half_weights={self.half_weights}"
        )

    def forward(self, x: Float[Tensor, "b c h w"], *, reuse: Reuse | None = None) -> ClusterAttention:
        """Return the pattern of `x` with its weights or, as `reuse` chooses, what they are made of, for any h, w >= 1.

        Args:
            x: the map.
            reuse: instead of the layer's own, for this call.

        Raises:
            ShapeError: `x` is not a map of `embed_dim` channels.
        """
        embedding, pattern = self.route(x)
        (height, width), num_rounds, reuse = x.shape[-2:], self.num_rounds, reuse or self.reuse
        if reuse == "pattern" or (reuse == "auto" and x.device.type != "cpu"):
            return ClusterAttention(pattern, height, width, num_rounds, embedding=embedding)
        dtype = torch.bfloat16 if self.half_weights else None
        return ClusterAttention(pattern, height, width, num_rounds, _weights(embedding, pattern, num_rounds, dtype))

    @property
    def num_rounds(self) -> int:
        """Patterns of each sample."""
        return 1 + len(self.further_rounds)

    def route(self, x: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b n d"], ClusterPattern]:
        """Return the embedding of `x`, in float32 at least, and its pattern; in training the centroids move once.

        Raises:
            ShapeError: `x` is not a map of `embed_dim` channels.
        """
        check_map(x, self.embed_dim)
        embedding = tokens(self.embed(x)).contiguous()
        embedding = self.scale_logits(embedding.to(working_precision(embedding)))
        assignments, places = [], []
        for state, rank in self._states_and_orders():
            assignment = self.assign_points(embedding, state)
            assignments.append(self.cluster_choice(assignment, embedding, state.centroids))
            if rank is not None:
                if self.updates_state():
                    order_clusters(state.centroids, state.num_updates, rank)
                places.append(rank[assignments[-1]])
        pattern = cluster_pattern(
            torch.stack(assignments, dim=1).flatten(0, 1),
            chunk_size=self.chunk_size,
            num_adjacent=self.num_adjacent,
            exact_keys=self.exact_keys,
            place=torch.stack(places, dim=1).flatten(0, 1) if places else None,
        )
        if self.neighbors == "nearest":
            keys = _each_round(embedding, self.num_rounds)
            nearest = with_nearest_chunks(pattern, keys).neighbors
            pattern = pattern._replace(neighbors=self.neighbor_choice(nearest, pattern, keys))
        return embedding, pattern

    @torch.no_grad()
    def order_clusters(self) -> None:
        """Let the order of the clusters follow the centroids at once, as it does in training now and then."""
        for state, rank in self._states_and_orders():
            if rank is not None:
                rank.copy_(chain_rank(state.centroids))

    def _rounds(self) -> list[nn.Module]:
        return [self, *self.further_rounds]

    def updates_state(self) -> bool:
        """Return whether a forward would move the centroids now."""
        return self.training and self.routing == "kmeans" and self.ema_decay < 1

    def states(self) -> list[KMeansState]:
        """Return the state of k-means of each round, the buffers themselves."""
        return [state for state, _ in self._states_and_orders()]

    def _states_and_orders(self) -> list[tuple[KMeansState, Tensor | None]]:
        # The further rounds are called, so that tools that keep buffers elsewhere (offloading) bring them.
        own = state_of(self), self._buffers.get("rank")
        return [own, *(further() for further in self.further_rounds)]


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

    Examples:
        >>> lsp, coa, x = LSP(64), CoA(64), torch.rand(1, 64, 12, 12)
        >>> coa(x, lsp(x)).shape
        torch.Size([1, 64, 12, 12])
    """

    requires: ClassVar[type | None] = ClusterAttention

    @checked
    def __init__(self, embed_dim: PositiveInt, *, res_scale: Finite = 0.1, zero_init: bool = False) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.res_scale = res_scale
        self.value = output_proj(embed_dim, zero_init=zero_init)

    def extra_repr(self) -> str:
        """Return the options that shapes do not show."""
        return f"res_scale={self.res_scale}"

    def forward(self, x: Float[Tensor, "b c h w"], state: ClusterAttention | None = None) -> Float[Tensor, "b c h w"]:
        """Return `x` plus the values that the state's weights gather.

        Raises:
            SharingError: `state` is missing or no ClusterAttention.
            ShapeError: `x` is not a map of `embed_dim` channels, or the state was made for another size.
        """
        check_map(x, self.embed_dim)
        state = check_state(state, ClusterAttention, x, _HINT)
        values, num_rounds = tokens(self.value(x)).contiguous(), state.num_rounds
        if state.weights is None:
            attended = _attend(cast(Tensor, state.embedding), values, state.pattern, num_rounds)
        else:
            attended = apply_cluster_weights(state.weights, _each_round(values, num_rounds), state.pattern)
            attended = attended if num_rounds == 1 else attended.unflatten(0, (-1, num_rounds)).sum(dim=1)
        return torch.add(x, feature_map(attended, x), alpha=self.res_scale)


@LAYERS.register("LCoA", kind="layer", source=_SOURCE)
class LCoA(AttentionLayer):
    """Learnable collaborative attention: an LSP and a CoA in one drop-in layer.

    `y = LCoA(64)(x)` on its own; `first.attend(x)` gives the state that later `CoA`s read, and `first(x, shared)`
    uses it instead of computing it again.

    Args:
        embed_dim: channels of the feature map, >= 1.
        res_scale: factor on the attention; 0 switches it off.
        zero_init: start as the identity.
        options: those of `LSP`: `num_clusters`, `chunk_size`, `similarity`, ...

    Raises:
        ConfigError: an option breaks its rule; all that do are named.

    Note:
        Alone, on the CPU, it stores no weights: memory stays at a few feature maps. A state keeps `3 * chunk_size`
        numbers a token and round (with `num_adjacent` 1), or `embed_dim / reduction` a token if it keeps the pattern.

    Source:
        arXiv 2404.04922; see `LSP` and `CoA`.

    Examples:
        >>> first, later, x = LCoA(64), CoA(64), torch.rand(1, 64, 12, 12)
        >>> first(x).shape
        torch.Size([1, 64, 12, 12])
        >>> shared = first.attend(x)
        >>> later(first(x, shared), shared).shape
        torch.Size([1, 64, 12, 12])
    """

    provides: ClassVar[type | None] = ClusterAttention

    @checked
    @takes_options_of(LSP)
    def __init__(
        self, embed_dim: PositiveInt, *, res_scale: Finite = 0.1, zero_init: bool = False, **options: Any
    ) -> None:
        super().__init__()
        self.lsp = LSP(embed_dim, **options)
        self.coa = CoA(embed_dim, res_scale=res_scale, zero_init=zero_init)
        self.zero_init = zero_init

    @property
    def has_raw_queries(self) -> bool:
        """Whether the length of the features sets the temperature."""
        return self.lsp.has_raw_queries

    def attend(self, x: Float[Tensor, "b c h w"]) -> ClusterAttention:
        """Return the pattern of `x` with what `reuse` chooses; in training this moves the centroids once."""
        return self.lsp(x)

    def forward(self, x: Float[Tensor, "b c h w"], state: ClusterAttention | None = None) -> Float[Tensor, "b c h w"]:
        """Return `x` plus what it attends to: by `state` if given, else by its own pattern.

        Raises:
            SharingError: `state` is no ClusterAttention.
            ShapeError: `x` is not a map of `embed_dim` channels, or the state was made for another size.
        """
        if state is None:
            state = self.lsp(x, reuse="pattern")  # read once: no weights are stored
        return self.coa(x, state)

    def make_consumer(self) -> CoA:
        """Return a fresh `CoA` of this width, `res_scale` and `zero_init`."""
        return CoA(self.coa.embed_dim, res_scale=self.coa.res_scale, zero_init=self.zero_init)


def weights_of(state: ClusterAttention) -> Float[Tensor, "br k i j"]:
    """Return the weights of a state, computed if it does not hold them.

    Examples:
        >>> weights_of(LCoA(64, chunk_size=36).attend(torch.rand(1, 64, 12, 12))).shape
        torch.Size([1, 4, 36, 108])
    """
    if state.weights is not None:
        return state.weights
    return _weights(cast(Tensor, state.embedding), state.pattern, state.num_rounds)


def _weights(embedding: Tensor, pattern: ClusterPattern, num_rounds: int, dtype: torch.dtype | None = None) -> Tensor:
    return cluster_weights_rounds(embedding, embedding, pattern, num_rounds, normalize_keys=True, dtype=dtype)


def _attend(embedding: Tensor, values: Tensor, pattern: ClusterPattern, num_rounds: int) -> Tensor:
    return cluster_attention_rounds(embedding, embedding, values, pattern, num_rounds, normalize_keys=True)


def _each_round(rows: Float[Tensor, "b n c"], num_rounds: int) -> Float[Tensor, "br n c"]:
    return rows if num_rounds == 1 else rows.repeat_interleave(num_rounds, dim=0)
