"""Moved to `sparse_sr_attn.data.pairs`; the old name goes with the next release."""

import warnings

from sparse_sr_attn.data.pairs import *  # noqa: F403

warnings.warn("sparse_sr_attn.pairs is sparse_sr_attn.data.pairs now", FutureWarning, stacklevel=2)
