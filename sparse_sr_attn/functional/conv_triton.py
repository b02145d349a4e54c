"""1x1 convolutions, of a shifted map or of a map as it is, by Triton kernels, as custom operators opaque to compilers.

The shifted map is not stored: products read each channel from where it is. A ReLU before the convolution and, after
it, normalisation or the addition to a residual are part of the kernel. Maps may be in any memory format.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_sr_attn.functional._torch import conv_precision, working_precision
from sparse_sr_attn.functional._triton import padded, precision_options
from sparse_sr_attn.functional.channels_last import is_channels_last
from sparse_sr_attn.functional.flops import teach_flop_counters

_PIXELS, _COLUMNS, _READ = 64, 64, 32
"""Sides of the blocks: pixels; channels that a program writes; channels or pixels that it reads at a time."""

_LAUNCH = {"num_warps": 8, "num_stages": 1}  # with these, no register is spilled on sm_80 and sm_90

_MOST_PARTS = 64  # of the gradients of a weight, which are summed afterwards


def conv1x1(
    x: Float[Tensor, "b c h w"],
    weight: Float[Tensor, "o c 1 1"],
    bias: Float[Tensor, "o"],
    *,
    shift: bool = False,
    relu: bool = False,
    residual: Float[Tensor, "b o h w"] | None = None,
    scale: float = 1.0,
) -> Float[Tensor, "b o h w"]:
    """Return a 1x1 convolution in the precision of autocast, in the memory format of `x`; differentiable.

    Args:
        x: the feature map.
        weight: of the convolution.
        bias: of the convolution.
        shift: take `shift2d(x)` instead of `x`.
        relu: take `relu(x)`, before it is shifted.
        residual: a map to add the convolution to.
        scale: factor on the convolution that is added.

    Examples:
        >>> x, weight, bias = torch.rand(2, 10, 6, 7), torch.rand(16, 10, 1, 1), torch.zeros(16)
        >>> conv1x1(x, weight, bias, residual=torch.rand(2, 16, 6, 7)).shape  # doctest: +SKIP
        torch.Size([2, 16, 6, 7])
    """
    teach_flop_counters()
    return conv_op(x.to(conv_precision(x)), weight, bias, shift, relu, residual, scale)


def conv1x1_norm(
    x: Float[Tensor, "b c h w"],
    weight: Float[Tensor, "o c 1 1"],
    bias: Float[Tensor, "o"],
    running_mean: Float[Tensor, "o"],
    running_var: Float[Tensor, "o"],
    scale: Float[Tensor, "o"],
    offset: Float[Tensor, "o"],
    eps: float,
) -> Float[Tensor, "b o h w"]:
    """Return a 1x1 convolution followed by batch normalisation in evaluation mode; not differentiable.

    Args:
        x: the feature map.
        weight: of the convolution.
        bias: of the convolution.
        running_mean: of the normalisation.
        running_var: of the normalisation.
        scale: weight of the normalisation.
        offset: bias of the normalisation.
        eps: added to the variance.

    Examples:
        >>> x, ones = torch.rand(2, 10, 6, 7), torch.ones(16)
        >>> conv1x1_norm(x, torch.rand(16, 10, 1, 1), *(ones,) * 5, eps=1e-5).shape  # doctest: +SKIP
        torch.Size([2, 16, 6, 7])
    """
    teach_flop_counters()
    return norm_op(x.to(conv_precision(x)), weight, bias, running_mean, running_var, scale, offset, eps)


@torch.library.custom_op("sparse_sr_attn::conv1x1", mutates_args=())
def conv_op(
    x: Tensor, weight: Tensor, bias: Tensor, shift: bool, relu: bool, residual: Tensor | None, scale: float
) -> Tensor:
    """Return `conv1x1` for an `x` in the right precision."""
    return _conv(x, weight, bias, (None,) * 4, residual, SHIFT=shift, RELU=relu, SCALE=scale, EPS=0.0)


@conv_op.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, shift: bool, relu: bool, residual: Tensor | None, scale: float
) -> Tensor:
    return _output(x, weight, residual)


@torch.library.custom_op("sparse_sr_attn::conv1x1_norm", mutates_args=())
def norm_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    scale: Tensor,
    offset: Tensor,
    eps: float,
) -> Tensor:
    """Return `conv1x1_norm` for an `x` in the right precision."""
    norm = running_mean, running_var, scale, offset
    return _conv(x, weight, bias, norm, None, SHIFT=False, RELU=False, SCALE=1.0, EPS=eps)


@norm_op.register_fake
def _(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return _output(x, weight, None)


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm: tuple[Tensor | None, ...],
    residual: Tensor | None,
    **options: Any,
) -> Tensor:
    x, output = _dense(x), _output(x, weight, residual)
    residual = None if residual is None else _like(residual, x)
    vectors = [None if vector is None else vector.contiguous() for vector in norm]
    columns = min(padded(len(weight)), _COLUMNS)
    _launch(
        "conv",
        (x, weight.contiguous(), bias.contiguous(), residual, *vectors, output),
        x,
        output,
        (-(-_num_pixels(x) // _PIXELS), -(-len(weight) // columns)),
        {**options, "PIXELS": _PIXELS, "CHANNELS": _READ, "FEATURES": columns},
    )
    return output


@torch.library.custom_op("sparse_sr_attn::conv1x1_backward", mutates_args=())
def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, shift: bool, relu: bool, scale: float, of_x: bool, of_weight: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradient of `x`, and those of weight and bias in a row, in float32 or higher; empty if not wanted."""
    x = _dense(x)
    features, channels, num_pixels = grad.shape[1], x.shape[1], _num_pixels(x)
    most = -(-num_pixels // _READ)
    share = -(-most // min(most, _MOST_PARTS)) * _READ
    num_parts = -(-num_pixels // share)
    rows, columns = min(padded(features), _COLUMNS), min(padded(channels), _COLUMNS)
    of_weights = of_weight * num_parts * -(-features // rows) * -(-channels // columns)
    of_inputs = of_x * -(-num_pixels // _PIXELS) * -(-channels // columns)
    to_x, to_weights = _empty_gradients(x, features, num_parts, of_x, of_weight)
    _launch(
        "conv_backward",
        (_like(grad, x), x, weight.contiguous(), to_x, to_weights),
        x,
        grad,
        (of_weights + of_inputs,),
        {
            **{"SHIFT": shift, "RELU": relu, "SCALE": scale},
            **{"PIXELS": _PIXELS, "CHANNELS": columns, "FEATURES": rows, "READ": _READ},
        },
        share,
        of_weights,
    )
    return to_x, to_weights.sum(0) if of_weight else to_weights[0]


@_gradients.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, shift: bool, relu: bool, scale: float, of_x: bool, of_weight: bool
) -> tuple[Tensor, Tensor]:
    to_x, to_weights = _empty_gradients(_dense(x), grad.shape[1], 1, of_x, of_weight)
    return to_x, to_weights[0]


def _empty_gradients(x: Tensor, features: int, num_parts: int, of_x: bool, of_weight: bool) -> tuple[Tensor, Tensor]:
    width = features * (x.shape[1] + 1) if of_weight else 0
    to_weights = x.new_empty(num_parts, width, dtype=working_precision(x))
    return torch.empty_like(x) if of_x else x.new_empty(0), to_weights


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.shift, ctx.relu, _, ctx.scale = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    of_x, of_weight = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
    to_x = to_weight = to_bias = None
    if of_x or of_weight:
        to_x, to_weights = _gradients(grad, x, weight, ctx.shift, ctx.relu, ctx.scale, of_x, of_weight)
    if of_weight:
        to_weight, to_bias = to_weights.split([weight.numel(), len(weight)])
        to_weight = to_weight.view(weight.shape)
    to_residual = grad if ctx.needs_input_grad[5] else None
    # Autograd converts them to the dtypes of the inputs.
    return to_x if of_x else None, to_weight, to_bias, None, None, to_residual, None


conv_op.register_autograd(_backward, setup_context=_keep)


def _launch(
    kernel: str,
    tensors: tuple[Tensor | None, ...],
    x: Tensor,
    wide: Tensor,
    grid: tuple[int, ...],
    options: dict[str, Any],
    *sizes: int,
) -> None:
    """Run a kernel that reads `x` and reads or writes `wide`, a map of the other side of the convolution."""
    from sparse_sr_attn.functional import map_kernels  # noqa: PLC0415

    precision = precision_options(x.dtype, x.dtype, "tf32x3", torch.get_float32_matmul_precision())
    shape = _num_pixels(x), *x.shape[2:], x.shape[1], wide.shape[1]
    with torch.cuda.device_of(x):
        getattr(map_kernels, kernel)[grid](
            *tensors, *shape, *sizes, **options, **precision, **_LAUNCH, LAST=is_channels_last(x)
        )


def _num_pixels(x: Tensor) -> int:
    return x.shape[0] * x.shape[2] * x.shape[3]


def _dense(x: Tensor) -> Tensor:
    return x if is_channels_last(x) else x.contiguous()


def _like(other: Tensor, x: Tensor) -> Tensor:
    """Return a map in the memory format of `x`."""
    return other.contiguous(memory_format=_format(x))


def _output(x: Tensor, weight: Tensor, residual: Tensor | None) -> Tensor:
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    shape = x.shape[0], len(weight), *x.shape[2:]
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=_format(x))


def _format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format
