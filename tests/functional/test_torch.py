"""What export is told and compilers are not."""

import pytest
import torch
from torch import Tensor, nn

from sparse_sr_attn.functional._torch import is_exporting, larger, smaller

pytestmark = pytest.mark.unhooked  # compiles and exports


class Asks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + int(is_exporting())


class Measures(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.new_ones(smaller(x.shape[0], 3), larger(x.shape[0], 2))


def test_only_export_is_exporting() -> None:
    """Torch before 2.13 takes `torch.compile` for export, too, if it is asked by `torch.compiler.is_exporting`."""
    zero = torch.zeros(2)
    assert Asks()(zero).sum() == 0
    assert torch.compile(Asks(), backend="eager", fullgraph=True)(zero).sum() == 0
    assert torch.export.export(Asks(), (zero,)).module()(zero).sum() == 2


def test_sizes_stay_symbolic() -> None:
    length = torch.export.Dim("length", min=1, max=9)
    program = torch.export.export(Measures(), (torch.zeros(4),), dynamic_shapes={"x": {0: length}}).module()
    compiled = torch.compile(Measures(), backend="eager", fullgraph=True, dynamic=True)
    for number, shape in ((1, (1, 2)), (2, (2, 2)), (3, (3, 3)), (7, (3, 7))):
        for module in (Measures(), program, compiled):
            assert tuple(module(torch.zeros(number)).shape) == shape
