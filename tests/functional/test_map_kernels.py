"""Triton kernels for maps against torch's operators; without a GPU by triton's interpreter (`conftest.py`)."""

import os

import machine_code
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from sparse_sr_attn.functional import batch_norm, l2_normalize, shift_triton
from sparse_sr_attn.functional.channels_last import pixel_products
from sparse_sr_attn.reference import shift as slow_shift
from sparse_sr_attn.testing.strategies import Case
from sparse_sr_attn.testing.tolerances import (
    assert_derivatives,
    assert_gradients_close,
    assert_values_close,
    gradients,
)

pytest.importorskip("triton", reason="needs triton")
pytestmark = pytest.mark.unhooked  # triton reads the source of what it compiles
few = settings(max_examples=10)
both_memories = pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
sizes = st.tuples(*(st.integers(1, high) for high in (3, 13, 7, 7)))


@both_memories
@pytest.mark.parametrize("relu", [False, True])
@few
@given(size=sizes, features=st.integers(1, 9))
@example(size=(2, 10, 1, 1), features=3)
@example(size=(1, 4, 3, 3), features=4)  # too few channels to shift
@example(size=(2, 70, 9, 11), features=66)  # several blocks of pixels, channels and features
def test_shift_convolution(
    device: torch.device, memory: torch.memory_format, relu: bool, size: tuple[int, ...], features: int
) -> None:
    x, weight, bias = (
        Case().tensor(name, *shape, device=device)
        for name, shape in (("x", size), ("weight", (features, size[1], 1, 1)), ("bias", (features,)))
    )
    x[:, :, -1:] = 0  # where the gradient of ReLU is 0
    leaves = [each.requires_grad_() for each in (x.contiguous(memory_format=memory), weight, bias)]
    actual = shift_triton.shift_conv_op(*leaves, relu)
    expected = F.conv2d(slow_shift.shift2d(leaves[0].relu() if relu else leaves[0]), weight, bias)
    assert_values_close(actual, expected)
    assert actual.is_contiguous(memory_format=memory) or size[1] == 1  # which is in both formats
    probe = Case().tensor("probe", *expected.shape, device=device)
    assert_gradients_close(gradients(actual, leaves, probe), gradients(expected, leaves, probe))


def test_shift_convolution_of_halves_sums_in_float32(device: torch.device) -> None:
    tensors = [
        Case().tensor(name, *shape, device=device).to(torch.bfloat16)
        for name, shape in (("x", (2, 40, 9, 11)), ("weight", (6, 40, 1, 1)), ("bias", (6,)))
    ]
    leaves = [each.requires_grad_() for each in tensors]
    actual = shift_triton.shift_conv_op(*leaves, True)
    exact = [leaf.detach().float().requires_grad_() for leaf in leaves]
    expected = F.conv2d(slow_shift.shift2d(exact[0].relu()), *exact[1:])
    probe = Case().tensor("probe", *expected.shape, device=device).to(torch.bfloat16)
    found = [actual, *gradients(actual, leaves, probe)]
    for mine, other in zip(found, [expected, *gradients(expected, exact, probe.float())], strict=True):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine.float(), other, rtol=2**-7, atol=2**-7)


def test_only_gradients_that_are_needed_are_computed(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    launch = shift_triton._launch
    monkeypatch.setattr(shift_triton, "_launch", lambda *args: launched.append(args[0]) or launch(*args))
    x, weight, bias = (Case().tensor("x", *size, device=device) for size in ((1, 5, 3, 3), (2, 5, 1, 1), (2,)))
    for leaf, needed in ((x, "shift_conv_input"), (bias, "shift_conv_weight")):
        launched.clear()
        leaf.requires_grad_()
        shift_triton.shift_conv_op(x, weight, bias, False).sum().backward()
        leaf.requires_grad_(False)
        assert launched == ["shift_conv", needed]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's in the interpreter, of who sees the NaN
@few
@given(
    channels=st.integers(1, 9),
    count=st.integers(2, 50),
    momentum=st.sampled_from((0.0, 0.1, 1.0)),
    wrong=st.sampled_from((None, float("nan"), float("inf"))),
)
@example(channels=5, count=2, momentum=0.1, wrong=float("nan"))
def test_moved_statistics(
    device: torch.device, channels: int, count: int, momentum: float, wrong: float | None
) -> None:
    """As without the kernel, and not at all if one of them is not finite."""
    mean, std, running_mean, running_var = (
        Case().tensor(name, channels, device=device) for name in ("mean", "std", "running_mean", "running_var")
    )
    if wrong is not None:
        mean[-1] = wrong
    statistics = (mean, 1 / (std.abs() + 0.1), count)
    kept = [running_mean, running_var.square(), torch.tensor(7, device=device)]
    expected = [tensor.clone() for tensor in kept]
    batch_norm._move_by_kernel(*statistics, *kept, momentum, 1e-3)
    batch_norm._move(*statistics, *expected, momentum, 1e-3)
    for mine, other in zip(kept, expected, strict=True):
        assert_values_close(mine, other)
    assert int(kept[-1]) == (8 if wrong is None else 7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 2), (5, 300)], ids=str)
