"""What can be measured: our layers and networks, the peers of the registry, stand-ins for the released codes."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from benchmarks.speed import standins
from benchmarks.speed.floor import Cost
from benchmarks.speed.settings import Settings
from sparse_sr_attn.backbones.elan import ELAN
from sparse_sr_attn.backbones.lcoan import LCoAN
from sparse_sr_attn.functional.window.grid import group_widths
from sparse_sr_attn.layers.base import LAYERS
from sparse_sr_attn.layers.build import build_layer
from sparse_sr_attn.layers.gmsa import GMSA
from sparse_sr_attn.layers.lcoa import CoA, LCoA
from sparse_sr_attn.layers.nlsa import NLSA
from sparse_sr_attn.models import PRESETS, create_model
from sparse_sr_attn.reference import lsh

ALLOWED_HALF = 0.02
"""Error allowed to weights and values in bfloat16, which have 8 bits."""

Kind = Literal["ours", "peer", "stand-in", "outside"]
"""Ours; a peer of the registry; a stand-in for released code; code given by `--peer`."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A method that has been built.

    Attributes:
        module: what is timed.
        provider: makes the state that the module reads, which is not timed; `None` where there is none.
        compiled: whether the module is called as `torch.compile` makes it.
    """

    module: nn.Module
    provider: nn.Module | None = None
    compiled: bool = False

    @functools.cached_property
    def function(self) -> Callable[..., Tensor]:
        """What is timed."""
        return torch.compile(self.module, fullgraph=True) if self.compiled else self.module

    def modules(self) -> list[nn.Module]:
        """Return the module, and the provider if there is one."""
        return [self.module] if self.provider is None else [self.module, self.provider]

    def state(self, x: Tensor) -> tuple[Any, ...]:
        """Return the arguments of the module after the map; a state's tensors are leaves, with gradient in training."""
        if self.provider is None:
            return ()
        with torch.no_grad():
            state = cast(Any, self.provider).attend(x)
        training = self.module.training
        return (pytree.tree_map_only(Tensor, lambda t: t.requires_grad_(training and t.is_floating_point()), state),)

    def apply(self, x: Tensor) -> Tensor:
        """Return the output, state and all."""
        return self.function(x, *self.state(x))


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        kind: whose it is.
        build: makes it, with the same weights each time.
        cost: its arithmetic for a map of so many tokens; `None` where nobody has counted.
        rivals: what it is held against, if the run has them.
        author_ratio: of a stand-in: time of the authors' code over dense SDPA at 96x96 (`docs/benchmarks-method.md`).
        valid_as: stand-ins it is made of, which must be valid.
        whole_windows: whether a map must consist of whole windows.
        allowed: error that it is allowed by what it is, as a fraction of what attention adds.
    """

    kind: Kind
    build: Callable[[Settings], Subject]
    cost: Callable[[Settings, int], Cost] | None = None
    rivals: tuple[str, ...] = ()
    author_ratio: float | None = None
    valid_as: tuple[str, ...] = ()
    whole_windows: bool = False
    allowed: float = 0.0


# --- building ---------------------------------------------------------------------------------------------------------


def _seeded(build: Callable[[], Any]) -> Any:
    """Return what `build` makes, the same weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


# What the stand-ins of the authors' code compute, so that all methods compute the same.
_PUBLISHED: dict[str, Any] = {"similarity": "dot", "cluster_order": "index"}


def _lcoa(settings: Settings, **options: Any) -> LCoA:
    chunks = {name: getattr(settings, name) for name in ("chunk_size", "num_clusters", "reduction")}
    return _seeded(lambda: LCoA(settings.embed_dim, **chunks, **_PUBLISHED, **options))


def _coa(settings: Settings) -> CoA:
    return _seeded(lambda: CoA(settings.embed_dim))


def _registered(name: str) -> Callable[[Settings], Subject]:
    return lambda settings: Subject(_seeded(lambda: build_layer(name, settings.embed_dim)))


def _shared_gmsa(settings: Settings) -> Subject:
    provider: GMSA = _registered("GMSA")(settings).module  # type: ignore[assignment]
    return Subject(_seeded(provider.make_consumer), provider)


def _plain_coa(settings: Settings) -> Subject:
    provider = standins.PlainLCoA(_lcoa(settings))
    return Subject(standins.PlainCoA(_coa(settings)), provider)


def _plain_shared_gmsa(settings: Settings) -> Subject:
    ours = _shared_gmsa(settings)
    provider = standins.PlainGMSA(cast(GMSA, ours.provider))
    return Subject(standins.PlainSharedGMSA(ours.module, provider.window_sizes, provider.shift), provider)  # type: ignore[arg-type]


