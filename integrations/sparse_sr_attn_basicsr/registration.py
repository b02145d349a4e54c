"""Enter our networks and our model into the registries of whatever package calls itself `basicsr` here.

Nothing of it is imported but `basicsr.utils.registry` and, for the model, `basicsr.models.sr_model`: forks keep these
two and drop other parts.
"""

import importlib
import sys
from typing import Any

from sparse_sr_attn.backbones.edsr import EDSR
from sparse_sr_attn.backbones.lcoan import LCoAN
from sparse_sr_attn.backbones.rcan import RCAN
from sparse_sr_attn.errors import DuplicateNameError
from sparse_sr_attn_basicsr import shims


class SparseEDSR(EDSR):
    """`sparse_sr_attn.EDSR` under a name that is free: BasicSR has an `EDSR` of its own."""


class SparseRCAN(RCAN):
    """`sparse_sr_attn.RCAN` under a name that is free: BasicSR has an `RCAN` of its own."""


NETWORKS = (LCoAN, SparseEDSR, SparseRCAN)


def register() -> None:
    """Register `NETWORKS` as networks and `SparseSRModel` as a model. Again and again does no harm.

    May stand in a file that BasicSR's own scan imports (`basicsr/archs/*_arch.py`, `basicsr/models/*_model.py`): while
    the networks are still being scanned the model class cannot exist yet, and a function that makes it takes its
    place.

    Raises:
        DuplicateNameError: somebody else's network or model has one of these names.
    """
    shims.apply()
    registry = importlib.import_module("basicsr.utils.registry")
    for network in NETWORKS:
        _enter(registry.ARCH_REGISTRY, "network", network)
    archs = sys.modules.get("basicsr.archs")
    scanning = archs is not None and not hasattr(archs, "build_network")
    _enter(registry.MODEL_REGISTRY, "model", _later if scanning else _model())


def _model() -> Any:
    return importlib.import_module("sparse_sr_attn_basicsr.model").SparseSRModel


def _later(opt: dict[str, Any]) -> Any:
    return _model()(opt)


_later.__name__ = "SparseSRModel"


def _enter(registry: Any, noun: str, ours: Any) -> None:
    name = ours.__name__
    if name not in registry:
        registry.register(ours)
        return
    theirs = registry.get(name)
    if not _is_ours(theirs):
        raise DuplicateNameError(
            f"BasicSR's {noun} name {name!r} must be free, but {theirs.__module__}.{theirs.__qualname__} has it; "
            f"rename that one, or register a subclass of {ours.__module__}.{ours.__qualname__} under another name"
        )


def _is_ours(found: Any) -> bool:
    return str(found.__module__).partition(".")[0] in ("sparse_sr_attn", "sparse_sr_attn_basicsr")
