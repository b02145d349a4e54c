"""Batch normalisation in training that updates its statistics once per forward pass, never in a recomputation."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from sparse_sr_attn.functional._operators import operator
from sparse_sr_attn.functional._torch import backward_is_running, gathered, several_processes, working_precision
from sparse_sr_attn.functional.backend import runs_kernels


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
        x: the feature map.
        weight: $\gamma$.
        bias: $\beta$.
        running_mean: updated in place.
        running_var: running unbiased variance, updated in place.
        num_batches_tracked: updated in place.
        momentum: weight of this batch in the running statistics, in [0, 1].
        eps: $\epsilon$.

    Returns:
        A map in the dtype of `x`.

    Note:
        Like `torch.nn.BatchNorm2d`, with four differences. A recomputation updates nothing (with activation
        checkpointing, statistics would be updated twice). Statistics that are not finite are discarded. With one value
        per channel, which has no variance, the running statistics are used, and not updated. In distributed training
        each process normalises by its own batch; the running statistics are those of all batches together.

    Examples:
        >>> x, mean, var, count = torch.rand(2, 3, 8, 8), torch.zeros(3), torch.ones(3), torch.tensor(0)
        >>> y = batch_norm(x, torch.ones(3), torch.zeros(3), mean, var, count, momentum=0.1, eps=1e-5)
        >>> y.shape, count  # mean and var have updated in place
        (torch.Size([2, 3, 8, 8]), tensor(1))
    """
    count = x.shape[0] * x.shape[2] * x.shape[3]
    if count == 1:
        # Copies: the backward needs them as they are, and other processes may have values that move them.
        output = F.batch_norm(x, running_mean.clone(), running_var.clone(), weight, bias, training=False, eps=eps)
        mean = x.flatten()
        inverse_std = torch.ones_like(mean)
    else:
        output, mean, inverse_std = torch.native_batch_norm(x, weight, bias, None, None, True, momentum, eps)
    move_op(mean.detach(), inverse_std.detach(), count, running_mean, running_var, num_batches_tracked, momentum, eps)
    return output


@operator("move_running_statistics", mutates_args=("running_mean", "running_var", "num_batches_tracked"))
def move_op(
    mean: Tensor,
    inverse_std: Tensor,
    count: int,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    momentum: float,
    eps: float,
) -> None:
    """Move the running statistics by those of a batch, joined with the batches of other processes."""
    if backward_is_running():
        return
    if count > 1 and runs_kernels(mean.device) and not several_processes():
        _move_by_kernel(mean, inverse_std, count, running_mean, running_var, num_batches_tracked, momentum, eps)
        return
    variance = (inverse_std**-2 - eps).clamp(min=0) * (count / max(1, count - 1))
    if several_processes():
        mean, variance, count = _join(mean, variance, count)
    if count == 1:
        return
    moved = [
        (running, (running + momentum * (new.to(running.dtype) - running)))
        for running, new in ((running_mean, mean), (running_var, variance))
    ]
    finite = torch.stack([value.isfinite().all() for _, value in moved]).all()
    for running, value in moved:
        running.copy_(torch.where(finite, value, running))
    num_batches_tracked.add_(finite)


@move_op.register_fake
def _(*_: object) -> None: ...


def _move_by_kernel(
    mean: Tensor,
    inverse_std: Tensor,
    count: int,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    momentum: float,
    eps: float,
) -> None:
    """Move the running statistics by those of one process, in one Triton kernel."""
    from sparse_sr_attn.functional import map_kernels as kernels  # noqa: PLC0415

    block = 1 << (len(mean) - 1).bit_length()
    with torch.cuda.device_of(mean):
        kernels.move_statistics[(1,)](
            *(mean, inverse_std, running_mean, running_var, num_batches_tracked, count, len(mean)),
            MOMENTUM=momentum,
            EPS=eps,
            BLOCK=block,
        )


def fold(
    weight: Float[Tensor, "o i 1 1"],
    bias: Float[Tensor, "o"],
    running_mean: Float[Tensor, "o"],
    running_var: Float[Tensor, "o"],
    scale: Float[Tensor, "o"],
    offset: Float[Tensor, "o"],
    eps: float,
) -> tuple[Float[Tensor, "o i 1 1"], Float[Tensor, "o"]]:
    """Return weight and bias of the convolution that equals a convolution followed by batch normalisation.

    Args:
        weight: of the convolution.
        bias: of the convolution.
        running_mean: of the normalisation.
        running_var: of the normalisation.
        scale: weight of the normalisation.
        offset: bias of the normalisation.
        eps: added to the variance.

    Examples:
        >>> ones, zeros = torch.ones(3), torch.zeros(3)
        >>> weight, bias = fold(torch.rand(3, 2, 1, 1), ones, ones, ones, 2 * ones, zeros, eps=0.0)
        >>> bias
        tensor([0., 0., 0.])
    """
    precision = working_precision(weight)
    factor = scale.to(precision) * (running_var.to(precision) + eps).rsqrt()
    folded = (bias.to(precision) - running_mean.to(precision)) * factor + offset.to(precision)
    return (weight.to(precision) * factor[:, None, None, None]).to(weight.dtype), folded.to(weight.dtype)


def _join(mean: Tensor, variance: Tensor, count: int) -> tuple[Tensor, Tensor, int]:
    """Merge the statistics of all processes as if they had been one batch."""
    mean = mean.double()  # a count may be more than a half can hold
    rows = torch.stack([mean, variance.double(), torch.full_like(mean, count)])
    means, variances, counts = gathered(rows, "batch normalisation").unbind(dim=1)
    total = counts.sum(dim=0)
    joined = (counts * means).sum(dim=0) / total
    squares = ((counts - 1) * variances + counts * (means - joined).square()).sum(dim=0)
    return joined, squares / (total - 1), int(total[0])
