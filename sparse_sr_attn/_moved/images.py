"""Moved to `sparse_sr_attn.data.images`; the old name goes with the next release."""

import warnings

from sparse_sr_attn.data.images import *  # noqa: F403
from sparse_sr_attn.inference.upscale import network_input, upscale_image  # noqa: F401

warnings.warn("sparse_sr_attn.images is sparse_sr_attn.data.images now", FutureWarning, stacklevel=2)
