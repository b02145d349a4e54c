"""The layers that are checked: how each is built small, and combined with a partner that it needs."""

import inspect
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparse_sr_attn.registry import Entry, Registry

CHANNELS = 8
HEIGHT, WIDTH = 5, 7

SMALL: Mapping[str, object] = {
    "num_clusters": 5,
    "chunk_size": 4,
    "reduction": 2,
    "ema_decay": 0.9,
    "reseed_threshold": 0.5,
    "res_scale": 0.5,
    "window_sizes": (2, 3, 4),
    "shift": True,
    "share": 2,
    "amplification": 1.0,
}
"""Options small enough that a map of 5x7 has several chunks and windows, padded ones, and clusters that die."""


@dataclass(frozen=True)
class Subject:
    """A registered layer and how to build it small.

    Attributes:
        entry: the entry in the registry.
        partner: the provider of a consumer, or the consumer of a provider.
        shared: whether to use the layer in two steps, `layer(x, layer.attend(x))`, instead of alone.
        options: options in addition to the small ones.
    """

    entry: Entry[nn.Module]
    partner: Entry[nn.Module] | None = None
    shared: bool = False
    options: Mapping[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.entry.name} sharing" if self.shared else self.entry.name

    @property
    def kind(self) -> str:
        """Kind of the entry: layer, consumer, provider or operator."""
        return self.entry.kind

    def takes(self, option: str) -> bool:
        """Return whether the constructor has this option."""
        return option in inspect.signature(self.entry.build).parameters

    def layer(self, channels: int = CHANNELS, **options: object) -> nn.Module:
        """Build the layer alone, with reproducible weights."""
        return _build(self.entry, channels, {**self.options, **options})

    def chain(self, channels: int = CHANNELS, **options: object) -> "Chain":
        """Build the layer, with its partner if it needs one, as a module from feature map to feature map."""
        partner = None if self.partner is None else _build(self.partner, channels, {})
        return Chain(self.layer(channels, **options), partner, self.kind, self.shared)


class Chain(nn.Module):
    """A layer of any kind, wrapped as a module from feature map to feature map.

    Args:
        layer: the layer to check.
        partner: the provider of a consumer, or the consumer of a provider.
        kind: kind of the layer.
        shared: whether the layer is used through its own state.
    """

    def __init__(self, layer: nn.Module, partner: nn.Module | None, kind: str, shared: bool) -> None:
        super().__init__()
        self.layer = layer
        self.partner = partner
        self.kind = kind
        self.shared = shared

    def state(self, x: Tensor) -> Any:
        """Return the shared state."""
        if self.kind == "consumer":
            return attend(self.partner, x)
        return attend(self.layer, x)

    def read(self, x: Tensor, state: object) -> Tensor:
        """Return the output of the reader of a state."""
        reader = self.partner if self.kind == "provider" else self.layer
        assert reader is not None, "a provider without a consumer in the registry"
        return reader(x, state)

    def forward(self, x: Tensor) -> Tensor:
        """Return the feature map."""
        if self.kind in ("consumer", "provider") or self.shared:
            return self.read(x, self.state(x))
        return self.layer(x)


def attend(provider: nn.Module | None, x: Tensor) -> Any:
    """Return the state of `x` from a provider or a layer that provides one."""
    assert provider is not None, "a consumer without a provider in the registry"
    make = getattr(provider, "attend", provider)
    return make(x)


def subjects(registry: Registry[nn.Module]) -> list[Subject]:
    """Return all layers of a registry with their partners; layers that provide a state twice, alone and sharing."""
    entries = [registry.get(name) for name in registry]
    entries.sort(key=lambda entry: entry.kind != "provider")  # a partner that only provides comes first
    found = []
    for entry in entries:
        if entry.kind == "consumer":
            found.append(Subject(entry, partner=_partner(entry, [other for other in entries if _fits(other, entry)])))
        elif entry.kind == "provider":
            found.append(Subject(entry, partner=_partner(entry, [other for other in entries if _fits(entry, other)])))
        else:
            found.append(Subject(entry))
            if getattr(entry.build, "provides", None) is not None:
                found.append(Subject(entry, shared=True))
    return found


def _partner(entry: Entry[nn.Module], fitting: list[Entry[nn.Module]]) -> Entry[nn.Module]:
    if not fitting:
        raise LookupError(f"a {entry.kind} needs a partner in the registry, {entry.name} has none")
    return fitting[0]


def _fits(provider: Entry[nn.Module], consumer: Entry[nn.Module]) -> bool:
    if provider.kind not in ("provider", "layer") or consumer.kind != "consumer":
        return False
    if provider.kind == "layer" and getattr(provider.build, "provides", None) is None:
        return False
    with torch.no_grad():
        state = attend(_build(provider, CHANNELS, {}).eval(), torch.zeros(1, CHANNELS, 2, 2))
    return isinstance(state, getattr(consumer.build, "requires", ()) or ())


def _build(entry: Entry[nn.Module], channels: int, options: Mapping[str, object]) -> nn.Module:
    known = inspect.signature(entry.build).parameters
    small = {name: value for name, value in SMALL.items() if name in known}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return entry.build(channels, **{**small, **options})


def generator(seed: int, name: str) -> torch.Generator:
    """Return a CPU generator that depends only on `seed` and `name`."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))


def feature_map(
    name: str,
    batch: int = 2,
    channels: int = CHANNELS,
    height: int = HEIGHT,
    width: int = WIDTH,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return normal numbers that depend only on `name` and the size."""
    numbers = torch.randn(batch, channels, height, width, generator=generator(0, name), dtype=torch.float64)
    return numbers.to(device, dtype)