def _plain(stand_in: Callable[[Any], nn.Module], name: str) -> Callable[[Settings], Subject]:
    return lambda settings: Subject(stand_in(_registered(name)(settings).module))


class Stack(nn.Module):
    """Attention layers one after the other, as a network has them; all but the first may read the state of the first.

    Args:
        layers: in order.
        sharing: whether they do.
    """

    def __init__(self, layers: Sequence[nn.Module], *, sharing: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.sharing = sharing

    def forward(self, x: Tensor) -> Tensor:
        """Return what the last layer returns."""
        state = (cast(Any, self.layers[0]).attend(x),) if self.sharing else ()
        for layer in self.layers:
            x = layer(x, *state)
        return x


_STACKED = 10


def _stack(settings: Settings, **options: Any) -> Subject:
    return Subject(Stack([_lcoa(settings, **options), *(_coa(settings) for _ in range(_STACKED - 1))], sharing=True))


def _plain_stack(settings: Settings) -> Subject:
    first = standins.PlainLCoA(_lcoa(settings))
    others = [standins.PlainCoA(_coa(settings)) for _ in range(_STACKED - 1)]
    return Subject(Stack([first, *others], sharing=True))


def _nlsa_stack(settings: Settings) -> Subject:
    return Subject(Stack([_plain_nlsa(settings).module for _ in range(_STACKED)], sharing=False))


def _plain_nlsa(settings: Settings) -> Subject:
    return _plain(standins.PlainNLSA, "NLSA")(settings)


def _network(name: str) -> Callable[[Settings], Subject]:
    options = {**_PUBLISHED, "zero_init": False} if PRESETS[name].build is LCoAN else {}
    return lambda settings: Subject(
        _calibrated(_seeded(lambda: create_model(name, upscale=settings.upscale, **options)))
    )


def _calibrated(network: nn.Module) -> nn.Module:
    """Let batch normalisation know the activations: without, ELAN amplifies the last bit to grey levels."""
    norms: list[Any] = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    if norms:
        before = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            network.train()(torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0)))
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum
    return network


def _plain_elan(name: str) -> Callable[[Settings], Subject]:
    return lambda settings: Subject(standins.PlainELAN(cast(ELAN, _network(name)(settings).module)))


def _plain_lcoan(name: str) -> Callable[[Settings], Subject]:
    def build(settings: Settings) -> Subject:
        network = _network(name)(settings).module
        for group in cast(Any, network).body:
            ours = group.attention
            group.attention = standins.PlainLCoA(ours) if isinstance(ours, LCoA) else standins.PlainCoA(ours)
        return Subject(network)

    return build


def _nlsa_lcoan(name: str) -> Callable[[Settings], Subject]:
    def build(settings: Settings) -> Subject:
        options = {**PRESETS[name].options, "share": 1, "upscale": settings.upscale}
        network = _seeded(lambda: LCoAN(**options))
        for group in network.body:
            group.attention = _Alone(standins.PlainNLSA(_seeded(lambda: NLSA(group.conv.in_channels))))  # noqa: B023
        return Subject(network)

    return build


