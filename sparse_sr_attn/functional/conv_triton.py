"""1x1 convolutions, of a shifted map or of a map as it is, by Triton kernels, as custom operators opaque to compilers.

The shifted map is not stored: products read each channel from where it is. A ReLU before the convolution and the
addition to a residual after it are part of the kernel. Maps may be in any memory format.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_sr_attn.functional._conv_launch import (
    PIXELS,
    READ,
    blocks_of,
    dense,
    launch,
    like,
    map_like,
    parts_of,
    pixel_blocks,
)
from sparse_sr_attn.functional._operators import operator
from sparse_sr_attn.functional._torch import conv_precision, working_precision
from sparse_sr_attn.functional.flops import teach_flop_counters


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


@operator("conv1x1")
def conv_op(
    x: Tensor, weight: Tensor, bias: Tensor, shift: bool, relu: bool, residual: Tensor | None, scale: float
) -> Tensor:
    """Return `conv1x1` for an `x` in the right precision."""
    from sparse_sr_attn.functional import map_kernels  # noqa: PLC0415

    x, output = dense(x), _output(x, weight, residual)
    columns, num_blocks = blocks_of(len(weight))
    launch(
        map_kernels.conv,
        (x, weight.contiguous(), bias.contiguous(), None if residual is None else like(residual, x), output),
        x,
        len(weight),
        (pixel_blocks(x), num_blocks),
        {
            **{"SHIFT": shift, "RELU": relu, "SCALE": scale},
            **{"PIXELS": PIXELS, "CHANNELS": READ, "FEATURES": columns},
        },
    )
    return output


@conv_op.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, shift: bool, relu: bool, residual: Tensor | None, scale: float
) -> Tensor:
    return _output(x, weight, residual)


@operator("conv1x1_backward")
def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, shift: bool, relu: bool, scale: float, of_x: bool, of_weight: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradient of `x`, and those of weight and bias in a row, in float32 or higher; empty if not wanted."""
    from sparse_sr_attn.functional import map_kernels  # noqa: PLC0415

    x = dense(x)
    features = grad.shape[1]
    share, num_parts = parts_of(x, READ)
    (rows, row_blocks), (columns, column_blocks) = blocks_of(features), blocks_of(x.shape[1])
    of_weights = of_weight * num_parts * row_blocks * column_blocks
    of_inputs = of_x * pixel_blocks(x) * column_blocks
    to_x, to_weights = _empty_gradients(x, features, num_parts, of_x, of_weight)
    launch(
        map_kernels.conv_backward,
        (like(grad, x), x, weight.contiguous(), to_x, to_weights),
        x,
        features,
        (of_weights + of_inputs,),
        {
            **{"SHIFT": shift, "RELU": relu, "SCALE": scale},
            **{"PIXELS": PIXELS, "CHANNELS": columns, "FEATURES": rows, "READ": READ},
        },
        share,
        of_weights,
    )
    return to_x, to_weights.sum(0) if of_weight else to_weights[0]


@_gradients.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, shift: bool, relu: bool, scale: float, of_x: bool, of_weight: bool
) -> tuple[Tensor, Tensor]:
    to_x, to_weights = _empty_gradients(dense(x), grad.shape[1], 1, of_x, of_weight)
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


def _output(x: Tensor, weight: Tensor, residual: Tensor | None) -> Tensor:
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return map_like(x, len(weight), dtype)
