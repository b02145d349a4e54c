"""What the launches of Triton kernels share: sides of blocks, and the precision of products."""

from dataclasses import dataclass
from typing import Any

import torch

from sparse_sr_attn.functional.backend import interpreting


@dataclass(frozen=True)
class Blocks:
    """Launch options of a kernel, for which `cuobjdump` reports no spilled register on sm_80 and sm_90.

    Attributes:
        rows: tokens or slots in a program.
        seen: tokens or slots that it reads at a time.
        warps: warps of a program.
        precision: of products in float32. "tf32x3" sums three products on tensor cores and errs no more than float32
            ("ieee", without tensor cores); it is worth its registers only in rows that are not too wide.
    """

    rows: int
    seen: int
    warps: int = 4
    precision: str = "tf32x3"


def padded(size: int) -> int:
    """Return the side of a block that holds `size`: a power of two, at least the minimum of matrix units."""
    return max(16, 1 << (size - 1).bit_length())


def precision_options(query: torch.dtype, value: torch.dtype, precision: str, matmul_precision: str) -> dict[str, Any]:
    """Return the compile-time options of a kernel for queries and values of these dtypes.

    Args:
        query: dtype of the queries. Scores are computed in float32 or higher.
        value: dtype of the values.
        precision: that of `Blocks`.
        matmul_precision: `torch.get_float32_matmul_precision()`.
    """
    import triton.language as tl  # noqa: PLC0415

    names = {
        torch.float64: tl.float64,
        torch.float32: tl.float32,
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
    }
    # The interpreter takes bits of bfloat16 for numbers. Products of two are exact in float32, so nothing else changes.
    exact = torch.float32 if interpreting() and value == torch.bfloat16 else value
    work = torch.float64 if query == torch.float64 else torch.float32
    coarse = value in (torch.bfloat16, torch.float16) or matmul_precision != "highest"
    return {
        "WORK": names[work],
        "DOT": names[exact],
        "PRECISION": "tf32" if coarse and work == torch.float32 else precision,
    }
