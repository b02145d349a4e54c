"""What export needs to be told, and compilers of older torch must not be."""

import torch


def is_exporting() -> bool:
    """Return whether `torch.export` is at work; `torch.compile` is not that.

    Older torch (seen in 2.11) answers `torch.compiler.is_exporting()` with True in `torch.compile`, too. The flag
    behind it is right there as well, and is what newer ones read.
    """
    return torch.compiler._is_exporting_flag


def smaller(one: int, other: int) -> int:
    """Return the smaller of two sizes, which may be symbolic: export must be told so, older compilers must not."""
    return torch.sym_min(one, other) if is_exporting() else min(one, other)


def larger(one: int, other: int) -> int:
    """Return the larger of two sizes, as `smaller` does."""
    return torch.sym_max(one, other) if is_exporting() else max(one, other)