def test_folded_normalisation(device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = Case().tensor("weight", *shape, 1, 1, device=device).to(dtype)
    vectors = [Case().tensor(name, shape[0], device=device).to(dtype) for name in ("bias", "mean", "a", "b")]
    vectors.insert(2, Case().tensor("var", shape[0], device=device).square().to(dtype))
    bound = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2**-7, "atol": 1e-6}
    for mine, other in zip(
        batch_norm.fold_op(weight, *vectors, 1e-5), batch_norm.fold(weight, *vectors, 1e-5), strict=True
    ):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, other, **bound)


@few
@given(batch=st.integers(1, 3), tokens=st.integers(1, 40), width=st.integers(1, 33))
@example(batch=2, tokens=3, width=256)
@example(batch=3, tokens=130, width=16)  # several programs
def test_unit_rows(device: torch.device, batch: int, tokens: int, width: int) -> None:
    rows = Case().tensor("rows", batch, tokens, width, device=device)
    rows[0, 0] = 0
    rows[-1, -1] *= 1e-6  # below the floor
    rows.requires_grad_()
    actual, expected = l2_normalize.normalize_op(rows, None), F.normalize(rows, dim=-1, eps=5e-5)
    assert_values_close(actual, expected)
    probe = Case().tensor("probe", batch, tokens, width, device=device)
    assert_gradients_close(gradients(actual, (rows,), probe), gradients(expected, (rows,), probe))


@few
@given(batch=st.integers(1, 3), tokens=st.integers(1, 40), width=st.integers(1, 33), logit=st.sampled_from((1, 4.6, 5)))
@example(batch=3, tokens=130, width=16, logit=2)  # several programs
def test_scaled_pixels(device: torch.device, batch: int, tokens: int, width: int, logit: float) -> None:
    """Read from planes and with a gradient in planes; a scale above the limit does not move."""
    planes = Case().tensor("rows", batch, width, tokens, device=device)
    planes[0, :, 0] = 0
    planes[-1, :, -1] *= 1e-6  # below the floor
    leaves = planes.requires_grad_(), torch.tensor([float(logit)], dtype=torch.float64, device=device).requires_grad_()
    actual = l2_normalize.normalize_op(planes.mT, leaves[1])
    assert actual.is_contiguous()
    expected = leaves[1].clamp(max=l2_normalize.MAX_LOGIT_SCALE).exp() * F.normalize(planes.mT, dim=-1, eps=5e-5)
    assert_values_close(actual, expected)
    probe = Case().tensor("probe", batch, width, tokens, device=device).mT
    assert_gradients_close(gradients(actual, leaves, probe), gradients(expected, leaves, probe))


def test_gradcheck_of_unit_rows(device: torch.device) -> None:
    rows = Case().tensor("rows", 1, 3, 5, device=device).requires_grad_()
    logit_scale = torch.ones(1, dtype=torch.float64, device=device).requires_grad_()
    assert_derivatives(lambda rows: l2_normalize.normalize_op(rows, None), (rows,))
    assert_derivatives(l2_normalize.normalize_op, (rows, logit_scale))


def test_unit_rows_of_halves_are_float32(device: torch.device) -> None:
    rows = Case().tensor("rows", 2, 5, 8, device=device).to(torch.bfloat16).requires_grad_()
    units = l2_normalize.normalize_op(rows, None)
    torch.testing.assert_close(units, F.normalize(rows.float(), dim=-1))
    (grad,) = torch.autograd.grad(units.square().sum(), rows)
    assert grad.dtype == torch.bfloat16


