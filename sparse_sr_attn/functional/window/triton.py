"""Attention in windows of several sizes by one Triton kernel, as a custom operator opaque to compilers.

Queries and values are read where they are in the maps, and weights are not stored. Besides the maps, the backward keeps
two numbers for each slot. The kernels are in `triton_kernels`, which is imported when one of them runs.
"""

import functools
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor

from sparse_sr_attn.functional._operators import operator
from sparse_sr_attn.functional._torch import kept_on_device, working_precision
from sparse_sr_attn.functional._triton import Blocks, padded, precision_options
from sparse_sr_attn.functional.channels_last import channels_last, new_map
from sparse_sr_attn.functional.window.grid import WindowGrid

WIDEST = 128
"""Most channels of a group that the kernels accept."""

_SLOTS = 64  # that a block has at most

# By the columns of queries and values in a block: up to 64, up to 128, and more.
_FLOAT = {
    "forward": (Blocks(64, 32, 8), Blocks(32, 32, 8), Blocks(16, 32, 8)),
    "backward": (Blocks(16, 32), Blocks(16, 32, 8), Blocks(16, 16, 8, "ieee")),
}
_HALF = {
    "forward": (Blocks(64, 64, 8), Blocks(64, 32, 8), Blocks(32, 32, 8)),
    "backward": (Blocks(64, 32, 8), Blocks(32, 32, 8), Blocks(16, 16, 8)),
}
_DOUBLE = (Blocks(16, 32, 8, "ieee"), Blocks(16, 16, 8, "ieee"), Blocks(16, 16, 8, "ieee"))


@dataclass(frozen=True)
class _Groups:
    """Groups of channels of maps of one size.

    Attributes:
        grids: the windows of each group.
        shifts: pixels by which they are shifted.
        unshifts: pixels by which they are shifted back.
        query_widths: channels of queries and keys of each group.
        value_widths: channels of values of each group.
    """

    grids: tuple[WindowGrid, ...]
    shifts: tuple[int, ...]
    unshifts: tuple[int, ...]
    query_widths: tuple[int, ...]
    value_widths: tuple[int, ...]

    @classmethod
    def of(cls, like: Tensor, sizes: list[int], *lists: list[int]) -> "_Groups":
        """Return the groups of maps of the size of `like` that have values."""
        shifts, unshifts, query_widths, value_widths = lists
        count = len(value_widths)
        grids = tuple(WindowGrid(like.shape[2], like.shape[3], size) for size in sizes[:count])
        return cls(grids, tuple(shifts), tuple(unshifts), tuple(query_widths[:count]), tuple(value_widths))

    def slots(self) -> list[int]:
        """Return the number of slots of each group."""
        return [grid.num_windows * grid.window_size**2 for grid in self.grids]


