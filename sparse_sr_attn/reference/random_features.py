"""Random feature attention with explicit features, and the contrastive loss by sorting."""

import math

import torch
from torch import Tensor


def features(rows: Tensor, directions: Tensor) -> Tensor:
    """Positive random features: `exp(<w, u> - |u|^2 / 2) / sqrt(m)` for each row u and direction w, `(n, m)`."""
    columns = [torch.exp((rows * w).sum(dim=-1) - (rows * rows).sum(dim=-1) / 2) for w in directions]
    return torch.stack(columns, dim=-1) / math.sqrt(len(directions))


def kernel_attention(query: Tensor, key: Tensor, value: Tensor, directions: Tensor) -> Tensor:
    """Attention with dot products of features as weights, for all pairs of tokens."""
    samples = []
    for b in range(len(query)):
        kernel = features(query[b], directions) @ features(key[b], directions).T
        samples.append((kernel / kernel.sum(dim=-1, keepdim=True)) @ value[b])
    return torch.stack(samples)


def contrastive_loss(query: Tensor, key: Tensor, *, positive: float, negative: float) -> Tensor:
    """The mean over queries of log(sum of exponentials of the negatives / of the positives).

    A fraction `positive` of the keys, most similar first, are positives; at least one is. There are as many negatives;
    the first has the rank `negative`, as a fraction of the keys.
    """
    terms = []
    for b in range(len(query)):
        for one in query[b]:
            ranked = sorted((key[b] * one).sum(dim=-1), key=lambda score: -score.item())
            count = max(1, round(positive * len(ranked)))
            first = min(max(count, round(negative * len(ranked))), len(ranked) - 1)
            similar = torch.stack(ranked[:count])
            others = torch.stack(ranked[first : first + count])
            terms.append(torch.log(torch.exp(others).sum() / torch.exp(similar).sum()))
    return torch.stack(terms).mean()
