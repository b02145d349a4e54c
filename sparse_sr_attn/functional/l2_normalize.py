"""Keys at unit length, so that scores are cosines times the length of the query."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from sparse_sr_attn.functional._torch import working_precision

_FLOOR = 5e-5


def l2_normalize(rows: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b n d"]:
    """Return the rows at length 1, in float32 at least; rows shorter than 5e-5, NLSA's floor, stay shorter.

    Examples:
        >>> l2_normalize(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    return F.normalize(rows.to(working_precision(rows)), dim=-1, eps=_FLOOR)


def l2_normalize_backward(grad: Float[Tensor, "n d"], rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Return what `unit_keys(rows)`, of rows in the precision it works in, sends back.

    Examples:
        >>> l2_normalize_backward(torch.rand(16, 8), torch.rand(16, 8)).shape
        torch.Size([16, 8])
    """
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    units = rows / length.clamp(min=_FLOOR)
    # Below the floor the length is a constant.
    along = (units * grad).sum(dim=-1, keepdim=True).masked_fill_(length < _FLOOR, 0)
    return (grad - along * units) / length.clamp(min=_FLOOR)
