"""Moved to `sparse_sr_attn.inference.captured_mass`; the old name goes with the next release."""

import warnings

from sparse_sr_attn.inference.captured_mass import *  # noqa: F403

warnings.warn("sparse_sr_attn.capture is sparse_sr_attn.inference.captured_mass now", FutureWarning, stacklevel=2)