def group_table(groups: _Groups, rows: int, device: torch.device) -> tuple[Int[Tensor, "g 11"]]:
    """Return the numbers that the kernels read for each group, for `rows` slots a program.

    They are: blocks in the groups before; side of a window, rows and columns of windows; shift, unshift; first channel
    and number of channels of queries, then of values; slots in the groups before.
    """
    table, blocks, slots, query, value = [], 0, 0, 0, 0
    for index, (grid, count) in enumerate(zip(groups.grids, groups.slots(), strict=True)):
        widths = groups.query_widths[index], groups.value_widths[index]
        moved = groups.shifts[index], groups.unshifts[index]
        shape = grid.window_size, grid.rows, grid.columns
        table.append([blocks, *shape, *moved, query, widths[0], value, widths[1], slots])
        blocks, slots = blocks + -(-count // rows), slots + count
        query, value = query + widths[0], value + widths[1]
    return (torch.tensor(table, dtype=torch.int32, device=device),)


_kept_table = kept_on_device(group_table)
_tables_in_graphs: dict[tuple[object, ...], Tensor] = {}


def table_for(groups: _Groups, rows: int, device: torch.device) -> Int[Tensor, "g 11"]:
    """Return `group_table` on the device; in a CUDA graph, which cannot copy from the CPU, that of the warm-up."""
    (table,) = _kept_table(groups, rows, device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _tables_in_graphs[groups, rows, device] = table  # every replay reads it
    return cast("Tensor", table)


@functools.lru_cache(maxsize=64)
def _options(
    kernel: str, query: torch.dtype, value: torch.dtype, groups: _Groups, matmul_precision: str
) -> dict[str, Any]:
    block_d, block_e = padded(max(groups.query_widths)), padded(max(groups.value_widths))
    width = (block_d + block_e > 64) + (block_d + block_e > 128)
    kinds = {torch.float64: _DOUBLE, torch.float32: _FLOAT[kernel]}
    blocks = kinds.get(value, _HALF[kernel])[width]
    return {
        "GROUPS": padded(len(groups.grids)),
        "EXACT": groups.shifts == groups.unshifts,
        "BLOCK_D": block_d,
        "BLOCK_E": block_e,
        "BLOCK_I": min(blocks.rows, _SLOTS),
        "BLOCK_J": min(blocks.seen, _SLOTS),
        "num_warps": blocks.warps,
        "num_stages": 1,  # of the pipeline; two spill registers
        **precision_options(query, value, blocks.precision, matmul_precision),
    }


def _launch(kernel: str, groups: _Groups, query: Tensor, value: Tensor, *tensors: Tensor) -> None:
    """Run a kernel on all groups; `tensors` are its arguments between the table of groups and the sizes."""
    from sparse_sr_attn.functional.window import triton_kernels  # noqa: PLC0415

    options = _options(kernel, query.dtype, value.dtype, groups, torch.get_float32_matmul_precision())
    table = table_for(groups, options["BLOCK_I"], query.device)
    num_blocks = sum(-(-count // options["BLOCK_I"]) for count in groups.slots())
    sizes = len(groups.grids), sum(groups.slots()), *value.shape[2:], query.shape[1], value.shape[1]
    with torch.cuda.device_of(query):
        getattr(triton_kernels, kernel)[num_blocks, len(query)](table, *tensors, *sizes, **options)


def _statistics(query: Tensor, groups: _Groups) -> tuple[Tensor, Tensor]:
    """Return empty tensors for the largest score of each slot, and for 1 / the sum of exponentials."""
    largest = query.new_empty(len(query), sum(groups.slots()), dtype=working_precision(query))
    return largest, torch.empty_like(largest)


@operator("grouped_window_attention")
def attention_op(
    query: Tensor,
    value: Tensor,
    window_sizes: list[int],
    shifts: list[int],
    unshifts: list[int],
    query_widths: list[int],
    value_widths: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `window.grouped_window_attention`, and the statistics that the backward needs."""
    groups = _Groups.of(value, window_sizes, shifts, unshifts, query_widths, value_widths)
    query, value = channels_last(query), channels_last(value)
    output, statistics = new_map(value, value.shape[1]), _statistics(query, groups)
    _launch("forward", groups, query, value, query, value, output, *statistics)
    return output, *statistics


@attention_op.register_fake
def _(query: Tensor, value: Tensor, *lists: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    return new_map(value, value.shape[1]), *_statistics(query, _Groups.of(value, *lists))


@operator("grouped_window_attention_backward")
def _backward_op(
    grad_output: Tensor,
    query: Tensor,
    value: Tensor,
    output: Tensor,
    largest: Tensor,
    inverse: Tensor,
    window_sizes: list[int],
    shifts: list[int],
    unshifts: list[int],
    query_widths: list[int],
    value_widths: list[int],
) -> tuple[Tensor, Tensor]:
    groups = _Groups.of(value, window_sizes, shifts, unshifts, query_widths, value_widths)
    grad_output, query, value = (channels_last(x) for x in (grad_output, query, value))
    grad_query, grad_value = new_map(query, query.shape[1]), new_map(value, value.shape[1])
    if sum(groups.query_widths) < query.shape[1]:
        grad_query[:, sum(groups.query_widths) :] = 0  # groups without values
    sent = grad_output, query, value, output, largest, inverse, grad_query, grad_value
    _launch("backward", groups, query, value, *sent)
    return grad_query, grad_value


@_backward_op.register_fake
def _(grad_output: Tensor, query: Tensor, value: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return new_map(query, query.shape[1]), new_map(value, value.shape[1])


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, value, *ctx.options = inputs
    ctx.set_materialize_grads(False)  # of the statistics
    ctx.save_for_backward(query, value, *output)


def _backward(ctx: Any, grad_output: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * 7
    return (*_backward_op(grad_output, *ctx.saved_tensors, *ctx.options), *(None,) * 5)


attention_op.register_autograd(_backward, setup_context=_context)
