"""Moved to `sparse_sr_attn.data.metrics`; the old name goes with the next release."""

import warnings

from sparse_sr_attn.data.metrics import *  # noqa: F403

warnings.warn("sparse_sr_attn.evaluation is sparse_sr_attn.data.metrics now", FutureWarning, stacklevel=2)
