"""Attention layers, each registered under the name that users write."""

from sparse_sr_attn.layers.base import LAYERS, AttentionLayer, build_layer
from sparse_sr_attn.layers.gmsa import GMSA, SharedGMSA
from sparse_sr_attn.layers.lcoa import LSP, CoA, LCoA
from sparse_sr_attn.layers.shift_conv import LFE, ShiftConv2d

__all__ = [
    "GMSA",
    "LAYERS",
    "LFE",
    "LSP",
    "AttentionLayer",
    "CoA",
    "LCoA",
    "SharedGMSA",
    "ShiftConv2d",
    "build_layer",
]