@both_memories
@pytest.mark.parametrize("batch", [1, 2])
def test_products_of_pixels(device: torch.device, memory: torch.memory_format, batch: int) -> None:
    if batch > 1 and memory == torch.contiguous_format:
        pytest.skip("several maps in planes are not one matrix")
    x, weight, bias = (
        Case().tensor(name, *shape, device=device)
        for name, shape in (("x", (batch, 3, 4, 5)), ("weight", (7, 3, 1, 1)), ("bias", (7,)))
    )
    x = x.contiguous(memory_format=memory)
    leaves: list[Tensor] = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    actual, expected = pixel_products(*leaves), F.conv2d(*leaves)
    assert_values_close(actual, expected)
    probe = Case().tensor("probe", *expected.shape, device=device)
    assert_gradients_close(gradients(actual, leaves, probe), gradients(expected, leaves, probe))


USAGE = """
import sys
import machine_code
import triton.language as tl
import torch
from sparse_sr_attn.functional import map_kernels, shift_triton
from sparse_sr_attn.functional._triton import padded, precision_options

SIZES = ("num_pixels", "height", "width", "channels", "features", "share")
pixels, columns, read = shift_triton._PIXELS, shift_triton._COLUMNS, shift_triton._READ
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    blocks = {
        "shift_conv": dict(PIXELS=pixels, CHANNELS=read, FEATURES=columns),
        "shift_conv_input": dict(PIXELS=pixels, CHANNELS=columns, FEATURES=read),
        "shift_conv_weight": dict(PIXELS=read, CHANNELS=columns, FEATURES=columns),
    }
    for name, sides in blocks.items():
        options = {**precision_options(dtype, dtype, "tf32x3", "highest"), **sides, "RELU": True, "LAST": True}
        accumulated = "fp64" if dtype == torch.float64 else "fp32"
        found = machine_code.usage(
            getattr(map_kernels, name),
            {**options, **shift_triton._LAUNCH},
            SIZES,
            lambda argument: accumulated if argument == "partial" else machine_code.NAMES[dtype],
        )
        print(name, dtype, found, flush=True)
        assert dtype == torch.float64 or found.spilled == 0, (name, dtype, found)
"""


COMPILE = """
import sys
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sparse_sr_attn.functional import map_kernels
from sparse_sr_attn.functional.cluster import triton_kernels

WORK = {"fp32": tl.float32, "fp64": tl.float64}
for map_type, work in (("fp32", "fp32"), ("bf16", "fp32"), ("fp64", "fp64")):
    options = {
        "move_statistics": dict(MOMENTUM=0.1, EPS=1e-5, BLOCK=64),
        "fold": dict(EPS=1e-5, WORK=WORK[work], BLOCK=128),
        "normalize": dict(FLOOR=5e-5, MOST=4.6, SCALED=True, WORK=WORK[work], ROWS=128, BLOCK=16),
        "normalize_backward": dict(FLOOR=5e-5, MOST=4.6, SCALED=True, WORK=WORK[work], ROWS=128, BLOCK=16),
        "apply_pending": dict(DECAY=0.999, THRESHOLD=0.01, EPS=1e-12, BLOCK_K=128, BLOCK_D=64),
    }
    types = {"num_batches": "i64", "num_updates": "i64"}
    for name, constants in options.items():
        kernel = getattr(map_kernels, name, None) or getattr(triton_kernels, name)
        accumulated = name in ("move_statistics", "apply_pending")
        signature = {}
        for argument in kernel.arg_names:
            if argument in constants:
                signature[argument] = "constexpr"
            elif argument.endswith("stride") or argument in (
                "numel", "channels", "height", "width", "group", "count", "num_tokens", "num_clusters"
            ):
                signature[argument] = "i32"
            else:
                wide = accumulated or argument == "parts" or (argument == "output" and name == "normalize")
                kind = work if wide else map_type
                signature[argument] = "*" + types.get(argument, kind)
        places = {(kernel.arg_names.index(argument),): value for argument, value in constants.items()}
        triton.compile(ASTSource(kernel, signature, places), target=GPUTarget("cuda", int(sys.argv[1]), 32))
        print(name, map_type, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "90"])
def test_kernels_compile_for_gpus(capability: str, tmp_path: os.PathLike[str]) -> None:
    """The interpreter forgives types."""
    machine_code.run(COMPILE, capability, tmp_path)
    machine_code.run(USAGE, capability, tmp_path)
