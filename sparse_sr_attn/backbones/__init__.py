"""Complete networks."""

from sparse_sr_attn.backbones.edsr import EDSR
from sparse_sr_attn.backbones.elan import ELAN
from sparse_sr_attn.backbones.lcoan import LCoAN
from sparse_sr_attn.backbones.presets import PRESETS, Preset, create_model
from sparse_sr_attn.backbones.rcan import RCAN

__all__ = ["EDSR", "ELAN", "PRESETS", "RCAN", "LCoAN", "Preset", "create_model"]
