"""Locality-sensitive hashing one token at a time."""

import torch
from torch import Tensor


def bucket_count(num_tokens: int, chunk_size: int, max_buckets: int) -> int:
    """Return the number of buckets: the number of full chunks, made even, from 2 to the even `max_buckets`."""
    buckets = 2
    while buckets < num_tokens // chunk_size and buckets < max_buckets:
        buckets += 2
    return buckets


def hash_tokens(points: Tensor, rotations: Tensor, num_buckets: int) -> Tensor:
    """Return the bucket of each token, `(b, r, n)`: the index of the largest of its coordinates along R and -R."""
    batch, num_tokens, _ = points.shape
    buckets = torch.zeros(batch, len(rotations), num_tokens, dtype=torch.int64)
    for b in range(batch):
        for r, rotation in enumerate(rotations):
            directions = [sign * row for sign in (1, -1) for row in rotation[: num_buckets // 2]]
            for n in range(num_tokens):
                along = [(points[b, n] * direction).sum().item() for direction in directions]
                buckets[b, r, n] = along.index(max(along))
    return buckets.to(points.device)
