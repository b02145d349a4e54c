"""Long-range attention that image super-resolution networks can afford.

from sparse_sr_attn import LCoA
y = LCoA(64)(x)  # any (b, 64, h, w)

Importing the package imports nothing else, not even torch; each name imports its module on first use.
"""

import importlib
from typing import TYPE_CHECKING

import sparse_sr_attn._moved  # noqa: F401  (modules under their old names)

if TYPE_CHECKING:
    from sparse_sr_attn.backbones import EDSR, ELAN, RCAN, LCoAN
    from sparse_sr_attn.backbones.attach import attach, detach
    from sparse_sr_attn.blocks import ELAB
    from sparse_sr_attn.checkpoints.load import load_model
    from sparse_sr_attn.errors import (
        BackendError,
        CheckpointError,
        ConfigError,
        DuplicateNameError,
        ExportError,
        FormError,
        ImageError,
        ProcessError,
        ShapeError,
        SharingError,
        SparseSRError,
        TrainingError,
        UnknownNameError,
    )
    from sparse_sr_attn.inference.tiling import upscale_tiled
    from sparse_sr_attn.layers import (
        ENLA,
        GMSA,
        HSPA,
        LAYERS,
        LFE,
        LSP,
        NLA,
        NLSA,
        AttentionLayer,
        CategoryAttention,
        CoA,
        LCoA,
        SharedGMSA,
        ShiftConv2d,
        build_layer,
        list_layers,
        one_kmeans_update,
    )
    from sparse_sr_attn.models import PRESETS, create_model, list_models
    from sparse_sr_attn.states import ClusterAttention, ClusterPattern, WindowAttention

__version__ = "0.1.0"

__all__ = [
    "EDSR",
    "ELAB",
    "ELAN",
    "ENLA",
    "GMSA",
    "HSPA",
    "LAYERS",
    "LFE",
    "LSP",
    "NLA",
    "NLSA",
    "PRESETS",
    "RCAN",
    "AttentionLayer",
    "BackendError",
    "CategoryAttention",
    "CheckpointError",
    "ClusterAttention",
    "ClusterPattern",
    "CoA",
    "ConfigError",
    "DuplicateNameError",
    "ExportError",
    "FormError",
    "ImageError",
    "LCoA",
    "LCoAN",
    "ProcessError",
    "ShapeError",
    "SharedGMSA",
    "SharingError",
    "ShiftConv2d",
    "SparseSRError",
    "TrainingError",
    "UnknownNameError",
    "WindowAttention",
    "__version__",
    "attach",
    "build_layer",
    "create_model",
    "detach",
    "list_layers",
    "list_models",
    "load_model",
    "one_kmeans_update",
    "upscale_tiled",
]

_HOMES = {
    "backbones.attach": (
        "attach",
        "detach",
    ),
    "backbones": (
        "EDSR",
        "ELAN",
        "RCAN",
        "LCoAN",
    ),
    "blocks": ("ELAB",),
    "checkpoints": ("load_model",),
    "errors": (
        "CheckpointError",
        "ConfigError",
        "DuplicateNameError",
        "ExportError",
        "BackendError",
        "FormError",
        "ImageError",
        "ProcessError",
        "ShapeError",
        "SharingError",
        "SparseSRError",
        "TrainingError",
        "UnknownNameError",
    ),
    "inference": ("upscale_tiled",),
    "layers": (
        "ENLA",
        "GMSA",
        "HSPA",
        "LAYERS",
        "LFE",
        "LSP",
        "NLA",
        "NLSA",
        "AttentionLayer",
        "CategoryAttention",
        "CoA",
        "LCoA",
        "SharedGMSA",
        "ShiftConv2d",
        "build_layer",
        "list_layers",
        "one_kmeans_update",
    ),
    "models": (
        "PRESETS",
        "create_model",
        "list_models",
    ),
    "states": (
        "ClusterAttention",
        "ClusterPattern",
        "WindowAttention",
    ),
}
"""The modules that define the public names."""

_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    """Import a public name, or a module of the package, on first access."""
    if name in _HOME:
        value: object = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    if not name.startswith("_"):
        try:
            return importlib.import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
