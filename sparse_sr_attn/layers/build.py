"""Find a layer by name, registered here or in timm, and build it."""

from fnmatch import fnmatch
from typing import Any

from torch import nn

from sparse_sr_attn.errors import UnknownNameError
from sparse_sr_attn.layers.base import LAYERS
from sparse_sr_attn.layers.timm_layers import timm_entry
from sparse_sr_attn.registry import Entry

_LAYER_OF_NETWORK = {"elan": "ELAB", "elan-light": "ELAB", "lcoan": "LCoA", "lcoan-light": "LCoA", "nlsn": "NLSA"}
"""The layer to suggest for the name of a network, in lower case."""


def find_layer(name: str) -> Entry[nn.Module]:
    """Return the entry of a registered layer or, for `timm:<name>`, of a layer of timm.

    Raises:
        UnknownNameError: there is no layer of that name.
        ConfigError: timm is not installed, or its layer does not accept feature maps of any size.

    Examples:
        >>> find_layer("LCoA").build is LCoA
        True
    """
    if isinstance(name, str) and name.startswith("timm:"):
        return timm_entry(name)
    layer = _LAYER_OF_NETWORK.get(str(name).casefold())
    if layer is not None and name not in LAYERS:
        raise UnknownNameError(f"no layer named {name!r}, which is a network; did you mean {layer!r}, its layer?")
    return LAYERS.get(name)


def list_layers(pattern: str = "*") -> list[str]:
    """Return the names that `build_layer` knows, without those of timm.

    Args:
        pattern: shell-style pattern that the names match.

    Examples:
        >>> list_layers("*CoA")
        ['CoA', 'LCoA']
    """
    return [name for name in LAYERS if fnmatch(name, pattern)]


def build_layer(name: str, embed_dim: int, **options: Any) -> nn.Module:
    """Build the layer called `name` for feature maps of `embed_dim` channels.

    Args:
        name: a registered name, or `timm:<name>` for a layer of timm.
        embed_dim: channels, >= 1.
        **options: options of the layer.

    Raises:
        UnknownNameError: there is no layer of that name.
        ConfigError: an option is invalid, or the layer of timm cannot be used.

    Examples:
        >>> layer = build_layer("LCoA", 64, num_clusters=32, chunk_size=16)
        >>> layer(torch.rand(1, 64, 12, 12)).shape
        torch.Size([1, 64, 12, 12])
    """
    return find_layer(name).build(embed_dim, **options)
