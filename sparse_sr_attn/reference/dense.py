"""Attention of all to all, one query at a time."""

import torch
from torch import Tensor


def dense_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float = 1.0) -> Tensor:
    """Softmax attention.

    Args:
        query: `(b, n, d)`.
        key: `(b, m, d)`.
        value: `(b, m, e)`.
        scale: factor on the dot products.

    Returns:
        `(b, n, e)`, in the precision of the input throughout.
    """
    samples = []
    for b in range(len(query)):
        rows = []
        for one in query[b]:
            scores = scale * (key[b] * one).sum(dim=-1)
            powers = torch.exp(scores - scores.detach().max())
            rows.append((powers[:, None] * value[b]).sum(dim=0) / powers.sum())
        samples.append(torch.stack(rows))
    return torch.stack(samples)
