"""Window attention on whole tensors, for export."""

import torch
from torch import Tensor

from sparse_sr_attn.functional._torch import working_precision
from sparse_sr_attn.functional.window.grid import WindowGrid


def weights(query: Tensor, key: Tensor | None, grid: WindowGrid, shift: int, scale: float) -> Tensor:
    """Return the softmax weights `(b, k, i, i)`, in float32 or higher, as plain differentiable code."""
    precision = working_precision(query)
    queries = grid.cut(query.to(precision), shift)
    keys = queries if key is None else grid.cut(key.to(precision), shift)
    scores = scale * queries @ keys.transpose(-1, -2)
    if not grid.is_whole:
        # The lowest number, not -inf: the spare window of an exported program, all pads, must not become NaN.
        scores = scores.masked_fill(~grid.is_real(shift, query.device)[:, None], torch.finfo(precision).min)
    return scores.softmax(dim=-1)


def apply(weights: Tensor, value: Tensor, grid: WindowGrid, shift: int, unshift: int) -> Tensor:
    """Return the map of weighted sums of values, as plain differentiable code."""
    return grid.join(weights.to(value.dtype) @ grid.cut(value, shift), unshift)
