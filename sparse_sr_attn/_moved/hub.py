"""Moved to `sparse_sr_attn.checkpoints.hub`; the old name goes with the next release."""

import warnings

from sparse_sr_attn.checkpoints.hub import *  # noqa: F403

warnings.warn("sparse_sr_attn.hub is sparse_sr_attn.checkpoints.hub now", FutureWarning, stacklevel=2)
