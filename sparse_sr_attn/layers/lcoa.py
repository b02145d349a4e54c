"""LCoA: a sparse pattern learnt by k-means (LSP) and attention that reuses it in later layers (CoA).

Zhao et al., "Efficient Learnable Collaborative Attention for Single Image Super-Resolution", arXiv 2404.04922. Written
from the paper and the behaviour of the released code; deviations are listed in `docs/deviations.md`.
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
from sparse_sr_attn.errors import ConfigError
from sparse_sr_attn.functional._torch import working_precision
from sparse_sr_attn.functional.backend import runs_kernels
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
    add_rows,
    check_map,
    check_state,
    in_own_precision,
    output_proj,
    stored_precision,
    tokens,
)
from sparse_sr_attn.layers.running_state import KMeansModule, KMeansRound, state_of
from sparse_sr_attn.states import ClusterAttention, ClusterPattern

_SOURCE = "Zhao et al., arXiv 2404.04922"
Routing = Literal["kmeans", "lsh"]
"""How tokens are assigned to clusters."""

ClusterOrder = Literal["chain", "index"]
"""The order of the clusters."""

Neighbors = Literal["ring", "nearest"]
"""The other chunks that a chunk sees."""

Reuse = Literal["auto", "weights", "pattern"]
"""What a state stores for later layers."""

_HINT = "call shared = LCoA(...).attend(x) and pass it: coa(x, shared)"


class Choice(nn.Module):
    """Passes a choice of a pattern on, so that forward hooks can record or replace it."""

    def forward(self, chosen: Tensor, *reasons: object) -> Tensor:
        """Return `chosen`; `reasons` are the inputs of the choice, for hooks."""
        return chosen


@LAYERS.register("LSP", kind="provider", source=_SOURCE)
class LSP(KMeansModule):
    r"""Learnable sparse pattern: cluster the tokens of a map and attend within chunks of similar tokens.

    $$E = \mathrm{conv}_{3\times3}(x), \quad c_i = \arg\max_k \langle e_i, \mu_k \rangle, \quad
    P_t = \mathrm{softmax}(\tau \hat E_t [\hat E_{t-a}, \dots, \hat E_{t+a}]^\top)$$

    One embedding is both query and key; the learnt $\tau$ sharpens the cosines. Tokens are sorted by cluster and cut
    into chunks; each attends to its own chunk and the adjacent ones. Similar clusters are neighbours. In training, each
    forward pass updates the centroids once.

    Args:
        embed_dim: channels of the feature map, >= 1.
        num_clusters: number of centroids, >= 1; may exceed the number of tokens.
        chunk_size: sorted tokens that attend to each other, >= 1; at most the number of tokens is used.
        reduction: ratio of `embed_dim` to the channels of queries and keys, >= 1; at least one channel is kept.
        num_adjacent: neighbouring chunks seen on each side, >= 0; with `neighbors="nearest"`, half their number.
        neighbors: "ring" for the adjacent chunks; "nearest" for as many chunks whose mean keys are most similar,
            anywhere in the map (`functional.cluster.with_nearest_chunks`). This works best with more, smaller chunks.
        ema_decay: weight of the old centroid in an update, in [0, 1]; 1 freezes the centroids, as published.
        reseed_threshold: a cluster used less than this fraction of the mean is reseeded; 0 disables reseeding, as
            published.
        count_keys_once: count every key once; `False` counts as published, with a ring only.
        similarity: "cosine" for $\tau$ times the cosine; "dot", as published, for a raw query, whose norm acts as the
            temperature, and a unit-length key.
        logit_scale: initial $\tau$, > 0; it is learnt, and at most 100. Only with "cosine".
        cluster_order: "chain" makes similar clusters neighbours (`functional.cluster.order`); "index", as published,
            sorts them by index, which is arbitrary.
        routing: "kmeans", or "lsh" for the paper's ablation, a fixed locality-sensitive hash with `num_clusters`
            buckets whose directions are the centroids.
        num_rounds: patterns from different seeds, >= 1. A token attends in each; rounds with more similar keys get more
            weight. Time and memory grow with it.
        seed: seed of the initial centroids, which are random unit vectors.
        reuse: what later layers receive: "weights", which cost memory; "pattern", with query and key, from which each
            layer recomputes the weights; "auto" for weights on the CPU, where they are faster, and else the pattern.
        weights_dtype: "bfloat16" to store weights, and to multiply values by them in later layers, in this precision.
            Takes half the memory and is faster on hardware with bfloat16 products; relative error 4e-3. `None` for the
            precision of the softmax; if values are in bfloat16 (under autocast, for instance), weights are always
            stored so, without further error.

    Raises:
        ConfigError: options are invalid; the message names all of them.

    Note:
        `state_dict` holds all that is needed to resume: centroids, their usage, and the pending update.

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
        count_keys_once: bool = True,
        similarity: Similarity = "cosine",
        logit_scale: Positive = 10.0,
        cluster_order: ClusterOrder = "chain",
        routing: Routing = "kmeans",
        num_rounds: PositiveInt = 1,
        seed: int = 0,
        reuse: Reuse = "auto",
        weights_dtype: Literal["bfloat16"] | None = None,
    ) -> None:
        super().__init__()
        if neighbors == "nearest" and not count_keys_once:
            rule = "must be 'ring' with count_keys_once=False, because that counting needs a ring, got 'nearest'"
            raise ConfigError.at("neighbors", rule)
        self.embed_dim = embed_dim
        self.similarity = similarity
        self.cluster_order = cluster_order
        self.chunk_size = chunk_size
        self.num_adjacent = num_adjacent
        self.neighbors = neighbors
        self.ema_decay = ema_decay
        self.reseed_threshold = reseed_threshold
        self.count_keys_once = count_keys_once
        self.routing = routing
        self.reuse = reuse
        self.weights_dtype = weights_dtype
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
        """Whether queries are unscaled features, whose norm acts as the temperature."""
        return self.similarity == "dot"

    def extra_repr(self) -> str:
        """Return the options that are not visible from shapes."""
        return (
            f"num_clusters={len(self.centroids)}, chunk_size={self.chunk_size}, num_adjacent={self.num_adjacent}, "
            f"neighbors={self.neighbors!r}, ema_decay={self.ema_decay}, reseed_threshold={self.reseed_threshold}, "
            f"count_keys_once={self.count_keys_once}, similarity={self.similarity!r}, "
            f"cluster_order={self.cluster_order!r}, routing={self.routing!r}, reuse={self.reuse!r}, "
            f"weights_dtype={self.weights_dtype!r}"
        )

    def forward(self, x: Float[Tensor, "b c h w"], *, reuse: Reuse | None = None) -> ClusterAttention:
        """Compute the pattern of `x` with its weights or, by `reuse`, its embedding, for any h, w >= 1.

        Args:
            x: the feature map.
            reuse: overrides the option of the layer for this call.

        Raises:
            ShapeError: `x` is not a map of `embed_dim` channels.
        """
        embedding, pattern = self.route(x)
        (height, width), num_rounds, reuse = x.shape[-2:], self.num_rounds, reuse or self.reuse
        if reuse == "pattern" or (reuse == "auto" and x.device.type != "cpu"):
            return ClusterAttention(pattern, height, width, num_rounds, embedding=embedding)
        dtype = torch.bfloat16 if self.weights_dtype == "bfloat16" else stored_precision(x)
        return ClusterAttention(pattern, height, width, num_rounds, _weights(embedding, pattern, num_rounds, dtype))

    @property
    def num_rounds(self) -> int:
        """Number of patterns per sample."""
        return 1 + len(self.further_rounds)

    def route(self, x: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b n d"], ClusterPattern]:
        """Return the embedding of `x`, in float32 or higher, and its pattern; in training, update the centroids once.

        Raises:
            ShapeError: `x` is not a map of `embed_dim` channels.
        """
        check_map(x, self.embed_dim)
        # Rounded to bfloat16, some tokens would go to other clusters.
        embedding = tokens(in_own_precision(self.embed, x))
        if self.similarity == "dot" or not runs_kernels(x.device):  # the kernel that scales rows reads any memory
            embedding = embedding.contiguous().to(working_precision(embedding))
        embedding = self.scale_logits(embedding)
        assignments, ranks = [], []
        for state, rank in self._states_and_orders():
            assignment = self.assign_points(embedding, state)
            assignments.append(self.cluster_choice(assignment, embedding, state.centroids))
            if rank is not None:
                if self.updates_state():
                    order_clusters(state.centroids, state.num_updates, rank)
                ranks.append(rank)
        pattern = cluster_pattern(
            assignments[0] if self.num_rounds == 1 else torch.stack(assignments, dim=1).flatten(0, 1),
            chunk_size=self.chunk_size,
            num_adjacent=self.num_adjacent,
            count_keys_once=self.count_keys_once,
            rank=(ranks[0][None] if len(ranks) == 1 else torch.stack(ranks)) if ranks else None,
        )
        if self.neighbors == "nearest":
            keys = _each_round(embedding, self.num_rounds)
            nearest = with_nearest_chunks(pattern, keys).neighbors
            pattern = pattern._replace(neighbors=self.neighbor_choice(nearest, pattern, keys))
        return embedding, pattern

    @torch.no_grad()
    def order_clusters(self) -> None:
        """Update the order of the clusters to the centroids now; training does this after some updates."""
        for state, rank in self._states_and_orders():
            if rank is not None:
                rank.copy_(chain_rank(state.centroids))

    def _rounds(self) -> list[nn.Module]:
        return [self, *self.further_rounds]

    def updates_state(self) -> bool:
        """Return whether a forward pass would update the centroids now."""
        return self.training and self.routing == "kmeans" and self.ema_decay < 1

    def states(self) -> list[KMeansState]:
        """Return the k-means state of each round; its tensors are the buffers."""
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
        res_scale: $\rho$, factor on the attention; 0 disables it.
        zero_init: initialise the value convolution with zeros, so that the layer starts as the identity.

    Raises:
        ConfigError: options are invalid; the message names all of them.

    Note:
        Gradients flow into the state, hence into the query/key convolution of the provider.

    Source:
        CoA of arXiv 2404.04922. Deviation 7: the unused query convolution of the released code is omitted.

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
        """Return the options that are not visible from shapes."""
        return f"res_scale={self.res_scale}"

    def forward(self, x: Float[Tensor, "b c h w"], state: ClusterAttention | None = None) -> Float[Tensor, "b c h w"]:
        """Return `x` plus its values weighted by the state.

        Raises:
            SharingError: `state` is not a ClusterAttention.
            ShapeError: `x` is not a map of `embed_dim` channels, or the state was computed for another size.
        """
        check_map(x, self.embed_dim)
        state = check_state(state, ClusterAttention, x, _HINT)
        values, num_rounds = tokens(self.value(x)).contiguous(), state.num_rounds
        if state.weights is None:
            rows = cast(Tensor, state.embedding)
            attended = cluster_attention_rounds(rows, rows, values, state.pattern, num_rounds, normalize_keys=True)
        else:
            attended = apply_cluster_weights(state.weights, _each_round(values, num_rounds), state.pattern)
            attended = attended if num_rounds == 1 else attended.unflatten(0, (-1, num_rounds)).sum(dim=1)
        return add_rows(x, attended, alpha=self.res_scale)


@LAYERS.register("LCoA", kind="layer", source=_SOURCE)
class LCoA(AttentionLayer):
    """Learnable collaborative attention: an LSP and a CoA in one drop-in layer.

    Use it alone, `y = LCoA(64)(x)`, or share its state: `shared = first.attend(x)` computes the state for later `CoA`s,
    and `first(x, shared)` reuses it in the layer itself.

    Args:
        embed_dim: channels of the feature map, >= 1.
        res_scale: factor on the attention; 0 disables it.
        zero_init: start as the identity.
        options: options of `LSP`: `num_clusters`, `chunk_size`, `similarity`, ...

    Raises:
        ConfigError: options are invalid; the message names all of them.

    Note:
        Used alone on the CPU, it stores no weights and takes the memory of a few feature maps. A state holds
        `3 * chunk_size` numbers per token and round (with `num_adjacent` 1), or `embed_dim / reduction` per token if it
        stores the pattern.

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
        """Whether queries are unscaled features, whose norm acts as the temperature."""
        return self.lsp.has_raw_queries

    def attend(self, x: Float[Tensor, "b c h w"]) -> ClusterAttention:
        """Compute the state of `x`, with contents chosen by `reuse`; in training, update the centroids once."""
        return self.lsp(x)

    def forward(self, x: Float[Tensor, "b c h w"], state: ClusterAttention | None = None) -> Float[Tensor, "b c h w"]:
        """Return `x` plus its attention, with `state` if given, else with its own pattern.

        Raises:
            SharingError: `state` is not a ClusterAttention.
            ShapeError: `x` is not a map of `embed_dim` channels, or the state was computed for another size.
        """
        if state is None:
            state = self.lsp(x, reuse="pattern")  # read once: no weights are stored
        return self.coa(x, state)

    def make_consumer(self) -> CoA:
        """Create a `CoA` with the width, `res_scale` and `zero_init` of this layer."""
        return CoA(self.coa.embed_dim, res_scale=self.coa.res_scale, zero_init=self.zero_init)


def weights_of(state: ClusterAttention) -> Float[Tensor, "br k i j"]:
    """Return the weights of a state, computed if it does not store them.

    Examples:
        >>> weights_of(LCoA(64, chunk_size=36).attend(torch.rand(1, 64, 12, 12))).shape
        torch.Size([1, 4, 36, 108])
    """
    if state.weights is not None:
        return state.weights
    return _weights(cast(Tensor, state.embedding), state.pattern, state.num_rounds)


def _weights(embedding: Tensor, pattern: ClusterPattern, num_rounds: int, dtype: torch.dtype | None = None) -> Tensor:
    return cluster_weights_rounds(embedding, embedding, pattern, num_rounds, normalize_keys=True, dtype=dtype)


def _each_round(rows: Float[Tensor, "b n c"], num_rounds: int) -> Float[Tensor, "br n c"]:
    return rows if num_rounds == 1 else rows.repeat_interleave(num_rounds, dim=0)
