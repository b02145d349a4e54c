"""Moved to `sparse_sr_attn.inference.onnx`; the old name goes with the next release."""

import warnings

from sparse_sr_attn.inference.onnx import *  # noqa: F403

warnings.warn("sparse_sr_attn.export is sparse_sr_attn.inference.onnx now", FutureWarning, stacklevel=2)
