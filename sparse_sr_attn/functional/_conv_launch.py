"""What the launches of the Triton kernels of 1x1 convolutions share: blocks, parts of sums, memory formats."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_sr_attn.functional._triton import padded, precision_options
from sparse_sr_attn.functional.channels_last import is_channels_last

PIXELS, COLUMNS, READ = 64, 64, 32
"""Sides of the blocks: pixels; channels that a program writes; channels or pixels that it reads at a time."""

LAUNCH = {"num_warps": 8, "num_stages": 1}  # with these, no register is spilled on sm_80 and sm_90

_MOST_PARTS = 64  # of the gradients of a weight, which are summed afterwards


def launch(
    kernel: Any,
    tensors: tuple[Any, ...],
    x: Float[Tensor, "b c h w"],
    features: int,
    grid: tuple[int, ...],
    options: Mapping[str, Any],
    *sizes: int,
) -> None:
    """Run a kernel that reads `x`, or of its size, and maps with as many channels as a convolution has features.

    Args:
        kernel: its arguments are tensors, sizes and options.
        tensors: tensors, tuples of them, or `None`.
        x: the map that is convolved.
        features: of the convolution.
        grid: of programs.
        options: compile-time constants, except those for the dtype and the memory format of `x`.
        sizes: after those of the maps.
    """
    precision = precision_options(x.dtype, x.dtype, "tf32x3", torch.get_float32_matmul_precision())
    shape = num_pixels(x), *x.shape[2:], x.shape[1], features
    with torch.cuda.device_of(x):
        kernel[grid](*tensors, *shape, *sizes, **options, **precision, **LAUNCH, LAST=is_channels_last(x))


def num_pixels(x: Float[Tensor, "b c h w"]) -> int:
    """Return the number of pixels of all maps."""
    return x.shape[0] * x.shape[2] * x.shape[3]


def pixel_blocks(x: Float[Tensor, "b c h w"]) -> int:
    """Return the number of blocks of `PIXELS` pixels."""
    return -(-num_pixels(x) // PIXELS)


def blocks_of(channels: int) -> tuple[int, int]:
    """Return how many channels a program writes, and the number of such blocks."""
    columns = min(padded(channels), COLUMNS)
    return columns, -(-channels // columns)


def parts_of(x: Float[Tensor, "b c h w"], block: int) -> tuple[int, int]:
    """Return how many pixels, a multiple of `block`, are summed in a part, and the number of parts, at most 64."""
    blocks = -(-num_pixels(x) // block)
    share = -(-blocks // min(blocks, _MOST_PARTS)) * block
    return share, -(-num_pixels(x) // share)


def dense(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Return a map in channels-last or contiguous memory."""
    return x if is_channels_last(x) else x.contiguous()


def like(other: Float[Tensor, "b o h w"], x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b o h w"]:
    """Return a map in the memory format of `x`."""
    return other.contiguous(memory_format=_format(x))


def map_like(x: Float[Tensor, "b c h w"], features: int, dtype: torch.dtype) -> Float[Tensor, "b o h w"]:
    """Return an uninitialized map in the memory format of `x`."""
    shape = x.shape[0], features, *x.shape[2:]
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=_format(x))


def _format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format
