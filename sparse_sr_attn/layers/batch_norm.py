"""Batch normalisation that updates its statistics once per forward pass, alone and after a convolution."""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparse_sr_attn.functional.backend import runs_kernels
from sparse_sr_attn.functional.batch_norm import batch_norm, fold
from sparse_sr_attn.functional.channels_last import pointwise_conv2d
from sparse_sr_attn.functional.conv_norm_triton import Buffers, Parameters, conv1x1_batch_norm, conv1x1_norm
from sparse_sr_attn.functional.conv_triton import conv1x1
from sparse_sr_attn.layers.base import PointwiseConv2d, is_unmodified
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
        buffers = self.running_mean, self.running_var, self.num_batches_tracked
        return batch_norm(x, self.weight, self.bias, *buffers, momentum=self.weight_of_batch(), eps=self.eps)

    def weight_of_batch(self) -> float:
        """Return the weight of a batch in the running statistics: the momentum, or the same for all batches."""
        return 1 / (1 + int(self.num_batches_tracked)) if self.momentum is None else self.momentum


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
        options = self.kernel_options(x)
        if options is not None:
            return _by_kernels(x, [self], options)[0]
        if self._is_unmodified() and not self.training and not norm.training and norm.track_running_stats:
            statistics = norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps
            return pointwise_conv2d(x, *fold(conv.weight, cast(Tensor, conv.bias), *statistics))
        by_kernel = self._is_unmodified() and runs_kernels(x.device)
        return norm(conv1x1(x, conv.weight, cast(Tensor, conv.bias)) if by_kernel else conv(x))

    def kernel_options(self, x: Float[Tensor, "b c_in h w"]) -> dict[str, float] | None:
        """Return the options of the kernels that do convolution and normalisation; `None` if these run one by one."""
        norm = self.norm
        if not runs_kernels(x.device) or not self._is_unmodified() or not norm.track_running_stats:
            return None
        if norm.training and x[:, 0].numel() > 1:
            return {"eps": norm.eps, "momentum": norm.weight_of_batch()}
        return None if norm.training or self.training or torch.is_grad_enabled() else {"eps": norm.eps}

    def _is_unmodified(self) -> bool:
        return is_unmodified(self.conv, PointwiseConv2d) and is_unmodified(self.norm, BatchNorm2d)


def conv_norms(
    x: Float[Tensor, "b c h w"], first: ConvNorm, second: ConvNorm
) -> tuple[Float[Tensor, "b o h w"], Float[Tensor, "b o h w"]] | None:
    """Return `first(x)` and `second(x)`, computed by the same kernels; `None` where these cannot run.

    Examples:
        >>> conv_norms(torch.rand(2, 8, 6, 7), ConvNorm(8, 16), ConvNorm(8, 16))  # two maps on GPUs with Triton
    """
    if not is_unmodified(first, ConvNorm) or not is_unmodified(second, ConvNorm):
        return None
    options = first.kernel_options(x)
    if options is None or options != second.kernel_options(x):
        return None
    if first.conv.weight.shape != second.conv.weight.shape:  # only now, for a replaced convolution may have no weight
        return None
    one, other = _by_kernels(x, [first, second], options)
    return one, other


def _by_kernels(x: Tensor, modules: list[ConvNorm], options: dict[str, float]) -> list[Tensor]:
    convs, norms = [module.conv for module in modules], [module.norm for module in modules]
    parameters = Parameters(
        [conv.weight for conv in convs],
        [cast(Tensor, conv.bias) for conv in convs],
        [norm.weight for norm in norms],
        [norm.bias for norm in norms],
    )
    buffers = Buffers(
        [norm.running_mean for norm in norms],
        [norm.running_var for norm in norms],
        [norm.num_batches_tracked for norm in norms],
    )
    by_batch = "momentum" in options
    return (conv1x1_batch_norm if by_batch else conv1x1_norm)(x, parameters, buffers, **options)
