"""Unit-length keys, for which scores are cosines times the norm of the query."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from sparse_sr_attn.functional._operators import operator
from sparse_sr_attn.functional._torch import working_precision
from sparse_sr_attn.functional.backend import runs_kernels

MAX_LOGIT_SCALE = math.log(100)
"""The logarithm of the largest scale of cosines."""

SHORTEST = 5e-5
"""The least length that rows are divided by, as in NLSA."""

_WIDEST = 256  # rows that the kernels take
_NUMBERS = 2**11  # of a program


def l2_normalize(rows: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b n d"]:
    """Return the rows scaled to unit length, in float32 or higher; norms are clamped to at least 5e-5, as in NLSA.

    Examples:
        >>> l2_normalize(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    if _fits_kernels(rows):
        return normalize_op(rows, None)
    return F.normalize(rows.to(working_precision(rows)), dim=-1, eps=SHORTEST)


def scale_rows(rows: Float[Tensor, "*b n d"], logit_scale: Float[Tensor, "1"]) -> Float[Tensor, "*b n d"]:
    """Return `l2_normalize(rows)` times the exponential of `logit_scale`, at most 100.

    Examples:
        >>> scale_rows(torch.tensor([[3.0, 4.0]]), torch.zeros(1))
        tensor([[0.6000, 0.8000]])
    """
    work = working_precision(logit_scale)
    if _fits_kernels(rows) and work == working_precision(rows):
        return normalize_op(rows, logit_scale)
    return logit_scale.to(work).clamp(max=MAX_LOGIT_SCALE).exp() * l2_normalize(rows)


def _fits_kernels(rows: Tensor) -> bool:
    return rows.shape[-1] <= _WIDEST and runs_kernels(rows.device)


def _strided(rows: Tensor) -> Tensor:
    """Return rows as (b, n, d), copied only if there are more dimensions that no strides describe."""
    return rows if rows.ndim == 3 and not rows.is_contiguous() else rows.reshape(1, -1, rows.shape[-1])


def _like(rows: Tensor) -> Tensor:
    return torch.empty_like(rows) if rows.ndim == 3 else rows.new_empty(rows.shape)


def _launch(rows: Tensor, logit_scale: Tensor | None) -> tuple[tuple[int], tuple[int, int], dict[str, Any]]:
    """Return grid, sizes and options of both kernels for rows (b, n, d)."""
    import triton.language as tl  # noqa: PLC0415

    batch, num_tokens, width = rows.shape
    block = 1 << (width - 1).bit_length()
    at_a_time = _NUMBERS // block
    work = tl.float64 if rows.dtype == torch.float64 else tl.float32
    options = {"FLOOR": SHORTEST, "MOST": MAX_LOGIT_SCALE, "SCALED": logit_scale is not None, "WORK": work}
    options |= {"ROWS": at_a_time, "BLOCK": block}
    return (batch * -(-num_tokens // at_a_time),), (num_tokens, width), options


@operator("l2_normalize")
def normalize_op(rows: Tensor, logit_scale: Tensor | None) -> Tensor:
    """Return `l2_normalize` or `scale_rows` of rows of at most 256 columns, by a Triton kernel."""
    from sparse_sr_attn.functional import map_kernels as kernels  # noqa: PLC0415

    output = rows.new_empty(rows.shape, dtype=working_precision(rows))
    read = _strided(rows)
    grid, sizes, options = _launch(read, logit_scale)
    with torch.cuda.device_of(rows):
        scale = output if logit_scale is None else logit_scale
        kernels.normalize[grid](read, scale, output, *sizes, *read.stride(), **options)
    return output


@normalize_op.register_fake
def _(rows: Tensor, logit_scale: Tensor | None) -> Tensor:
    return rows.new_empty(rows.shape, dtype=working_precision(rows))


@operator("l2_normalize_backward")
def _backward_op(grad: Tensor, rows: Tensor, logit_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the gradients of the rows, with their strides, and of `logit_scale`, empty without it."""
    from sparse_sr_attn.functional import map_kernels as kernels  # noqa: PLC0415

    output = _like(rows)
    read = _strided(rows)
    sent, written = (each.reshape(read.shape) for each in (grad, output))
    grid, sizes, options = _launch(read, logit_scale)
    parts = grad.new_empty(*grid)
    with torch.cuda.device_of(rows):
        scale = parts if logit_scale is None else logit_scale
        strides = (*sent.stride(), *read.stride(), *written.stride())
        kernels.normalize_backward[grid](sent, read, scale, written, parts, *sizes, *strides, **options)
    if logit_scale is None:
        return output, rows.new_empty(0)
    return output, parts.sum(dim=0, keepdim=True).to(logit_scale.dtype)


@_backward_op.register_fake
def _(grad: Tensor, rows: Tensor, logit_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    return _like(rows), rows.new_empty(0) if logit_scale is None else torch.empty_like(logit_scale)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _send_back(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
    rows, logit_scale = ctx.saved_tensors
    to_rows, to_scale = _backward_op(grad, rows, logit_scale)
    return to_rows, None if logit_scale is None else to_scale


normalize_op.register_autograd(_send_back, setup_context=_keep)


def l2_normalize_backward(grad: Float[Tensor, "n d"], rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Return the gradient of `rows` from that of `l2_normalize(rows)`, for rows in working precision.

    Examples:
        >>> l2_normalize_backward(torch.rand(16, 8), torch.rand(16, 8)).shape
        torch.Size([16, 8])
    """
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    units = rows / length.clamp(min=SHORTEST)
    # Below the floor the length is a constant.
    along = (units * grad).sum(dim=-1, keepdim=True).masked_fill_(length < SHORTEST, 0)
    return (grad - along * units) / length.clamp(min=SHORTEST)
