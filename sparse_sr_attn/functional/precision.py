"""The precision in which the mathematics are done, whatever that of the features."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def working_precision(tensor: Tensor) -> torch.dtype:
    """Return the precision of scores, softmax and k-means over `tensor`: float32 for anything lower."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def lower_precision(first: Tensor, second: Tensor) -> torch.dtype:
    """Return the precision of a product of two: that of the one with fewer bits, of the second if they have as many."""
    return first.dtype if first.dtype.itemsize < second.dtype.itemsize else second.dtype


def without_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """Return a context without autocast on the device of `tensor`, if that device has one (meta has none)."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
