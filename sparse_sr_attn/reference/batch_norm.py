"""Batch normalisation in training, from means of powers; nothing is updated in place."""

import torch
from torch import Tensor


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    *,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalise by the statistics of the batch, or by the running statistics if each channel has a single value.

    Return the output, and the updated running statistics and count. They are unchanged for a single value per channel,
    and for statistics that are not finite in the dtype of the running ones.
    """
    count = x[:, 0].numel()
    if count == 1:
        output = affine(x, running_mean, running_var, weight, bias, eps)
        return output, running_mean, running_var, num_batches_tracked
    mean = x.sum(dim=(0, 2, 3)) / count
    squares = (x - expand(mean)).square().sum(dim=(0, 2, 3))
    output = affine(x, mean, squares / count, weight, bias, eps)
    means, variances = mean.detach().to(running_mean), (squares.detach() / (count - 1)).to(running_var)
    if not torch.isfinite(means).all() or not torch.isfinite(variances).all():
        return output, running_mean, running_var, num_batches_tracked
    return (
        output,
        (1 - momentum) * running_mean + momentum * means,
        (1 - momentum) * running_var + momentum * variances,
        num_batches_tracked + 1,
    )


def affine(x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return `(x - mean) / sqrt(variance + eps) * weight + bias`, channel by channel."""
    return (x - expand(mean)) / torch.sqrt(expand(variance) + eps) * expand(weight) + expand(bias)


def expand(channels: Tensor) -> Tensor:
    """Return numbers per channel, `(c,)`, as `(c, 1, 1)`."""
    return channels[:, None, None]
