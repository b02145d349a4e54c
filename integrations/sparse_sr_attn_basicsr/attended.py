"""Any network of BasicSR with attention in its trunk, by option file."""

import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from sparse_sr_attn import attach
from sparse_sr_attn.config import read
from sparse_sr_attn.errors import ConfigError, Problem
from sparse_sr_attn.foreign import ATTENDED, carry_options

_FILES = re.compile("path|file|dir|url|load|pretrain", re.IGNORECASE)


def Attended(  # noqa: N802  (a network's name in option files)
    network: Mapping[str, Any], attention: str | Mapping[str, Any] | Sequence[Any] | None, body: str | None = None
) -> nn.Module:
    """Return a network of BasicSR's registry into whose trunk attention was put; its weights keep their names.

    Args:
        network: what would stand under `network_g` without attention: `type` and the options of the network.
        attention: a map or a list of maps, as in the option `attention` of `SparseEDSR`; `every` and `after` count the
            children of the trunk from 0. The name of a layer stands for its map with all defaults, `None` for no
            attention.
        body: path of the trunk, see `sparse_sr_attn.attach`; `None` for the only one there is.

    Raises:
        ConfigError: attention cannot be put there, or an option of it is wrong.
    """
    built: nn.Module = importlib.import_module("basicsr.archs").build_network(network)
    return _with_attention(built, network, attention, body)


class SeenThrough(dict[str, Any]):
    """Options of a network, in which look-ups that find nothing go on to the network inside, and to its defaults.

    Models of BasicSR read options of their network, such as `opt['network_g']['window_size']`. The map itself, as it is
    iterated over, copied and handed on as keywords, has what was given.

    Args:
        options: what was given.
        inside: what look-ups find besides.
    """

    def __init__(self, options: Mapping[str, Any], inside: Mapping[str, Any]) -> None:
        super().__init__(options)
        self.inside = dict(inside)

    def __missing__(self, key: str) -> Any:
        return self.inside[key]

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or key in self.inside

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value for `key`."""
        return super().get(key, self.inside.get(key, default))


def rebuilt(options: Mapping[str, Any]) -> nn.Module:
    """Return the network that weights belong to which carry these options; see `sparse_sr_attn.foreign`.

    Raises:
        ConfigError: the options are wrong, or would have the network read a file.
    """
    known = read(Attended, options)
    network = dict(known["network"])
    name = network.pop("type", None)
    for option, value in network.items():
        if isinstance(value, str) and _FILES.search(option):
            message = f"names a file, {value!r}, which is not read because weights ask for it"
            raise ConfigError([Problem(f"network.{option}", message)])
    importlib.import_module("sparse_sr_attn_basicsr.registration").register()
    importlib.import_module("basicsr.archs")
    registry = importlib.import_module("basicsr.utils.registry").ARCH_REGISTRY
    if name not in registry and f"{name}_basicsr" not in registry:
        raise ConfigError([Problem("network.type", f"BasicSR has no network named {name!r}")])
    built = registry.get(name)(**network)
    return _with_attention(built, known["network"], known["attention"], known.get("body"))


def _with_attention(built: nn.Module, network: Mapping[str, Any], attention: Any, body: str | None) -> nn.Module:
    if attention is None:
        return built
    attach(built, body, attention)
    carry_options(built, {"type": ATTENDED, "network": network, "attention": attention, "body": body})
    return built
