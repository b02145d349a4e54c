"""The mathematics, without parameters and without state. Each operation has a slow twin in `reference`."""

from sparse_sr_attn.functional import cluster, kmeans

__all__ = ["cluster", "kmeans"]
