"""Moved to `sparse_sr_attn.inference.visualize`; the old name goes with the next release."""

import warnings

from sparse_sr_attn.inference.visualize import *  # noqa: F403

warnings.warn("sparse_sr_attn.visualize is sparse_sr_attn.inference.visualize now", FutureWarning, stacklevel=2)
