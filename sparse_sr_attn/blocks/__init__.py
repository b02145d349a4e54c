"""What networks are made of between their first and last convolution."""

from sparse_sr_attn.blocks.body import AttentionMap, SiteAttention, read_attention
from sparse_sr_attn.blocks.residual import ResidualBlock
from sparse_sr_attn.blocks.upsample import Upsample

__all__ = ["AttentionMap", "ResidualBlock", "SiteAttention", "Upsample", "read_attention"]
