"""The precision in which the mathematics are done, whatever that of the features."""

import torch
from torch import Tensor


def working_precision(tensor: Tensor) -> torch.dtype:
    """Return the precision of scores, softmax and k-means over `tensor`: float32 for anything lower."""
    return torch.promote_types(tensor.dtype, torch.float32)
