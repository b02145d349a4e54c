"""Any network of BasicSR with attention in its trunk, by option file."""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from sparse_sr_attn import attach
from sparse_sr_attn.checkpoints.foreign import ATTENDED, carry_options


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
    return with_attention(built, network, attention, body)


def with_attention(built: nn.Module, network: Mapping[str, Any], attention: Any, body: str | None) -> nn.Module:
    """Put attention into a network, which then carries the options of `Attended` in its state dict.

    Args:
        built: the network.
        network: its options, with `type`.
        attention: see `Attended`.
        body: see `Attended`.
    """
    if attention is None:
        return built
    attach(built, body, attention)
    carry_options(built, {"type": ATTENDED, "network": network, "attention": attention, "body": body})
    return built
