"""Moved to `sparse_sr_attn.data.imresize`; the old name goes with the next release."""

import warnings

from sparse_sr_attn.data.imresize import *  # noqa: F403

warnings.warn("sparse_sr_attn.degradation is sparse_sr_attn.data.imresize now", FutureWarning, stacklevel=2)
