"""Triton kernels for maps against torch's operators; without a GPU by triton's interpreter (`conftest.py`)."""

import os

import machine_code
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import Case
from tolerances import (
    assert_gradients_close,
    assert_values_close,
    gradients,
)
from torch import Tensor
from torch.nn import functional as F

from sparse_sr_attn.functional import batch_norm, conv_triton, l2_normalize
from sparse_sr_attn.functional.channels_last import pixel_products
from sparse_sr_attn.reference import shift as slow_shift

pytest.importorskip("triton", reason="needs triton")
pytestmark = pytest.mark.unhooked  # triton reads the source of what it compiles
few = settings(max_examples=10)
both_memories = pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
sizes = st.tuples(*(st.integers(1, high) for high in (3, 13, 7, 7)))
Sizes = tuple[int, ...]


def convolution(device: torch.device, size: Sizes, features: int, memory: torch.memory_format) -> list[Tensor]:
    """Return leaves: a map, weight and bias of a 1x1 convolution, and a residual in contiguous memory."""
    b, c, h, w = size
    x, *others = (
        Case().tensor(name, *shape, device=device)
        for name, shape in (
            ("x", size),
            ("weight", (features, c, 1, 1)),
            ("bias", (features,)),
            ("residual", (b, features, h, w)),
        )
    )
    x[:, :, -1:] = 0  # where the gradient of ReLU is 0
    return [each.requires_grad_() for each in (x.contiguous(memory_format=memory), *others)]


def expected_convolution(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, *, shift: bool, relu: bool, scale: float
) -> Tensor:
    x = x.relu() if relu else x
    branch = F.conv2d(slow_shift.shift2d(x) if shift else x, weight, bias)
    return branch if residual is None else residual + scale * branch


@both_memories
@few
@given(
    size=sizes,
    features=st.integers(1, 9),
    shift=st.booleans(),
    relu=st.booleans(),
    scale=st.sampled_from((None, 1.0, 0.1)),
)
@example(size=(2, 10, 1, 1), features=3, shift=True, relu=True, scale=None)
@example(size=(1, 4, 3, 3), features=4, shift=True, relu=False, scale=0.1)  # too few channels to shift
@example(size=(2, 70, 9, 11), features=66, shift=True, relu=True, scale=0.1)  # several blocks of each kind
@example(size=(2, 70, 9, 11), features=66, shift=False, relu=False, scale=1.0)
def test_convolution(
    device: torch.device,
    memory: torch.memory_format,
    size: Sizes,
    features: int,
    shift: bool,
    relu: bool,
    scale: float | None,
) -> None:
    """Of a map as it is or shifted, alone or times a scale and added to a residual."""
    leaves = convolution(device, size, features, memory)
    residual = None if scale is None else leaves[3]
    leaves = leaves if residual is not None else leaves[:3]
    options = {"shift": shift, "relu": relu, "scale": 1.0 if scale is None else scale}
    actual = conv_triton.conv1x1(*leaves[:3], residual=residual, **options)
    expected = expected_convolution(*leaves[:3], residual, **options)
    assert_values_close(actual, expected)
    assert actual.is_contiguous(memory_format=memory) or size[1] == 1  # which is in both formats
    probe = Case().tensor("probe", *expected.shape, device=device)
    assert_gradients_close(gradients(actual, leaves, probe), gradients(expected, leaves, probe))


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=str)
def test_convolution_of_halves_sums_in_float32(device: torch.device, weights: torch.dtype) -> None:
    """Weights and residuals keep their precision, as under autocast."""
    given = convolution(device, (2, 40, 9, 11), 6, torch.channels_last)
    dtypes = torch.bfloat16, weights, weights, weights
    leaves = [leaf.detach().bfloat16().to(dtype).requires_grad_() for leaf, dtype in zip(given, dtypes, strict=True)]
    options = {"shift": True, "relu": True, "scale": 0.1}
    actual = conv_triton.conv1x1(*leaves[:3], residual=leaves[3], **options)
    exact = [leaf.detach().float().requires_grad_() for leaf in leaves]
    expected = expected_convolution(*exact, **options)
    probe = Case().tensor("probe", *expected.shape, device=device).to(weights)
    found = [actual, *gradients(actual, leaves, probe)]
    wanted = [expected, *gradients(expected, exact, probe.float())]
    for mine, other, dtype in zip(found, wanted, (weights, *dtypes), strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.float(), other, rtol=2**-7, atol=2**-7)


