"""The neighbours of a chunk by content: the chunks whose mean keys are most similar."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from sparse_sr_attn.functional._operators import operator
from sparse_sr_attn.functional._torch import needs_plain_code, without_autocast
from sparse_sr_attn.functional.flops import teach_flop_counters

_STEPS = 2**20
"""Similarities are compared in steps of 2**-20, which rounding rarely crosses: the same chunks on every device."""

_PAIRS_PER_BLOCK = {"cpu": 2**18}  # they stay in cache
_PAIRS_ELSEWHERE = 2**24  # few kernels


def nearest_rows(rows: Float[Tensor, "b k d"], num: int) -> Int[Tensor, "b k m"]:
    """Return for each row its own index, followed by those of the most similar other rows in descending order.

    Args:
        rows: vectors of norm at most 1.
        num: number of indices, >= 1, including the row's own.

    Returns:
        Indices. With fewer than `num` rows, each appears once and the own index fills the rest. Dot products are
        compared in steps of 2**-20, NaN as 0; the lower index wins a tie.

    Examples:
        >>> nearest_rows(torch.eye(4)[None, [0, 1, 0, 1]], 2)
        tensor([[[0, 2],
                 [1, 3],
                 [2, 0],
                 [3, 1]]])
    """
    rows = rows.detach()
    if needs_plain_code():
        return _nearest(rows, rows, torch.arange(rows.shape[1], device=rows.device), num, missing=num - 1)
    teach_flop_counters()
    return _nearest_rows(rows, num)


def _nearest(some: Tensor, rows: Tensor, own: Tensor, num: int, *, missing: int) -> Tensor:
    """Return the result for `some` of the rows, whose indices are `own`; up to `missing` rows are padded."""
    batch, num_rows, _ = rows.shape
    steps = (some @ rows.transpose(1, 2)).nan_to_num_().mul_(_STEPS).round_().long()
    rank = steps.mul_(num_rows).sub_(torch.arange(num_rows, device=rows.device))  # no two alike
    rank = rank.scatter(2, own[None, :, None].expand(batch, -1, -1), 2**62)
    chosen = F.pad(rank, (0, missing), value=-(2**62)).topk(num, dim=-1).indices
    return torch.where(chosen < num_rows, chosen, own[:, None])


@operator("nearest_rows")
def _nearest_rows(rows: Tensor, num: int) -> Tensor:
    batch, num_rows, _ = rows.shape
    found = torch.empty(batch, num_rows, num, dtype=torch.int64, device=rows.device)
    step = max(1, _PAIRS_PER_BLOCK.get(rows.device.type, _PAIRS_ELSEWHERE) // max(1, batch * num_rows))
    with without_autocast(rows):
        for own in torch.arange(num_rows, device=rows.device).split(step):
            found[:, own] = _nearest(rows[:, own], rows, own, num, missing=max(0, num - num_rows))
    return found


@_nearest_rows.register_fake
def _(rows: Tensor, num: int) -> Tensor:
    return rows.new_empty(rows.shape[0], rows.shape[1], num, dtype=torch.int64)
