"""1x1 convolutions of one map with batch normalisation, by Triton kernels, as custom operators opaque to compilers.

In training the products are computed twice: for their statistics, and normalised. That takes less time than to write
them and to read them again, and the backward needs only the input and the output. Each kernel handles all convolutions.
The kernels are in `conv_norm_kernels`, which is imported when one of them runs.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_sr_attn.functional._conv_launch import (
    PIXELS,
    READ,
    blocks_of,
    dense,
    launch,
    like,
    map_like,
    num_pixels,
    parts_of,
    pixel_blocks,
)
from sparse_sr_attn.functional._operators import operator
from sparse_sr_attn.functional._torch import (
    backward_is_running,
    conv_precision,
    several_processes,
    working_precision,
)
from sparse_sr_attn.functional._triton import padded, precision_options
from sparse_sr_attn.functional.batch_norm import move_op
from sparse_sr_attn.functional.flops import teach_flop_counters

_TILE = 4096
"""Numbers of all parts that a program adds at a time."""


class Parameters(NamedTuple):
    """What 1x1 convolutions with batch normalisation learn, one tensor for each of them."""

    weights: Sequence[Float[Tensor, "o c 1 1"]]
    biases: Sequence[Float[Tensor, "o"]]
    scales: Sequence[Float[Tensor, "o"]]
    offsets: Sequence[Float[Tensor, "o"]]


class Buffers(NamedTuple):
    """The running statistics of batch normalisations, one tensor for each of them."""

    means: Sequence[Float[Tensor, "o"]]
    variances: Sequence[Float[Tensor, "o"]]
    num_batches: Sequence[Int[Tensor, ""]]


def conv1x1_norm(
    x: Float[Tensor, "b c h w"], parameters: Parameters, buffers: Buffers, *, eps: float
) -> list[Float[Tensor, "b o h w"]]:
    """Return 1x1 convolutions followed by batch normalisation in evaluation mode, in one kernel; not differentiable.

    Args:
        x: the feature map.
        parameters: of convolutions that agree in their number of features.
        buffers: of their normalisations.
        eps: added to the variances.

    Examples:
        >>> x, ones = torch.rand(2, 10, 6, 7), torch.ones(16)
        >>> parameters, buffers = ([torch.rand(16, 10, 1, 1)], *([ones],) * 3), ([ones], [ones], [torch.tensor(1)])
        >>> conv1x1_norm(x, Parameters(*parameters), Buffers(*buffers), eps=1e-5)[0].shape  # doctest: +SKIP
        torch.Size([2, 16, 6, 7])
    """
    teach_flop_counters()
    lists = (list(each) for each in (*parameters, *buffers[:2]))
    return cast("list[Tensor]", norm_op(x.to(conv_precision(x)), *lists, eps))


def conv1x1_batch_norm(
    x: Float[Tensor, "b c h w"], parameters: Parameters, buffers: Buffers, *, momentum: float, eps: float
) -> list[Float[Tensor, "b o h w"]]:
    """Return 1x1 convolutions followed by `batch_norm` in training, in three kernels; differentiable once.

    Args:
        x: the feature map, of more than one pixel.
        parameters: of convolutions that agree in their number of features.
        buffers: of their normalisations, updated in place.
        momentum: as in `batch_norm`.
        eps: as in `batch_norm`.

    Examples:
        >>> x, ones = torch.rand(2, 10, 6, 7), torch.ones(16)
        >>> parameters, buffers = ([torch.rand(16, 10, 1, 1)], *([ones],) * 3), ([ones], [ones], [torch.tensor(1)])
        >>> options = {"momentum": 0.1, "eps": 1e-5}
        >>> conv1x1_batch_norm(x, Parameters(*parameters), Buffers(*buffers), **options)[0].shape  # doctest: +SKIP
        torch.Size([2, 16, 6, 7])
    """
    teach_flop_counters()
    x, flat = x.to(conv_precision(x)), [tensor for each in parameters for tensor in each]
    return list(_BatchNorm.apply(x, buffers, momentum, eps, *flat))  # type: ignore[no-untyped-call]


@operator("conv1x1_norm")
def norm_op(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    scales: list[Tensor],
    offsets: list[Tensor],
    means: list[Tensor],
    variances: list[Tensor],
    eps: float,
) -> list[Tensor]:
    """Return `conv1x1_norm` for an `x` in the right precision."""
    from sparse_sr_attn.functional import conv_norm_kernels as kernels  # noqa: PLC0415

    x, features = dense(x), len(weights[0])
    outputs, (columns, num_blocks) = _maps(x, weights), blocks_of(features)
    vectors = (_dense(each) for each in (weights, biases, means, variances, scales, offsets))
    launch(
        kernels.conv_norm,
        (x, *vectors, tuple(outputs)),
        x,
        features,
        (pixel_blocks(x), num_blocks, len(weights)),
        {"EPS": eps, "PIXELS": PIXELS, "CHANNELS": READ, "FEATURES": columns},
    )
    return outputs


@norm_op.register_fake
def _(x: Tensor, weights: list[Tensor], *_: object) -> list[Tensor]:
    return _maps(dense(x), weights)


@operator("conv1x1_statistics", mutates_args=("running_means", "running_vars", "nums_batches"))
def _statistics(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    running_means: list[Tensor],
    running_vars: list[Tensor],
    nums_batches: list[Tensor],
    momentum: float,
    eps: float,
) -> Tensor:
    """Return mean and variance of each convolution, and move the running statistics."""
    from sparse_sr_attn.functional import conv_norm_kernels as kernels  # noqa: PLC0415

    x, features = dense(x), len(weights[0])
    (share, num_parts), (columns, num_blocks) = parts_of(x, READ), blocks_of(features)
    statistics = _empty_statistics(x, weights)
    parts = statistics.new_empty(len(weights), num_parts, 2, features)
    launch(
        kernels.partial_statistics,
        (x, _dense(weights), parts),
        x,
        features,
        (num_parts, num_blocks, len(weights)),
        {"PIXELS": READ, "CHANNELS": READ, "FEATURES": columns},  # more pixels spill registers
        share,
    )
    joins = several_processes()
    with torch.cuda.device_of(x):
        kernels.batch_statistics[len(weights),](
            *(parts, _dense(biases), tuple(running_means), tuple(running_vars), tuple(nums_batches), statistics),
            *(num_pixels(x), share, num_parts, features),
            MOMENTUM=momentum,
            MOVES=not joins and not backward_is_running(),
            **_adding(x, features, "WORK"),
        )
    if joins:
        running = zip(running_means, running_vars, nums_batches, strict=True)
        for (mean, variance), buffers in zip(statistics, running, strict=True):
            move_op(mean, (variance + eps).rsqrt(), num_pixels(x), *buffers, momentum, eps)
    return statistics


@_statistics.register_fake
def _(x: Tensor, weights: list[Tensor], *_: object) -> Tensor:
    return _empty_statistics(x, weights)


@operator("conv1x1_batch_norm_backward")
def _gradients(
    grads: list[Tensor],
    outputs: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    offsets: list[Tensor],
    statistics: Tensor,
    eps: float,
    of_x: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradient of `x`, empty if not wanted, and a row for each convolution with those of its parameters."""
    from sparse_sr_attn.functional import conv_norm_kernels as kernels  # noqa: PLC0415

    x, features, channels = dense(x), len(weights[0]), x.shape[1]
    (share, num_parts), count = parts_of(x, READ), len(weights)
    (rows, row_blocks), (columns, column_blocks) = blocks_of(features), blocks_of(channels)
    grads, outputs = ([like(each, x) for each in maps] for maps in (grads, outputs))
    parts = statistics.new_empty(2 * count, num_parts, features * (channels + 1))
    deviations = statistics.new_empty(num_parts, channels)
    launch(
        kernels.partial_moments,
        (x, (*grads, *outputs), _dense(offsets), parts, deviations),
        x,
        features,
        (num_parts, row_blocks * column_blocks, 2 * count),
        {"CHANNELS": columns, "FEATURES": rows, "READ": READ},
        share,
    )
    to_x, to_parameters = _empty_gradients(x, weights, of_x)
    coefficients = statistics.new_empty(count, 4, features)
    with torch.cuda.device_of(x):
        kernels.parameter_gradients[features, count](
            *(parts, deviations, _dense(weights), _dense(scales), _dense(offsets), statistics),
            *(to_parameters, coefficients, num_pixels(x), num_parts, channels, features),
            EPS=eps,
            **_adding(x, channels, "WORK", "DOT"),
        )
    if of_x:
        launch(
            kernels.input_gradient,
            (tuple(grads), tuple(outputs), _dense(weights), coefficients, to_x),
            x,
            features,
            (pixel_blocks(x), column_blocks),
            {"PIXELS": PIXELS, "CHANNELS": columns, "READ": READ},
        )
    return to_x, to_parameters


