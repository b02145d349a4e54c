"""The mathematics: functions without parameters or state. Each has a slow reference implementation in `reference`."""

from sparse_sr_attn.functional import batch_norm, cluster, dense, kmeans, lsh, shift, sparsemax, window
from sparse_sr_attn.functional import random_features as kernel

__all__ = ["batch_norm", "cluster", "dense", "kernel", "kmeans", "lsh", "shift", "sparsemax", "window"]
