"""Long-range attention that image super-resolution networks can afford.

from sparse_sr_attn import LCoA
y = LCoA(64)(x)  # any (b, 64, h, w)
"""

from sparse_sr_attn.attachment import attach, detach
from sparse_sr_attn.backbones import EDSR, ELAN, PRESETS, RCAN, LCoAN, create_model
from sparse_sr_attn.blocks import ELAB
from sparse_sr_attn.checkpoints import load_model
from sparse_sr_attn.errors import (
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
from sparse_sr_attn.inference import upscale_tiled
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
    one_kmeans_update,
)
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
    "load_model",
    "one_kmeans_update",
    "upscale_tiled",
]
