"""Slow reference implementations of the operations: loops and dense masks that read like the formulae.

Modules, functions and arguments have the names and shapes of those in `functional`. They import only torch, so an error
in the library cannot hide in its own reference. They are differentiable, and meant for a few dozen tokens.
"""

from sparse_sr_attn.reference import batch_norm, cluster, dense, kmeans, lsh, shift, sparsemax, window
from sparse_sr_attn.reference import random_features as kernel

__all__ = ["batch_norm", "cluster", "dense", "kernel", "kmeans", "lsh", "shift", "sparsemax", "window"]
