"""What export is told and compilers are not, and what is multiplied in which precision."""

import pytest
import torch
from torch import Tensor, nn

from sparse_sr_attn.functional import _torch
from sparse_sr_attn.functional._torch import conv_precision, is_exporting, larger, multiply, product_precision, smaller

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


def test_half_numbers_are_multiplied_as_such_only_where_that_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for multiplies, of_bfloat16 in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(_torch, "_multiplies_bfloat16", lambda multiplies=multiplies: multiplies)
        assert product_precision(torch.bfloat16, cpu) == of_bfloat16
        assert product_precision(torch.float16, cpu) == torch.float32
        for dtype in (torch.float32, torch.float64):
            assert product_precision(dtype, cpu) == dtype
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            assert product_precision(dtype, gpu) == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16, None], ids=str)
def test_what_a_convolution_returns_is_known_before(dtype: torch.dtype, autocast: torch.dtype | None) -> None:
    x, conv = torch.ones(1, 2, 3, 3, dtype=dtype), nn.Conv2d(2, 2, 1).to(dtype)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        assert conv_precision(x) == conv(x).dtype
    assert conv_precision(x.to("meta")) == dtype


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
@pytest.mark.parametrize("threads", [1, 2])
def test_large_products_by_onednn_with_one_thread(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Overlapping windows, transposed factors and results of another precision, as the tiles have them."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(144 * 5, 64, generator=generator)
    windows = rows.unfold(0, 3 * 144, 144).transpose(1, 2)  # (3, 432, 64)
    weights, sent = (torch.randn(3, 144, width, generator=generator) for width in (432, 64))
    calls = []
    onednn = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(_torch, "_mkl_halves_vectors", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *a: calls.append(1) or onednn(*a))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for one, other, dtype in (
            (weights, windows, torch.float32),
            (sent, windows.transpose(1, 2), torch.float32),
            (weights, windows, torch.bfloat16),
        ):
            out = torch.empty(3, 144, other.shape[2], dtype=dtype)
            multiply(one, other, out)
            exact = one.double() @ other.double()
            error = (out.double() - exact).abs().max() / exact.abs().max()
            assert error < (1e-6 if dtype == torch.float32 else 4e-3)
        large = len(calls)
        multiply(weights[:, :36].contiguous(), windows, torch.empty(3, 36, 64))
    finally:
        torch.set_num_threads(before)
    assert large == (9 if threads == 1 else 0)
    assert len(calls) == large  # small products go to MKL
