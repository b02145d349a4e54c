"""Attention of all to all, one query at a time."""

import torch
from torch import Tensor


def dense_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float = 1.0) -> Tensor:
    """Softmax attention."""
    samples = []
    for b in range(len(query)):
        rows = []
        for one in query[b]:
            scores = scale * (key[b] * one).sum(dim=-1)
            powers = torch.exp(scores - scores.detach().max())
            rows.append((powers[:, None] * value[b]).sum(dim=0) / powers.sum())
        samples.append(torch.stack(rows))
    return torch.stack(samples)
