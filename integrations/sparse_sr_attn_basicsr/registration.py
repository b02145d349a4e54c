"""Register our networks and models with the installed package `basicsr`, BasicSR or a fork.

Only `basicsr.utils.registry` and, for the model, `basicsr.models.sr_model` are imported, which forks keep.
"""

import functools
import importlib
import inspect
import logging
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from sparse_sr_attn.backbones.edsr import EDSR
from sparse_sr_attn.backbones.elan import ELAN
from sparse_sr_attn.backbones.lcoan import LCoAN
from sparse_sr_attn.backbones.rcan import RCAN
from sparse_sr_attn.errors import DuplicateNameError
from sparse_sr_attn_basicsr import shims
from sparse_sr_attn_basicsr.losses import FFTLoss
from sparse_sr_attn_basicsr.with_attention import Attended, WithAttention


class SparseEDSR(EDSR):
    """`sparse_sr_attn.EDSR` under another name, because BasicSR has an `EDSR` of its own."""


class SparseRCAN(RCAN):
    """`sparse_sr_attn.RCAN` under another name, because BasicSR has an `RCAN` of its own."""


_LOG = logging.getLogger(__name__)

Build = Callable[..., nn.Module]

NETWORKS: tuple[Build, ...] = (ELAN, LCoAN, SparseEDSR, SparseRCAN, WithAttention, Attended)

MODELS = ("SRModel", "SRGANModel", "ESRGANModel", "RealESRNetModel", "RealESRGANModel")
"""Models of BasicSR with a counterpart `Sparse<name>`."""


def register() -> None:
    """Register `NETWORKS`, counterparts of `MODELS`, `CachedPairedImageDataset` and `FFTLoss`.

    Calling it again has no effect.

    Can be called in a file that BasicSR's scan imports (`basicsr/archs/*_arch.py`, `basicsr/models/*_model.py`). While
    networks are being scanned, model classes cannot exist yet, and functions that create them are registered instead.
    If BasicSR has a network by one of our names, ours is registered as `<name>_sparse_sr_attn`, and the log says so.

    Raises:
        DuplicateNameError: another model has the name of one of ours.
    """
    shims.apply()
    registry = importlib.import_module("basicsr.utils.registry")
    for name, network in names().items():
        if name not in registry.ARCH_REGISTRY:
            if name != network.__name__:
                _LOG.warning("this BasicSR has a %s of its own; ours is %s", network.__name__, name)
            registry.ARCH_REGISTRY.register(network if name == network.__name__ else _renamed(network, name))
    archs = sys.modules.get("basicsr.archs")
    scanning = archs is not None and not hasattr(archs, "build_network")
    for name in MODELS:
        model = _later(name) if scanning else _model(name)
        if model is not None:
            _enter_model(registry.MODEL_REGISTRY, model)
    if _CACHED not in registry.DATASET_REGISTRY:
        data = sys.modules.get("basicsr.data")
        scanned = data is None or hasattr(data, "build_dataset")
        registry.DATASET_REGISTRY.register(_dataset() if scanned else _dataset_later)
    if "FFTLoss" not in registry.LOSS_REGISTRY:  # forks that have one log it themselves
        registry.LOSS_REGISTRY.register(FFTLoss)


def names() -> dict[str, Build]:
    """Return our networks by their names in the registry of this BasicSR."""
    registry = importlib.import_module("basicsr.utils.registry").ARCH_REGISTRY
    return {
        network.__name__
        if network.__name__ not in registry or _is_ours(registry.get(network.__name__))
        else f"{network.__name__}_sparse_sr_attn": network
        for network in NETWORKS
    }


def _renamed(network: Build, name: str) -> Build:
    if inspect.isclass(network):
        return type(name, (network,), {"__module__": __name__, "__doc__": network.__doc__})
    renamed = functools.update_wrapper(functools.partial(network), network)
    renamed.__name__ = name
    return renamed


@functools.cache
def _model(name: str) -> Any:
    """Return our counterpart of a model of BasicSR; `None` if this BasicSR lacks the model."""
    model = importlib.import_module("sparse_sr_attn_basicsr.model")
    return model.SparseSRModel if name == "SRModel" else model.variant(name)


def _later(name: str) -> Callable[[dict[str, Any]], Any]:
    def build(opt: dict[str, Any]) -> Any:
        return _model(name)(opt)

    build.__name__ = f"Sparse{name}"
    return build


def _dataset() -> Any:
    return importlib.import_module("sparse_sr_attn_basicsr.datasets").CachedPairedImageDataset


def _dataset_later(opt: dict[str, Any]) -> Any:
    return _dataset()(opt)


_CACHED = _dataset_later.__name__ = "CachedPairedImageDataset"


def _enter_model(registry: Any, ours: Any) -> None:
    name = ours.__name__
    if name not in registry:
        registry.register(ours)
        return
    theirs = registry.get(name)
    if not _is_ours(theirs):
        raise DuplicateNameError(
            f"BasicSR's model name {name!r} must be free, but {theirs.__module__}.{theirs.__qualname__} has it; "
            "rename that one"
        )


def _is_ours(found: Any) -> bool:
    return str(found.__module__).partition(".")[0] in ("sparse_sr_attn", "sparse_sr_attn_basicsr")
