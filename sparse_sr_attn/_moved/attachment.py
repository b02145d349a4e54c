"""Moved to `sparse_sr_attn.backbones.attach`; the old name goes with the next release."""

import warnings

from sparse_sr_attn.backbones.attach import *  # noqa: F403

warnings.warn("sparse_sr_attn.attachment is sparse_sr_attn.backbones.attach now", FutureWarning, stacklevel=2)
