"""Keys at unit length: the gradient is that of PyTorch's own normalisation, short rows included."""

import pytest
import torch
from torch.nn import functional as F

from sparse_sr_attn.functional.l2_normalize import l2_normalize, l2_normalize_backward


@pytest.mark.parametrize("length", [0.0, 1e-6, 4e-5, 6e-5, 1.0, 1e4])
def test_gradient_is_that_of_normalize(device: torch.device, length: float) -> None:
    draw = torch.Generator().manual_seed(0)
    rows = F.normalize(torch.randn(7, 5, generator=draw, dtype=torch.float64), dim=-1).mul(length).to(device)
    grad = torch.randn(7, 5, generator=draw, dtype=torch.float64).to(device)
    units = F.normalize(rows.requires_grad_(), dim=-1, eps=5e-5)
    assert torch.equal(l2_normalize(rows), units)
    (expected,) = torch.autograd.grad(units, rows, grad)
    sent = l2_normalize_backward(grad, rows.detach())
    torch.testing.assert_close(sent, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
