"""Feature maps in channels-last memory format, in which pixels are rows and a 1x1 convolution is a matrix product."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from sparse_sr_attn.functional._operators import operator
from sparse_sr_attn.functional._torch import is_exporting, is_exporting_to_old_onnx, is_transformed
from sparse_sr_attn.functional.flops import teach_flop_counters


def channels_last(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Return `x` in channels-last memory format; unchanged under `torch.func.vmap`, which hides the format.

    Examples:
        >>> x = torch.rand(2, 3, 4, 5)
        >>> channels_last(x).shape, channels_last(x).stride()
        (torch.Size([2, 3, 4, 5]), (60, 1, 15, 3))
    """
    if is_transformed():
        return x
    if torch.compiler.is_compiling() or not x.is_cpu or not len(x) or is_channels_last(x):
        return x.contiguous(memory_format=torch.channels_last)
    # Matrix by matrix: torch transposes a single one in blocks, five times as fast.
    samples = [sample.flatten(1).t().contiguous() for sample in x]
    rows = samples[0][None] if len(samples) == 1 else torch.stack(samples)
    return rows.view(x.shape[0], x.shape[2], x.shape[3], x.shape[1]).permute(0, 3, 1, 2)


def in_format_of(x: Float[Tensor, "b c h w"], like: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Return `x` in the memory format of `like`, so that a convolution after it rounds as it would after `like`.

    Examples:
        >>> x = torch.rand(2, 3, 4, 5)
        >>> in_format_of(channels_last(x), x).is_contiguous()
        True
    """
    return x if is_transformed() or is_channels_last(like) else x.contiguous()


def is_channels_last(x: Float[Tensor, "b c h w"]) -> bool:
    """Return whether `x` is in channels-last memory format; `False` under `torch.func.vmap`, which hides the format.

    Examples:
        >>> x = torch.rand(2, 3, 4, 5)
        >>> is_channels_last(x), is_channels_last(channels_last(x))
        (False, True)
    """
    return not is_transformed() and x.is_contiguous(memory_format=torch.channels_last)


def new_map(like: Float[Tensor, "b _ h w"], channels: int) -> Float[Tensor, "b c h w"]:
    """Return an uninitialized map of the size of `like`, in channels-last memory format.

    Examples:
        >>> new_map(torch.rand(2, 3, 4, 5), 16).shape
        torch.Size([2, 16, 4, 5])
    """
    b, _, h, w = like.shape
    return like.new_empty(b, h, w, channels).permute(0, 3, 1, 2)


def pointwise_conv2d(
    x: Float[Tensor, "b c h w"], weight: Float[Tensor, "o c 1 1"], bias: Float[Tensor, "o"] | None
) -> Float[Tensor, "b o h w"]:
    """Return the 1x1 convolution of `x`; with a bias the result is in channels-last memory format.

    A contiguous map is multiplied and transposed in one matrix product. For channels-last maps in float32 on one
    thread, torch uses a slower routine for fewer than 16 images, so each row of the map is passed as an image. This
    happens inside a custom operator, because a traced graph would be specialised to some numbers of rows.

    Examples:
        >>> pointwise_conv2d(torch.rand(2, 3, 4, 5), torch.rand(8, 3, 1, 1), torch.zeros(8)).shape
        torch.Size([2, 8, 4, 5])
    """
    if bias is None or is_exporting() or is_transformed() or is_exporting_to_old_onnx():
        return F.conv2d(x, weight, bias)
    if not x.is_cpu and not torch.compiler.is_compiling() and (len(x) == 1 or is_channels_last(x)):
        return pixel_products(x, weight, bias)
    if not is_channels_last(x):
        rows = torch.baddbmm(bias, x.flatten(2).transpose(1, 2), weight.flatten(1).T.expand(x.shape[0], -1, -1))
        return rows.view(x.shape[0], *x.shape[2:], len(weight)).permute(0, 3, 1, 2)
    if not x.is_cpu or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return F.conv2d(x, weight, bias)
    teach_flop_counters()
    return _pointwise_conv2d(x, weight, bias)


def pixel_products(
    x: Float[Tensor, "b c h w"], weight: Float[Tensor, "o c 1 1"], bias: Float[Tensor, "o"]
) -> Float[Tensor, "b o h w"]:
    """Return `pointwise_conv2d` of a single map, or of channels-last maps, by one product of all pixels, bias included.

    Examples:
        >>> pixel_products(torch.rand(1, 3, 4, 5), torch.rand(8, 3, 1, 1), torch.zeros(8)).shape
        torch.Size([1, 8, 4, 5])
    """
    rows = x.permute(0, 2, 3, 1).flatten(0, 2) if is_channels_last(x) else x.flatten(2).flatten(0, 1).t()
    output = torch.addmm(bias, rows, weight.flatten(1).t())
    return output.view(x.shape[0], *x.shape[2:], len(weight)).permute(0, 3, 1, 2)


def _lines(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "bh c 1 w"]:
    return channels_last(x).permute(0, 2, 3, 1).flatten(0, 1)[:, None].permute(0, 3, 1, 2)


def _map(lines: Float[Tensor, "bh c 1 w"], like: Float[Tensor, "b _ h w"]) -> Float[Tensor, "b c h w"]:
    rows = lines.permute(0, 2, 3, 1).contiguous()
    return rows.view(like.shape[0], like.shape[2], rows.shape[2], rows.shape[3]).permute(0, 3, 1, 2)


@operator("pointwise_conv2d")
def _pointwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _map(F.conv2d(_lines(x), weight, bias), x)


@_pointwise_conv2d.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return new_map(x, weight.shape[0])


@operator("pointwise_conv2d_backward")
def _pointwise_conv2d_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    geometry = [1, 1], [0, 0], [1, 1], False, [0, 0], 1
    back = torch.ops.aten.convolution_backward
    lines = back(_lines(grad), _lines(x), weight, [len(weight)], *geometry, [True, True, True])
    return _map(lines[0], x), lines[1].contiguous(), lines[2]


@_pointwise_conv2d_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return new_map(x, x.shape[1]), weight.new_empty(weight.shape), weight.new_empty(len(weight))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    return _pointwise_conv2d_backward(grad, *ctx.saved_tensors)


_pointwise_conv2d.register_autograd(_backward, setup_context=_keep)
