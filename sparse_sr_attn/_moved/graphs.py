"""Moved to `sparse_sr_attn.inference.cuda_graph`; the old name goes with the next release."""

import warnings

from sparse_sr_attn.inference.cuda_graph import *  # noqa: F403

warnings.warn("sparse_sr_attn.graphs is sparse_sr_attn.inference.cuda_graph now", FutureWarning, stacklevel=2)
