"""Attention layers, each registered under the name that users write."""

from sparse_sr_attn.layers.base import LAYERS, AttentionLayer
from sparse_sr_attn.layers.build import build_layer, find_layer, list_layers
from sparse_sr_attn.layers.category import CategoryAttention
from sparse_sr_attn.layers.enla import ENLA
from sparse_sr_attn.layers.gmsa import GMSA, SharedGMSA
from sparse_sr_attn.layers.hspa import HSPA
from sparse_sr_attn.layers.lcoa import LSP, CoA, LCoA
from sparse_sr_attn.layers.nla import NLA
from sparse_sr_attn.layers.nlsa import NLSA
from sparse_sr_attn.layers.running_state import one_kmeans_update
from sparse_sr_attn.layers.shift_conv import LFE, ShiftConv2d

__all__ = [
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
    "find_layer",
    "list_layers",
    "one_kmeans_update",
]
