"""Sparsemax one row at a time, by alternating projections instead of sorting."""

import torch
from torch import Tensor


def project(row: Tensor) -> Tensor:
    """Return the point of the probability simplex closest to `row`.

    Project onto the plane of sum 1, set negative entries to 0, and repeat with the others (Michelot, 1986).
    """
    alive = list(range(len(row)))
    while True:
        part = row[alive]
        moved = part + (1 - part.sum()) / len(alive)
        rest = [index for index, number in zip(alive, moved.tolist(), strict=True) if number > 0]
        if len(rest) == len(alive):
            return torch.zeros_like(row).index_add(0, torch.tensor(alive, device=row.device), moved)
        alive = rest


def sparsemax(scores: Tensor) -> Tensor:
    """Return `project` of each row."""
    rows = [project(row) for row in scores.reshape(-1, scores.shape[-1])]
    return torch.stack(rows).reshape(scores.shape)


def sparsemax_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float = 1.0) -> Tensor:
    """Attention whose weights are the sparsemax of the scores."""
    scores = scale * torch.einsum("bnd,bmd->bnm", query, key)
    return torch.einsum("bnm,bme->bne", sparsemax(scores), value)
