"""Captured mass: the share of dense attention that falls on the keys of a sparse pattern.

A pattern is given by a string like `LCoA:num_clusters=64,num_adjacent=4`: a kind from `KINDS` and options of its layer.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sparse_sr_attn.backbones.trunks import evaluating
from sparse_sr_attn.checkpoints.foreign import network_name
from sparse_sr_attn.config import ProblemList, read
from sparse_sr_attn.errors import ConfigError, ShapeError
from sparse_sr_attn.functional.cluster import cluster_pattern, seen_keys
from sparse_sr_attn.functional.l2_normalize import l2_normalize
from sparse_sr_attn.functional.lsh import bucket_count, hash_tokens
from sparse_sr_attn.functional.window.grid import WindowGrid
from sparse_sr_attn.layers.base import AttentionLayer, tokens
from sparse_sr_attn.layers.category import CategoryAttention
from sparse_sr_attn.layers.lcoa import LSP
from sparse_sr_attn.layers.nlsa import NLSA
from sparse_sr_attn.layers.running_state import KMeansModule
from sparse_sr_attn.registry import suggestion
from sparse_sr_attn.states import ClusterPattern

_SCORES_PER_BLOCK = 2**22


class Setting(NamedTuple):
    """The input that a pattern is built for.

    Attributes:
        features: a map of unit vectors, which are both query and key of each token.
        num_keys: number of keys that a token may see.
        steps: steps of k-means on these features.
        seed: seed of hashes and initial centroids.
        trained: the layer that computed the features, if it is an LSP.
    """

    features: Float[Tensor, "1 d h w"]
    num_keys: int
    steps: int
    seed: int
    trained: LSP | None


Visible = Callable[[Int[Tensor, "s"]], Bool[Tensor, "s n"]]
"""A function from some queries to a mask of the tokens that each sees."""


# --- patterns ---------------------------------------------------------------------------------------------------------


def _lcoa(setting: Setting, **options: Any) -> Visible:
    """LCoA with k-means fitted to the image."""
    lsp = LSP(setting.features.shape[1], reduction=1, ema_decay=0.0, seed=setting.seed, **options)
    _fit(lsp, setting)
    lsp.order_clusters()
    return _routed(lsp, setting)


def _trained(setting: Setting) -> Visible:
    """LCoA as trained: its centroids and options, for `num_keys` keys."""
    if setting.trained is None:
        raise ConfigError.at("", "pattern 'trained' needs features of an LSP (of an LCoA)")
    lsp = deepcopy(setting.trained).eval()
    lsp.embed_dim = setting.features.shape[1]
    return _routed(lsp, setting)


def _nlsa(setting: Setting, **options: Any) -> Visible:
    """NLSA: buckets of a hash drawn for each image."""
    layer = NLSA(setting.features.shape[1], reduction=1, seed=setting.seed, **options)
    points, chunk_size = tokens(setting.features), _chunk_size(layer, setting.num_keys)
    num_buckets = bucket_count(points.shape[1], chunk_size, 2 * layer.rotations.shape[1])
    buckets = hash_tokens(points, layer.rotations.to(points.device), num_buckets).flatten(0, 1)
    return _clustered(cluster_pattern(buckets, chunk_size=chunk_size, num_adjacent=layer.num_adjacent))


def _category(setting: Setting, **options: Any) -> Visible:
    """The tokens that CategoryAttention attends to individually, with k-means fitted to the image."""
    layer = CategoryAttention(setting.features.shape[1], reduction=1, ema_decay=0.0, seed=setting.seed, **options)
    assignment = _fit(layer, setting)
    chunk_size = _chunk_size(layer, setting.num_keys)
    return _clustered(cluster_pattern(assignment, chunk_size=chunk_size, num_adjacent=layer.num_adjacent))


def _windows(setting: Setting) -> Visible:
    """Square windows of at most `num_keys` pixels."""
    side = math.isqrt(setting.num_keys)
    height, width = setting.features.shape[2:]
    window = WindowGrid(height, width, side).slots(0, setting.features.device) // side**2
    return lambda queries: window[queries, None] == window


def _raster(setting: Setting) -> Visible:
    """Chunks of tokens in image order, with adjacent chunks."""
    nobody = torch.zeros_like(tokens(setting.features)[..., 0], dtype=torch.int64)
    return _clustered(cluster_pattern(nobody, chunk_size=max(1, setting.num_keys // 3)))


class Kind(NamedTuple):
    """A kind of patterns.

    Attributes:
        show: function that builds the pattern.
        layer: the layer whose options it takes; `None` if it takes none.
    """

    show: Callable[..., Visible]
    layer: type[nn.Module] | None = None


KINDS: Mapping[str, Kind] = {
    "LCoA": Kind(_lcoa, LSP),
    "trained": Kind(_trained),
    "NLSA": Kind(_nlsa, NLSA),
    "CategoryAttention": Kind(_category, CategoryAttention),
    "windows": Kind(_windows),
    "raster": Kind(_raster),
}

PATTERNS = (
    "LCoA",
    "LCoA:num_clusters=32",
    "LCoA:num_clusters=64",
    "LCoA:num_clusters=256",
    "LCoA:cluster_order=index",
    "LCoA:num_clusters=16,cluster_order=index",
    "LCoA:num_clusters=32,cluster_order=index",
    "LCoA:num_clusters=64,cluster_order=index",
    "LCoA:num_clusters=64,num_adjacent=4",
    "LCoA:num_clusters=128,num_adjacent=4",
    "LCoA:neighbors=nearest,num_adjacent=4",
    "LCoA:num_clusters=64,neighbors=nearest,num_adjacent=4",
    "LCoA:num_clusters=64,num_rounds=2",
    "LCoA:num_clusters=64,routing=lsh",
    "trained",
    "NLSA:num_rounds=1",
    "NLSA:num_rounds=4",
    "CategoryAttention",
    "windows",
    "raster",
)
"""The patterns compared by default."""

_SET_HERE = {
    "chunk_size": "follows from the number of keys",
    "reduction": "has no effect: the features are queries and keys",
    "ema_decay": "has no effect: k-means is fitted to the image",
    "redraw": "has no effect: a new hash is drawn for each image",
    "categories": "must be kmeans: a dictionary must be trained",
    "seed": "is the number of the image",
}


@dataclass(frozen=True)
class Pattern:
    """A pattern by its name.

    Attributes:
        name: the string that it was given by.
        show: function that returns the keys of each query.
    """

    name: str
    show: Callable[[Setting], Visible]


def read_patterns(names: Iterable[str], *, num_keys: int) -> list[Pattern]:
    """Parse the names of patterns.

    Args:
        names: each a kind of `KINDS`, or `kind:option=value,option=value` with options of its layer.
        num_keys: number of keys that a token may see.

    Raises:
        ConfigError: a kind is unknown, an option is invalid, or `num_keys` is smaller than the number of chunks that a
            token sees.
    """
    problems, patterns = ProblemList(), []
    for name in dict.fromkeys(names):
        try:
            patterns.append(_read(name, num_keys))
        except ConfigError as error:
            for problem in error.problems:
                problems.add(name, str(problem))
    problems.raise_if_any()
    return patterns


def _read(name: str, num_keys: int) -> Pattern:
    label, _, text = name.partition(":")
    if label not in KINDS:
        raise ConfigError.at("", f"no such pattern{suggestion(label, list(KINDS))}")
    (show, layer), options = KINDS[label], {}
    for item in filter(None, text.split(",")):
        option, equals, value = item.partition("=")
        if not equals:
            raise ConfigError.at("", f"options must be option=value,option=value, got {item!r}")
        if option in _SET_HERE:
            raise ConfigError.at(option, _SET_HERE[option])
        try:
            options[option] = json.loads(value)
        except ValueError:
            options[option] = value
    if layer is not None:
        options = read(layer, options, given=1)
        _chunk_size(layer(1, **options), num_keys)
    elif options:
        raise ConfigError.at(next(iter(options)), f"{label} has no options")
    return Pattern(name, partial(show, **options))


def _chunk_size(layer: Any, num_keys: int) -> int:
    """Return the chunk size with which a token sees at most `num_keys` slots in all rounds together."""
    num_rounds = len(layer.rotations) if isinstance(layer, NLSA) else getattr(layer, "num_rounds", 1)
    num_chunks = int(num_rounds * (2 * layer.num_adjacent + 1))
    if num_keys < num_chunks:
        raise ConfigError.at("", f"a token sees {num_chunks} chunks, which need as many keys; got {num_keys}")
    return num_keys // num_chunks


def _fit(layer: KMeansModule, setting: Setting) -> Int[Tensor, "b n"]:
    """Fit k-means of a layer to the features from randomly drawn tokens; return the clusters of the first round."""
    points = tokens(setting.features)
    layer.to(points.device).train()
    assignments = []
    for turn, state in enumerate(layer.states()):
        if layer.updates_state():
            generator = torch.Generator().manual_seed(setting.seed + turn)
            drawn = torch.randperm(points.shape[1], generator=generator)[: len(state.centroids)].to(points.device)
            state.centroids[: len(drawn)] = points[0, drawn]
            for _ in range(setting.steps):  # each applies what the one before it has found
                layer.assign_points(points, state)
        assignments.append(layer.assign_points(points, state))
    layer.eval()
    return assignments[0]


def _routed(lsp: LSP, setting: Setting) -> Visible:
    """Return the visible keys for a layer applied directly to the features."""
    lsp.embed = nn.Identity()  # type: ignore[assignment]
    lsp.chunk_size = _chunk_size(lsp, setting.num_keys)
    return _clustered(lsp.route(setting.features)[1])


def _clustered(pattern: ClusterPattern) -> Visible:
    """Return the visible keys for the patterns of one map, one per round."""
    num_tokens = pattern.order.shape[1]

    def visible(queries: Tensor) -> Tensor:
        table = torch.zeros(len(queries), num_tokens + 1, dtype=torch.bool, device=queries.device)
        for keys, counts in zip(*seen_keys(pattern, queries), strict=True):
            table.scatter_(1, keys.masked_fill(~counts, num_tokens), True)
        return table[:, :-1]

    return visible


# --- features ---------------------------------------------------------------------------------------------------------


def attention_features(model: nn.Module, image: Float[Tensor, "*b c h w"]) -> dict[str, Float[Tensor, "_ h2 w2"]]:
    """Return the features that each attention layer of `model` compares tokens by on `image`.

    Args:
        model: a network with attention layers. It is run in evaluation mode; its mode is restored.
        image: `(c, h, w)` or `(1, c, h, w)`.

    Returns:
        For each layer that computes attention, by its name in `model`: the embedding that is both query and key (LSP,
        NLSA, NLA, HSPA), or the layer's input if it has no such embedding. Layers that only read a state are omitted.

    Raises:
        ValueError: `model` has no attention layer, or its forward runs none.
    """
    batch = image[None] if image.ndim == 3 else image
    features: dict[str, Tensor] = {}
    hooks = []
    for name, layer in model.named_modules():
        if not _computes(layer) or any(map(_computes, list(layer.modules())[1:])):  # an ELAB, an LCoA: their parts do
            continue
        embed = getattr(layer, "embed", None)
        if isinstance(embed, nn.Module):
            hooks.append(
                embed.register_forward_hook(lambda _, __, output, name=name: features.__setitem__(name, output[0]))
            )
        else:
            hooks.append(
                layer.register_forward_pre_hook(lambda _, args, name=name: features.__setitem__(name, args[0][0]))
            )
    with evaluating(model):
        model(batch)
    for hook in hooks:
        hook.remove()
    if not features:
        raise ValueError(
            f"features of attention need a network with attention layers, and {network_name(model)} runs none"
        )
    return features


def _computes(module: nn.Module) -> bool:
    """Return whether a module computes attention of its own."""
    return isinstance(module, LSP) or (isinstance(module, AttentionLayer) and not module.requires)


# --- mass -------------------------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """The result for one pattern.

    Attributes:
        num_keys: mean number of different keys that a token sees.
        mass: share of dense attention that falls on them, averaged over tokens.
    """

    num_keys: float
    mass: float


class Capture(NamedTuple):
    """The results for several patterns on one map.

    Attributes:
        entropy: mean entropy of dense attention, relative to log(tokens), that of uniform attention.
        best: mass captured by the `num_keys` largest weights of each token.
        patterns: the result for each pattern, by name.
    """

    entropy: float
    best: float
    patterns: dict[str, Seen]


@torch.no_grad()
def captured_mass(
    features: Float[Tensor, "c h w"],
    patterns: Iterable[Pattern],
    *,
    num_keys: int = 432,
    temperature: float = 10.0,
    steps: int = 10,
    seed: int = 0,
    trained: LSP | None = None,
) -> Capture:
    r"""Return the share of dense attention that falls on the keys of each pattern.

    $$m = \frac{1}{n} \sum_i \sum_{j \in S_i} P_{ij}, \quad P = \mathrm{softmax}(\tau \hat F \hat F^\top)$$

    with unit-length features $\hat F$ and the keys $S_i$ of token $i$ in the pattern.

    Args:
        features: a feature map, e.g. from `attention_features`.
        patterns: from `read_patterns`, for the same number of keys.
        num_keys: number of keys that a token may see, >= 1. Chunks and windows have the largest size within it. A key
            in several rounds counts in each.
        temperature: $\tau$, > 0.
        steps: steps of k-means on the features, >= 0.
        seed: seed of hashes and of the tokens that k-means starts from.
        trained: the LSP that computed the features, for the pattern `trained`.

    Raises:
        ShapeError: `features` is not a map of at least two tokens.
        ValueError: a feature is not finite, or a number is out of range.
        ConfigError: pattern `trained` is requested without `trained`.

    Note:
        Time grows with the square of the number of tokens; memory grows linearly, because rows are computed in blocks.
    """
    if features.ndim != 3 or features.shape[0] < 1 or features.shape[1] * features.shape[2] < 2:
        raise ShapeError(f"features must be a map (c, h, w) of two tokens or more, got shape {tuple(features.shape)}")
    if not features.isfinite().all():
        raise ValueError("features must be finite, got infinities or NaN")
    if num_keys < 1 or not 0 < temperature < math.inf or steps < 0:
        raise ValueError(
            f"num_keys must be >= 1, temperature > 0 and finite, steps >= 0; got {num_keys=}, {temperature=}, {steps=}"
        )
    units = l2_normalize(tokens(features[None]))[0]
    maps = units.T.unflatten(1, features.shape[1:])[None].contiguous()
    setting = Setting(maps, num_keys, steps, seed, trained)
    visible = {pattern.name: pattern.show(setting) for pattern in patterns}
    num_tokens = len(units)
    entropy = best = 0.0
    mass, keys = dict.fromkeys(visible, 0.0), dict.fromkeys(visible, 0)
    for queries in torch.arange(num_tokens, device=units.device).split(max(1, _SCORES_PER_BLOCK // num_tokens)):
        weights = (temperature * units[queries] @ units.T).softmax(dim=-1)
        entropy += float(torch.special.entr(weights).double().sum())
        best += float(weights.topk(min(num_keys, num_tokens), sorted=False).values.double().sum())
        for name, show in visible.items():
            table = show(queries)
            mass[name] += float((weights * table).sum(dim=-1).double().sum())
            keys[name] += int(table.sum())
    return Capture(
        entropy / num_tokens / math.log(num_tokens),
        best / num_tokens,
        {name: Seen(keys[name] / num_tokens, mass[name] / num_tokens) for name in visible},
    )
