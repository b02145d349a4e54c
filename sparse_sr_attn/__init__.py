"""Long-range attention that image super-resolution networks can afford.

from sparse_sr_attn import LCoA
y = LCoA(64)(x)  # any (b, 64, h, w)
"""

from sparse_sr_attn.backbones import EDSR, PRESETS, RCAN, LCoAN, create_model
from sparse_sr_attn.checkpoints import load_model
from sparse_sr_attn.errors import (
    CheckpointError,
    ConfigError,
    DuplicateNameError,
    ExportError,
    ImageError,
    ShapeError,
    SharingError,
    SparseSRError,
    TrainingError,
    UnknownNameError,
)
from sparse_sr_attn.inference import upscale_tiled
from sparse_sr_attn.layers import LAYERS, LSP, AttentionLayer, CoA, LCoA, build_layer
from sparse_sr_attn.states import ClusterAttention, ClusterPattern

__version__ = "0.1.0"

__all__ = [
    "EDSR",
    "LAYERS",
    "LSP",
    "PRESETS",
    "RCAN",
    "AttentionLayer",
    "CheckpointError",
    "ClusterAttention",
    "ClusterPattern",
    "CoA",
    "ConfigError",
    "DuplicateNameError",
    "ExportError",
    "ImageError",
    "LCoA",
    "LCoAN",
    "ShapeError",
    "SharingError",
    "SparseSRError",
    "TrainingError",
    "UnknownNameError",
    "__version__",
    "build_layer",
    "create_model",
    "load_model",
    "upscale_tiled",
]