class _Alone(nn.Module):
    """A layer that is offered a state, and needs none."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, state: None = None) -> Tensor:
        return self.layer(x)


# --- counting ---------------------------------------------------------------------------------------------------------
# n tokens, c channels, d of queries, w = 3 * chunk_size keys of a token. A product of n rows of i with i x o is 2nio.


def _cost(n: int, *, products: float, exp: float, numbers: float) -> Cost:
    """Return the cost of multiply-adds, exponentials and numbers read or written, all of them a token."""
    return Cost(2.0 * n * products, 1.0 * n * exp, 4.0 * n * numbers)


def _lcoa_cost(settings: Settings, n: int) -> Cost:
    c, d, w = settings.embed_dim, settings.query_dim, 3 * settings.chunk_size
    # x read for embedding, value and sum; embedding and value written and read twice (sorted); attention in and out.
    return _cost(
        n,
        products=9 * c * d + c * c + settings.num_clusters * d + w * (c + d),
        exp=w,
        numbers=3 * c + 3 * d + 4 * c + c,
    )


def _coa_cost(settings: Settings, n: int) -> Cost:
    c, w = settings.embed_dim, 3 * settings.chunk_size
    return _cost(n, products=c * c + w * c, exp=0, numbers=w + 2 * c + 2 * c + 2 * c + c)


def _half_coa_cost(settings: Settings, n: int) -> Cost:
    c, w = settings.embed_dim, 3 * settings.chunk_size
    cost = _cost(n, products=c * c, exp=0, numbers=w / 2 + 2 * c + 2 * c + 2 * c + c)
    return dataclasses.replace(cost, half_flop=2.0 * n * w * c)


def _pattern_coa_cost(settings: Settings, n: int) -> Cost:
    c, d, w = settings.embed_dim, settings.query_dim, 3 * settings.chunk_size
    return _cost(n, products=c * c + w * (c + d), exp=w, numbers=2 * d + 2 * c + 2 * c + 2 * c + c)


def _stack_cost(settings: Settings, n: int) -> Cost:
    first, later = _lcoa_cost(settings, n), _coa_cost(settings, n).times(_STACKED - 1)
    stored = 4.0 * n * 3 * settings.chunk_size
    return Cost(first.flop + later.flop, first.exp, first.bytes + stored + later.bytes)


def _nlsa_cost(settings: Settings, n: int) -> Cost:
    c, d, rounds, w = settings.embed_dim, settings.embed_dim // 4, 4, 3 * 144
    directions = lsh.bucket_count(n, 144, 128) // 2
    return _cost(
        n,
        products=9 * c * d + c * c + rounds * (directions * d + w * (c + d)),
        exp=rounds * w,
        numbers=3 * c + d + c + rounds * (2 * d + 3 * c) + 2 * c,
    )


def _dense_cost(settings: Settings, n: int) -> Cost:
    c, d = settings.embed_dim, settings.embed_dim // 4
    return _cost(n, products=9 * c * d + c * c + n * (c + d), exp=n, numbers=3 * c + 2 * d + 4 * c + c)


def _hspa_cost(settings: Settings, n: int) -> Cost:
    dense = _dense_cost(settings, n)
    return Cost(dense.flop, 0.0, dense.bytes)


def _enla_cost(settings: Settings, n: int) -> Cost:
    c, d, m = settings.embed_dim, settings.embed_dim // 4, 128
    return _cost(n, products=2 * c * d + c * c + 2 * m * (c + d), exp=2 * m, numbers=4 * c + 4 * d + 4 * m + 3 * c)


def _category_cost(settings: Settings, n: int) -> Cost:
    c, d, k, w = settings.embed_dim, settings.embed_dim // 4, 64, 3 * 128
    return _cost(
        n,
        products=2 * c * d + 2 * c * c + k * d + (w + k) * (c + d),
        exp=w + k,
        numbers=4 * c + 5 * d + 6 * c + 3 * c,
    )


_WINDOWS = (4, 8, 16)


def _window_products(settings: Settings) -> int:
    return sum(size**2 * width for size, width in zip(_WINDOWS, _widths(settings), strict=True))


def _widths(settings: Settings) -> list[int]:
    return group_widths(settings.embed_dim, len(_WINDOWS))


def _gmsa_cost(settings: Settings, n: int) -> Cost:
    c = settings.embed_dim
    pixels = sum(size**2 for size in _WINDOWS)
    # Fused, weights need not leave the cache.
    return _cost(n, products=3 * c * c + 2 * _window_products(settings), exp=pixels, numbers=11 * c)


def _shared_gmsa_cost(settings: Settings, n: int) -> Cost:
    c = settings.embed_dim
    pixels = sum(size**2 for size in _WINDOWS)
    return _cost(n, products=2 * c * c + _window_products(settings), exp=0, numbers=8 * c + pixels)


def _shift_cost(settings: Settings, n: int) -> Cost:
    c = settings.embed_dim
    return _cost(n, products=c * c, exp=0, numbers=2 * c)


# --- the tables -------------------------------------------------------------------------------------------------------

_OTHERS = ("plain-NLSA", "plain-LCoA", "SDPA", "NLSA", "ENLA", "CategoryAttention", "HSPA")

LAYER_METHODS: Mapping[str, Method] = {
    "LCoA": Method("ours", lambda s: Subject(_lcoa(s)), _lcoa_cost, _OTHERS),
    "CoA": Method("ours", lambda s: Subject(_coa(s), _lcoa(s, reuse="weights")), _coa_cost, ("plain-CoA", "LCoA")),
    "CoA-bf16": Method(
        "ours",
        lambda s: Subject(_coa(s), _lcoa(s, reuse="weights", weights_dtype="bfloat16")),
        _half_coa_cost,
        ("plain-CoA", "CoA"),
        allowed=ALLOWED_HALF,
    ),
    "CoA-pattern": Method(
        "ours", lambda s: Subject(_coa(s), _lcoa(s, reuse="pattern")), _pattern_coa_cost, ("plain-CoA", "CoA")
    ),
    "GMSA": Method("ours", _registered("GMSA"), _gmsa_cost, ("plain-GMSA",)),
    "SharedGMSA": Method("ours", _shared_gmsa, _shared_gmsa_cost, ("plain-SharedGMSA",)),
    "ShiftConv2d": Method("ours", _registered("ShiftConv2d"), _shift_cost, ("plain-ShiftConv2d",)),
    "LCoA-x10": Method("ours", _stack, _stack_cost, ("plain-NLSA-x10", "plain-LCoA-x10")),
    "LCoA-x10-bf16": Method(
        "ours",
        lambda s: _stack(s, reuse="weights", weights_dtype="bfloat16"),
        rivals=("plain-NLSA-x10", "plain-LCoA-x10"),
        allowed=ALLOWED_HALF,
    ),
    "NLA": Method("peer", _registered("NLA"), _dense_cost),
    "NLSA": Method("peer", _registered("NLSA"), _nlsa_cost),
    "ENLA": Method("peer", _registered("ENLA"), _enla_cost),
    "HSPA": Method("peer", _registered("HSPA"), _hspa_cost),
    "CategoryAttention": Method("peer", _registered("CategoryAttention"), _category_cost),
    "SDPA": Method("stand-in", _plain(standins.DenseSDPA, "NLA"), _dense_cost),
    "plain-NLSA": Method("stand-in", _plain_nlsa, _nlsa_cost, author_ratio=0.88),
    "plain-LCoA": Method("stand-in", lambda s: Subject(standins.PlainLCoA(_lcoa(s))), _lcoa_cost, author_ratio=0.15),
    "plain-CoA": Method("stand-in", _plain_coa, _coa_cost, author_ratio=13.2 / 232),
    "plain-GMSA": Method("stand-in", _plain(standins.PlainGMSA, "GMSA"), _gmsa_cost, whole_windows=True),
    "plain-SharedGMSA": Method("stand-in", _plain_shared_gmsa, _shared_gmsa_cost, whole_windows=True),
    "plain-ShiftConv2d": Method("stand-in", _plain(standins.PlainShiftConv2d, "ShiftConv2d"), _shift_cost),
    "plain-NLSA-x10": Method("stand-in", _nlsa_stack, valid_as=("plain-NLSA",)),
    "plain-LCoA-x10": Method("stand-in", _plain_stack, _stack_cost, valid_as=("plain-LCoA", "plain-CoA")),
}
"""Layers by name; names that begin with `plain-` are stand-ins."""

NETWORK_METHODS: Mapping[str, Method] = {
    "LCoAN": Method("ours", _network("LCoAN"), rivals=("plain-LCoAN", "plain-NLSA-LCoAN")),
    "LCoAN-light": Method("ours", _network("LCoAN-light"), rivals=("plain-LCoAN-light", "plain-NLSA-LCoAN-light")),
    "ELAN": Method("ours", _network("ELAN"), rivals=("plain-ELAN",)),
    "ELAN-light": Method("ours", _network("ELAN-light"), rivals=("plain-ELAN-light",)),
    "plain-LCoAN": Method("stand-in", _plain_lcoan("LCoAN"), valid_as=("plain-LCoA", "plain-CoA")),
    "plain-LCoAN-light": Method("stand-in", _plain_lcoan("LCoAN-light"), valid_as=("plain-LCoA", "plain-CoA")),
    "plain-NLSA-LCoAN": Method("stand-in", _nlsa_lcoan("LCoAN"), valid_as=("plain-NLSA",)),
    "plain-NLSA-LCoAN-light": Method("stand-in", _nlsa_lcoan("LCoAN-light"), valid_as=("plain-NLSA",)),
    "plain-ELAN": Method("stand-in", _plain_elan("ELAN")),
    "plain-ELAN-light": Method("stand-in", _plain_elan("ELAN-light")),
}
"""Networks by name; `plain-NLSA-LCoAN` is LCoAN with an NLSA in each group."""


def compiled(name: str, method: Method) -> Method:
    """Return a method of ours as `torch.compile` makes it, to be held against the plain one."""

    def build(settings: Settings) -> Subject:
        return dataclasses.replace(method.build(settings), compiled=True)

    return dataclasses.replace(method, build=build, rivals=(name,))


def methods_of(settings: Settings) -> dict[str, Method]:
    """Return what a run could measure: all that is built in, and layers that others have registered."""
    if settings.what == "networks":
        return dict(NETWORK_METHODS)
    registered = {
        name: Method("peer", _registered(name))
        for name in LAYERS
        if name not in LAYER_METHODS and LAYERS.get(name).kind == "layer"
    }
    return {**LAYER_METHODS, **registered}