@_gradients.register_fake
def _(
    grads: list[Tensor],
    outputs: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    offsets: list[Tensor],
    statistics: Tensor,
    eps: float,
    of_x: bool,
) -> tuple[Tensor, Tensor]:
    return _empty_gradients(dense(x), weights, of_x)


class _BatchNorm(torch.autograd.Function):
    """`conv1x1_batch_norm`; a custom operator that changes its arguments cannot have a gradient by itself."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, buffers: Buffers, momentum: float, eps: float, *flat: Tensor
    ) -> tuple[Tensor, ...]:
        weights, biases, scales, offsets = _lists(flat, 4)
        statistics = _statistics(x, weights, biases, *(list(each) for each in buffers), momentum, eps)
        means, variances = (each.unbind() for each in statistics.unbind(1))
        outputs = norm_op(x, weights, biases, scales, offsets, means, variances, eps)
        ctx.save_for_backward(x, statistics, *weights, *scales, *offsets, *outputs)
        ctx.eps = eps
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, statistics, *others = ctx.saved_tensors
        weights, scales, offsets, outputs = _lists(others, 4)
        of_x = ctx.needs_input_grad[0]
        to_x, rows = _gradients([*grads], outputs, x, weights, scales, offsets, statistics, ctx.eps, of_x)
        features = len(weights[0])
        # Autograd converts them to the dtypes of the parameters.
        split = [row.split([row.numel() - 3 * features, *(features,) * 3]) for row in rows]
        to_weights, *to_vectors = zip(*split, strict=True)
        shaped = [grad.view(weight.shape) for grad, weight in zip(to_weights, weights, strict=True)]
        return to_x if of_x else None, None, None, None, *shaped, *(grad for each in to_vectors for grad in each)


def _adding(x: Tensor, width: int, *precisions: str) -> dict[str, Any]:
    """Return the options of a kernel that adds parts in rows of this width."""
    block = padded(width)
    found = precision_options(x.dtype, x.dtype, "tf32x3", torch.get_float32_matmul_precision())
    return {"PARTS": max(1, _TILE // block), "BLOCK": block, "num_warps": 8} | {
        name: found[name] for name in precisions
    }


def _lists(flat: Sequence[Tensor], number: int) -> list[list[Tensor]]:
    """Return so many lists of one length."""
    length = len(flat) // number
    return [list(flat[start : start + length]) for start in range(0, len(flat), length)]


def _dense(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in tensors)


def _maps(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    return [map_like(x, len(weight), x.dtype) for weight in weights]


def _empty_statistics(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    return x.new_empty(len(weights), 2, len(weights[0]), dtype=working_precision(x))


def _empty_gradients(x: Tensor, weights: Sequence[Tensor], of_x: bool) -> tuple[Tensor, Tensor]:
    rows = x.new_empty(len(weights), weights[0].numel() + 3 * len(weights[0]), dtype=working_precision(x))
    return torch.empty_like(x) if of_x else x.new_empty(0), rows
