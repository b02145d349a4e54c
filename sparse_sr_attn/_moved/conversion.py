"""Moved to `sparse_sr_attn.checkpoints.convert`; the old name goes with the next release."""

import warnings

from sparse_sr_attn.checkpoints.convert import *  # noqa: F403

warnings.warn("sparse_sr_attn.conversion is sparse_sr_attn.checkpoints.convert now", FutureWarning, stacklevel=2)
