"""Complete networks."""

from sparse_sr_attn.backbones.edsr import EDSR
from sparse_sr_attn.backbones.elan import ELAN
from sparse_sr_attn.backbones.lcoan import LCoAN
from sparse_sr_attn.backbones.rcan import RCAN

__all__ = ["EDSR", "ELAN", "RCAN", "LCoAN"]
