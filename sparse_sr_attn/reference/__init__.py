"""Slow twins of the fast operations: loops and dense masks that can be read next to the formulae.

The modules have the names of those in `functional`, and the functions theirs. They import nothing but torch, so an
error in the library cannot hide in its own oracle. They are differentiable, and meant for a few dozen tokens.
"""

from sparse_sr_attn.reference import batch_norm, cluster, dense, kmeans, lsh, shift, sparsemax, window
from sparse_sr_attn.reference import random_features as kernel

__all__ = ["batch_norm", "cluster", "dense", "kernel", "kmeans", "lsh", "shift", "sparsemax", "window"]
