"""Batch normalisation in training, whose running statistics move once a forward and never in a recomputation."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from sparse_sr_attn.functional.recomputation import backward_is_running


def batch_norm(
    x: Float[Tensor, "b c h w"],
    weight: Float[Tensor, "c"],
    bias: Float[Tensor, "c"],
    running_mean: Float[Tensor, "c"],
    running_var: Float[Tensor, "c"],
    num_batches_tracked: Int[Tensor, ""],
    *,
    momentum: float,
    eps: float,
) -> Float[Tensor, "b c h w"]:
    r"""Return $\gamma (x - \mu) / \sqrt{\sigma^2 + \epsilon} + \beta$ with the statistics of the batch.

    Args:
        x: the map.
        weight: $\gamma$.
        bias: $\beta$.
        running_mean: moved in place.
        running_var: moved in place; of the unbiased variance.
        num_batches_tracked: moved in place.
        momentum: share of this batch in the running statistics, in [0, 1].
        eps: $\epsilon$.

    Returns:
        A map in the dtype of `x`.

    Note:
        As `torch.nn.BatchNorm2d`, with three differences. Nothing moves in a recomputation (activation checkpointing
        would move the statistics twice). Statistics that are not finite are not taken over. With one value per channel,
        which has no variance, the running statistics normalise, and nothing moves.
    """
    count = x.shape[0] * x.shape[2] * x.shape[3]
    if count == 1:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training=False, eps=eps)
    output, mean, inverse_std = torch.native_batch_norm(x, weight, bias, None, None, True, momentum, eps)
    variance = (inverse_std.detach() ** -2 - eps).clamp(min=0) * (count / (count - 1))
    _move(mean.detach(), variance, running_mean, running_var, num_batches_tracked, momentum)
    return output


@torch.library.custom_op(
    "sparse_sr_attn::move_running_statistics", mutates_args=("running_mean", "running_var", "num_batches_tracked")
)
def _move(
    mean: Tensor,
    variance: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    momentum: float,
) -> None:
    if backward_is_running():
        return
    moved = [
        (running, (running + momentum * (new.to(running.dtype) - running)))
        for running, new in ((running_mean, mean), (running_var, variance))
    ]
    finite = torch.stack([value.isfinite().all() for _, value in moved]).all()
    for running, value in moved:
        running.copy_(torch.where(finite, value, running))
    num_batches_tracked.add_(finite)


@_move.register_fake
def _(*_: object) -> None: ...
