"""Unit-length keys, for which scores are cosines times the norm of the query."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from sparse_sr_attn.functional._torch import working_precision

_FLOOR = 5e-5


def l2_normalize(rows: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b n d"]:
    """Return the rows scaled to unit length, in float32 or higher; norms are clamped to at least 5e-5, as in NLSA.

    Examples:
        >>> l2_normalize(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    return F.normalize(rows.to(working_precision(rows)), dim=-1, eps=_FLOOR)


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