def test_only_gradients_that_are_needed_are_computed(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[tuple[int, ...]] = []
    launch = conv_triton.launch
    monkeypatch.setattr(conv_triton, "launch", lambda *args: launched.append(args[4]) or launch(*args))
    leaves = [leaf.detach() for leaf in convolution(device, (1, 5, 3, 3), 2, torch.channels_last)]
    x, _, bias, residual = leaves
    for leaf, programs in ((x, 1), (bias, 1), (residual, 0)):
        launched.clear()
        leaf.requires_grad_()
        conv_triton.conv1x1(*leaves[:3], residual=residual).sum().backward()
        leaf.requires_grad_(False)
        assert launched == [(1, 1), (programs,)][: 1 + programs]


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
    batch_norm.move_op(*statistics, *expected, momentum, 1e-3)
    for mine, other in zip(kept, expected, strict=True):
        assert_values_close(mine, other)
    assert int(kept[-1]) == (8 if wrong is None else 7)


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
from sparse_sr_attn.functional import _conv_launch, map_kernels
from sparse_sr_attn.functional._triton import padded, precision_options

SIZES = ("num_pixels", "height", "width", "channels", "features", "share", "num_programs")
pixels, columns, read = _conv_launch.PIXELS, _conv_launch.COLUMNS, _conv_launch.READ
BLOCKS = {
    "conv": dict(PIXELS=pixels, CHANNELS=read, FEATURES=columns),
    "conv_backward": dict(PIXELS=pixels, CHANNELS=columns, FEATURES=columns, READ=read),
}
for dtype, weights in (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float64, torch.float64),
):
    for name, sides in BLOCKS.items():
        options = {**precision_options(dtype, dtype, "tf32x3", "highest"), **sides, "LAST": True, "SCALE": 0.1}
        forms = [{"SHIFT": True, "RELU": True}]
        if dtype != weights or dtype == torch.float32:
            forms += [{"SHIFT": False, "RELU": False, "residual": None}]
        types = {"x": dtype, "partial": torch.float64 if dtype == torch.float64 else torch.float32}
        types |= {"output": dtype} if name != "conv" else {}
        for form in forms:
            found = machine_code.usage(
                getattr(map_kernels, name),
                {**options, **form, **_conv_launch.LAUNCH},
                SIZES,
                lambda argument: machine_code.NAMES[types.get(argument, weights)],
            )
            print(name, dtype, weights, form, found, flush=True)
            assert dtype == torch.float64 or found.spilled == 0, (name, dtype, found)
"""

ALONE = """
import torch
import triton.language as tl
from machine_code import usage
from sparse_sr_attn.functional import map_kernels
from sparse_sr_attn.functional.cluster import triton_kernels

SIZES = {"numel", "channels", "height", "width", "group", "count", "num_tokens", "num_clusters"}
TYPES = {"num_batches": "i64", "num_updates": "i64"}
for map_type, work in (("fp32", "fp32"), ("bf16", "fp32"), ("fp64", "fp64")):
    rows = dict(FLOOR=5e-5, MOST=4.6, SCALED=True, WORK=getattr(tl, work.replace("fp", "float")), ROWS=128, BLOCK=16)
    for name, constants in {
        "move_statistics": dict(MOMENTUM=0.1, EPS=1e-5, BLOCK=64),
        "normalize": rows,
        "normalize_backward": rows,
        "apply_pending": dict(DECAY=0.999, THRESHOLD=0.01, EPS=1e-12, BLOCK_K=128, BLOCK_D=64),
    }.items():
        kernel = getattr(map_kernels, name, None) or getattr(triton_kernels, name)
        wide = {"parts"} | ({"output"} if name == "normalize" else set())
        wide |= set(kernel.arg_names) if name in ("move_statistics", "apply_pending") else set()
        sizes = {argument for argument in kernel.arg_names if argument in SIZES or argument.endswith("stride")}
        launch = {"num_warps": 4, "num_stages": 3}
        types = {argument: work for argument in wide} | TYPES
        needs = usage(kernel, constants | launch, sizes, lambda argument: types.get(argument, map_type))
        print(name, map_type, needs, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "90"])
def test_kernels_compile_for_gpus(capability: str, tmp_path: os.PathLike[str]) -> None:
    """The interpreter forgives types."""
    machine_code.run(ALONE, capability, tmp_path)
    machine_code.run(USAGE, capability, tmp_path)
