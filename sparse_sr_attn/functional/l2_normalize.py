"""Unit-length keys, for which scores are cosines times the norm of the query."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from sparse_sr_attn.functional._torch import working_precision
from sparse_sr_attn.functional.backend import runs_kernels

_FLOOR = 5e-5
_WIDEST = 256  # rows that the kernels take
_NUMBERS = 2**11  # of a program


def l2_normalize(rows: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b n d"]:
    """Return the rows scaled to unit length, in float32 or higher; norms are clamped to at least 5e-5, as in NLSA.

    Examples:
        >>> l2_normalize(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    if rows.shape[-1] <= _WIDEST and runs_kernels(rows.device):
        return normalize_op(rows)
    return F.normalize(rows.to(working_precision(rows)), dim=-1, eps=_FLOOR)


def _launch(rows: Tensor) -> tuple[tuple[int, ...], tuple[int, int], dict[str, Any]]:
    """Return grid, sizes and options of both kernels."""
    import triton.language as tl  # noqa: PLC0415

    width = rows.shape[-1]
    num_rows = rows.numel() // width
    block = 1 << (width - 1).bit_length()
    at_a_time = _NUMBERS // block
    work = tl.float64 if rows.dtype == torch.float64 else tl.float32
    options = {"FLOOR": _FLOOR, "WORK": work, "ROWS": at_a_time, "BLOCK": block}
    return (-(-num_rows // at_a_time),), (num_rows, width), options


@torch.library.custom_op("sparse_sr_attn::l2_normalize", mutates_args=())
def normalize_op(rows: Tensor) -> Tensor:
    """Return `l2_normalize` of rows of at most 256 columns, by a Triton kernel."""
    from sparse_sr_attn.functional import map_kernels as kernels  # noqa: PLC0415

    rows = rows.contiguous()
    output = torch.empty_like(rows, dtype=working_precision(rows))
    grid, sizes, options = _launch(rows)
    with torch.cuda.device_of(rows):
        kernels.normalize[grid](rows, output, *sizes, **options)
    return output


@normalize_op.register_fake
def _(rows: Tensor) -> Tensor:
    return rows.new_empty(rows.shape, dtype=working_precision(rows))


@torch.library.custom_op("sparse_sr_attn::l2_normalize_backward", mutates_args=())
def _backward_op(grad: Tensor, rows: Tensor) -> Tensor:
    from sparse_sr_attn.functional import map_kernels as kernels  # noqa: PLC0415

    grad, rows = grad.contiguous(), rows.contiguous()
    output = torch.empty_like(rows)
    grid, sizes, options = _launch(rows)
    with torch.cuda.device_of(rows):
        kernels.normalize_backward[grid](grad, rows, output, *sizes, **options)
    return output


@_backward_op.register_fake
def _(grad: Tensor, rows: Tensor) -> Tensor:
    return rows.new_empty(rows.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _send_back(ctx: Any, grad: Tensor) -> Tensor:
    return _backward_op(grad, *ctx.saved_tensors)


normalize_op.register_autograd(_send_back, setup_context=_keep)


def l2_normalize_backward(grad: Float[Tensor, "n d"], rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Return the gradient of `rows` from that of `l2_normalize(rows)`, for rows in working precision.

    Examples:
        >>> l2_normalize_backward(torch.rand(16, 8), torch.rand(16, 8)).shape
        torch.Size([16, 8])
    """
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    units = rows / length.clamp(min=_FLOOR)
    # Below the floor the length is a constant.
    along = (units * grad).sum(dim=-1, keepdim=True).masked_fill_(length < _FLOOR, 0)
    return (grad - along * units) / length.clamp(min=_FLOOR)
