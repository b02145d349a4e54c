"""The building blocks of networks between their first and last convolution."""

from sparse_sr_attn.blocks.attention_config import AttentionConfig, read_attention, read_trunk
from sparse_sr_attn.blocks.body import SiteAttention
from sparse_sr_attn.blocks.elab import ELAB
from sparse_sr_attn.blocks.residual import ResidualBlock, ResidualGroup
from sparse_sr_attn.blocks.upsample import Upsample

__all__ = [
    "ELAB",
    "AttentionConfig",
    "ResidualBlock",
    "ResidualGroup",
    "SiteAttention",
    "Upsample",
    "read_attention",
    "read_trunk",
]
