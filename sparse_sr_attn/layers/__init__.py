"""Attention layers, each registered under the name that users write."""

from sparse_sr_attn.layers.base import LAYERS, AttentionLayer, build_layer
from sparse_sr_attn.layers.lcoa import LSP, CoA, LCoA

__all__ = ["LAYERS", "LSP", "AttentionLayer", "CoA", "LCoA", "build_layer"]
