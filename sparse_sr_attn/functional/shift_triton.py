"""Shift convolution by Triton kernels, as a custom operator opaque to compilers.

The shifted map is not stored: products read each channel from where it is. Maps may be in any memory format.
"""

from typing import Any

import torch
from torch import Tensor

from sparse_sr_attn.functional._torch import working_precision
from sparse_sr_attn.functional._triton import padded, precision_options
from sparse_sr_attn.functional.channels_last import is_channels_last, new_map

_PIXELS, _COLUMNS, _READ = 64, 64, 32
"""Sides of the blocks: pixels; channels that a program writes; channels or pixels that it reads at a time."""

_LAUNCH = {"num_warps": 8, "num_stages": 1}  # with these, no register is spilled on sm_80 and sm_90

_MOST_PARTS = 64  # of the gradients of a weight, which are summed afterwards


@torch.library.custom_op("sparse_sr_attn::shift_conv2d", mutates_args=())
def shift_conv_op(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    """Return `shift_conv2d` of `x`, or of `relu(x)`, in the memory format of `x`."""
    x, output = _dense(x), _output(x, weight)
    columns = min(padded(len(weight)), _COLUMNS)
    _launch(
        "shift_conv",
        (x, weight.contiguous(), bias.contiguous(), output),
        x,
        output,
        (-(-_num_pixels(x) // _PIXELS), -(-len(weight) // columns)),
        {"RELU": relu, "PIXELS": _PIXELS, "CHANNELS": _READ, "FEATURES": columns},
    )
    return output


@shift_conv_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    return _output(x, weight)


@torch.library.custom_op("sparse_sr_attn::shift_conv2d_input", mutates_args=())
def _input_gradient(grad: Tensor, x: Tensor, weight: Tensor, relu: bool) -> Tensor:
    x = _dense(x)
    output = torch.empty_like(x)
    columns = min(padded(x.shape[1]), _COLUMNS)
    _launch(
        "shift_conv_input",
        (_like(grad, x), x, weight.contiguous(), output),
        x,
        grad,
        (-(-_num_pixels(x) // _PIXELS), -(-x.shape[1] // columns)),
        {"RELU": relu, "PIXELS": _PIXELS, "CHANNELS": columns, "FEATURES": _READ},
    )
    return output


@_input_gradient.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, relu: bool) -> Tensor:
    return torch.empty_like(_dense(x))


@torch.library.custom_op("sparse_sr_attn::shift_conv2d_weight", mutates_args=())
def _weight_gradients(grad: Tensor, x: Tensor, relu: bool) -> Tensor:
    """Return the gradients of the weight and of the bias, one after the other."""
    x = _dense(x)
    features, channels = grad.shape[1], x.shape[1]
    most = -(-_num_pixels(x) // _READ)
    share = -(-most // min(most, _MOST_PARTS)) * _READ
    num_parts = -(-_num_pixels(x) // share)
    partial = x.new_empty(num_parts, features * (channels + 1), dtype=working_precision(x))
    rows, columns = min(padded(features), _COLUMNS), min(padded(channels), _COLUMNS)
    _launch(
        "shift_conv_weight",
        (_like(grad, x), x, partial),
        x,
        grad,
        (num_parts, -(-features // rows), -(-channels // columns)),
        {"RELU": relu, "PIXELS": _READ, "CHANNELS": columns, "FEATURES": rows},
        share,
    )
    return partial.sum(0).to(x.dtype)


@_weight_gradients.register_fake
def _(grad: Tensor, x: Tensor, relu: bool) -> Tensor:
    return x.new_empty(grad.shape[1] * (x.shape[1] + 1))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.relu = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    to_x = _input_gradient(grad, x, weight, ctx.relu) if ctx.needs_input_grad[0] else None
    if not any(ctx.needs_input_grad[1:]):
        return to_x, None, None, None
    to_weight, to_bias = _weight_gradients(grad, x, ctx.relu).split([weight.numel(), len(weight)])
    return to_x, to_weight.view(weight.shape), to_bias, None


shift_conv_op.register_autograd(_backward, setup_context=_keep)


def _launch(
    kernel: str,
    tensors: tuple[Tensor, ...],
    x: Tensor,
    wide: Tensor,
    grid: tuple[int, ...],
    blocks: dict[str, Any],
    *sizes: int,
) -> None:
    """Run a kernel that reads `x` and reads or writes `wide`, a map of the other side of the convolution."""
    from sparse_sr_attn.functional import map_kernels  # noqa: PLC0415

    precision = precision_options(x.dtype, x.dtype, "tf32x3", torch.get_float32_matmul_precision())
    shape = _num_pixels(x), *x.shape[2:], x.shape[1], wide.shape[1]
    with torch.cuda.device_of(x):
        getattr(map_kernels, kernel)[grid](
            *tensors, *shape, *sizes, **blocks, **precision, **_LAUNCH, LAST=is_channels_last(x)
        )


def _num_pixels(x: Tensor) -> int:
    return x.shape[0] * x.shape[2] * x.shape[3]


def _dense(x: Tensor) -> Tensor:
    return x if is_channels_last(x) else x.contiguous()


def _like(grad: Tensor, x: Tensor) -> Tensor:
    """Return a gradient in the memory format of `x`."""
    return grad.contiguous(memory_format=torch.channels_last if is_channels_last(x) else torch.contiguous_format)


def _output(x: Tensor, weight: Tensor) -> Tensor:
    shape = x.shape[0], len(weight), *x.shape[2:]
    return new_map(x, len(weight)) if is_channels_last(x) else x.new_empty(shape)
