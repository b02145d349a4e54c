"""Batch normalisation that updates its statistics once per forward pass, alone and after a convolution."""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparse_sr_attn.functional.backend import runs_kernels
from sparse_sr_attn.functional.batch_norm import batch_norm, fold
from sparse_sr_attn.functional.channels_last import pointwise_conv2d
from sparse_sr_attn.functional.conv_triton import conv1x1, conv1x1_norm
from sparse_sr_attn.layers.base import (
    PointwiseConv2d,
    is_unmodified,
)
from sparse_sr_attn.layers.running_state import RunningStateModule


class BatchNorm2d(RunningStateModule, nn.BatchNorm2d):
    """`nn.BatchNorm2d` that updates its running statistics once per forward pass, and only with finite values.

    See `functional.batch_norm` for the differences in training.

    Examples:
        >>> BatchNorm2d(8)(torch.rand(2, 8, 6, 7)).shape
        torch.Size([2, 8, 6, 7])
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float | None

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return the normalised map."""
        if not self.training or not self.track_running_stats:
            return super().forward(x)
        momentum = 1 / (1 + int(self.num_batches_tracked)) if self.momentum is None else self.momentum
        return batch_norm(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            self.num_batches_tracked,
            momentum=momentum,
            eps=self.eps,
        )


class ConvNorm(nn.Module):
    """1x1 convolution and batch normalisation, fused into one convolution if the latter is in evaluation mode.

    The fused weights are computed in every forward pass, at negligible cost, so they are never out of date. Modules
    with hooks are not fused.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.

    Examples:
        >>> ConvNorm(8, 16)(torch.rand(2, 8, 6, 7)).shape
        torch.Size([2, 16, 6, 7])
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = PointwiseConv2d(in_channels, out_channels, 1)
        self.norm = BatchNorm2d(out_channels)

    def forward(self, x: Float[Tensor, "b c_in h w"]) -> Float[Tensor, "b c_out h w"]:
        """Return the normalised map."""
        conv, norm = self.conv, self.norm
        unmodified = is_unmodified(conv, PointwiseConv2d) and is_unmodified(norm, BatchNorm2d)
        if not unmodified or self.training or norm.training or not norm.track_running_stats:
            by_kernel = unmodified and runs_kernels(x.device)
            return norm(conv1x1(x, conv.weight, cast(Tensor, conv.bias)) if by_kernel else conv(x))
        statistics = norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps
        if runs_kernels(x.device) and not torch.is_grad_enabled():
            return conv1x1_norm(x, conv.weight, cast(Tensor, conv.bias), *statistics)
        return pointwise_conv2d(x, *fold(conv.weight, cast(Tensor, conv.bias), *statistics))
