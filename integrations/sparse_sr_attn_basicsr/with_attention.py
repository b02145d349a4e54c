"""Any network of BasicSR with attention in its trunk, by option file."""

import functools
import importlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from sparse_sr_attn import attach
from sparse_sr_attn.checkpoints.foreign import WITH_ATTENTION, carry_options


def WithAttention(  # noqa: N802  (a network's name in option files)
    network: Mapping[str, Any], attention: str | Mapping[str, Any] | Sequence[Any] | None, body: str | None = None
) -> nn.Module:
    """Return a network of BasicSR's registry with attention in its trunk; its weights keep their names.

    Args:
        network: the options of `network_g` without attention, with `type`.
        attention: a mapping or a list of mappings, as in the option `attention` of `SparseEDSR`; `every` and `after`
            count the children of the trunk from 0. The name of a layer is short for a mapping with all defaults; `None`
            for no attention.
        body: path of the trunk, see `sparse_sr_attn.attach`; `None` for the one that `attach` finds.

    Raises:
        ConfigError: the trunk cannot hold attention, or an option is invalid.
    """
    built: nn.Module = importlib.import_module("basicsr.archs").build_network(network)
    return add_attention(built, network, attention, body)


@functools.wraps(WithAttention)
def Attended(*args: Any, **kwargs: Any) -> nn.Module:  # noqa: D103, N802  (the old name of WithAttention)
    warnings.warn("type: Attended is type: WithAttention now; the old name still works", FutureWarning, stacklevel=2)
    return WithAttention(*args, **kwargs)


Attended.__name__ = "Attended"


def is_with_attention(build: object) -> bool:
    """Return whether a network's builder is `WithAttention`, by its present or its old name."""
    return build in (WithAttention, Attended)


def add_attention(built: nn.Module, network: Mapping[str, Any], attention: Any, body: str | None) -> nn.Module:
    """Insert attention into a network, whose state dict then records the options of `WithAttention`."""
    if attention is None:
        return built
    attach(built, body, attention)
    carry_options(built, {"type": WITH_ATTENTION, "network": network, "attention": attention, "body": body})
    return built
