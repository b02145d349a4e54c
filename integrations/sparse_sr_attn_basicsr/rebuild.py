"""Rebuild networks from the options stored with their weights."""

import importlib
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from sparse_sr_attn.config import read
from sparse_sr_attn.errors import ConfigError
from sparse_sr_attn_basicsr.registration import register
from sparse_sr_attn_basicsr.with_attention import WithAttention, add_attention

_FILES = re.compile("path|file|dir|url|load|pretrain", re.IGNORECASE)


def rebuild(options: Mapping[str, Any]) -> nn.Module:
    """Return the network of BasicSR with these options of `WithAttention`, which its weights record.

    Raises:
        ConfigError: the options are invalid, or would make the network read a file.
    """
    known = read(WithAttention, options)
    network = dict(known["network"])
    name = network.pop("type", None)
    for option, value in network.items():
        if isinstance(value, str) and _FILES.search(option):
            message = f"names a file, {value!r}, which is never read on behalf of weights"
            raise ConfigError.at(f"network.{option}", message)
    register()
    importlib.import_module("basicsr.archs")
    registry = importlib.import_module("basicsr.utils.registry").ARCH_REGISTRY
    if name not in registry and f"{name}_basicsr" not in registry:
        raise ConfigError.at("network.type", f"BasicSR has no network named {name!r}")
    built = registry.get(name)(**network)
    return add_attention(built, known["network"], known["attention"], known.get("body"))
