"""Kernels of 1x1 convolutions with batch normalisation against torch's operators; without a GPU in the interpreter."""

import os
from collections.abc import Sequence
from typing import Any

import machine_code
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import Case
from tolerances import (
    assert_bit_equal,
    assert_gradients_close,
    assert_values_close,
    gradients,
    rms,
)
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sparse_sr_attn.functional import batch_norm, conv_norm_triton
from sparse_sr_attn.functional.conv_norm_triton import Buffers, Parameters, conv1x1_batch_norm, conv1x1_norm

pytest.importorskip("triton", reason="needs triton")
pytestmark = pytest.mark.unhooked  # triton reads the source of what it compiles
both_memories = pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
OPTIONS = {"momentum": 0.1, "eps": 1e-3}
Sizes = tuple[int, ...]


def convolutions(
    device: torch.device, number: int, features: int, channels: int, dtype: torch.dtype = torch.float64
) -> tuple[Parameters, Buffers]:
    """Return leaves, and statistics as some batches have left them."""

    def tensors(name: str, *shape: int) -> list[Tensor]:
        names = [f"{name} {place}" for place in range(number)]
        return [Case().tensor(each, *shape, dtype=dtype, device=device) for each in names]

    weights, *vectors = tensors("weight", features, channels, 1, 1), *(tensors(name, features) for name in "bso")
    parameters = Parameters(*([leaf.requires_grad_() for leaf in leaves] for leaves in (weights, *vectors)))
    counts = [torch.tensor(7 + place, device=device) for place in range(number)]
    variances = [each.square() + 0.1 for each in tensors("variance", features)]
    return parameters, Buffers(tensors("mean", features), variances, counts)


def copied(buffers: Buffers) -> Buffers:
    return Buffers(*([tensor.clone() for tensor in each] for each in buffers))


def one_by_one(x: Tensor, parameters: Parameters, buffers: Buffers, **options: float) -> list[Tensor]:
    """The same, a convolution and a normalisation at a time."""
    return [
        batch_norm.batch_norm(F.conv2d(x, weight, bias), scale, offset, *running, **options)
        for (weight, bias, scale, offset), running in zip(
            zip(*parameters, strict=True), zip(*buffers, strict=True), strict=True
        )
    ]


def flat(lists: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [tensor for each in lists for tensor in each]


@both_memories
@settings(max_examples=4)
@given(
    size=st.tuples(*(st.integers(1, high) for high in (3, 13, 7, 7))).filter(
        lambda size: size[0] * size[2] * size[3] > 1
    ),
    features=st.integers(1, 9),
    number=st.integers(1, 2),
    momentum=st.sampled_from((0.0, 0.1, 1.0)),
)
@example(size=(2, 1, 1, 1), features=1, number=1, momentum=0.1)
@example(size=(1, 70, 5, 13), features=66, number=2, momentum=0.1)  # several blocks of each kind
@example(size=(1, 3, 33, 65), features=4, number=1, momentum=0.1)  # several blocks in a part
def test_normalised_batches(
    device: torch.device, memory: torch.memory_format, size: Sizes, features: int, number: int, momentum: float
) -> None:
    """Values, gradients and running statistics."""
    x = Case().tensor("x", *size, device=device).contiguous(memory_format=memory).requires_grad_()
    parameters, buffers = convolutions(device, number, features, size[1])
    expected_buffers = copied(buffers)
    options = {"momentum": momentum, "eps": 1e-3}
    actual = conv1x1_batch_norm(x, parameters, buffers, **options)
    expected = one_by_one(x, parameters, expected_buffers, **options)
    leaves = [x, *flat(parameters)]
    for place, (mine, other) in enumerate(zip(actual, expected, strict=True)):
        assert_values_close(mine, other)
        assert mine.is_contiguous(memory_format=memory) or size[1] == 1  # which is in both formats
        probe = Case().tensor(f"probe {place}", *other.shape, device=device)
        found = gradients(mine, leaves, probe)
        assert_gradients_close(found, gradients(other, leaves, probe))
        assert not any(grad.any() for grad in found[1 + number : 1 + 2 * number])  # of biases
    for mine, other in zip(flat(buffers), flat(expected_buffers), strict=True):
        assert mine.dtype == other.dtype
        assert_values_close(mine, other)


def test_gradients_of_both_add_up(device: torch.device) -> None:
    x = Case().tensor("x", 2, 5, 4, 3, device=device).requires_grad_()
    parameters, buffers = convolutions(device, 2, 3, 5)
    leaves = [x, *flat(parameters)]
    sums = [torch.cat(call(x, parameters, copied(buffers), **OPTIONS)) for call in (conv1x1_batch_norm, one_by_one)]
    probe = Case().tensor("probe", *sums[0].shape, device=device)
    assert_gradients_close(*(gradients(total, leaves, probe) for total in sums))


def test_a_second_derivative_is_an_error(device: torch.device) -> None:
    x = Case().tensor("x", 1, 2, 2, 3, device=device).requires_grad_()
    (y,) = conv1x1_batch_norm(x, *convolutions(device, 1, 2, 2), **OPTIONS)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("frozen", ["x", "parameters"])
def test_only_gradients_that_are_needed_are_computed(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, frozen: str
) -> None:
    """None of the input; and that of the input alone is still right."""
    launched: list[str] = []
    launch = conv_norm_triton.launch
    monkeypatch.setattr(
        conv_norm_triton, "launch", lambda kernel, *args: launched.append(kernel.__name__) or launch(kernel, *args)
    )
    x = Case().tensor("x", 1, 5, 3, 4, device=device).requires_grad_(frozen != "x")
    parameters, buffers = convolutions(device, 1, 2, 5)
    for leaf in flat(parameters):
        leaf.requires_grad_(frozen == "x")
    leaves = flat(parameters) if frozen == "x" else [x]
    (expected,), (actual,) = (
        call(x, parameters, copied(buffers), **OPTIONS) for call in (one_by_one, conv1x1_batch_norm)
    )
    probe = Case().tensor("probe", *actual.shape, device=device)
    assert_gradients_close(gradients(actual, leaves, probe), gradients(expected, leaves, probe))
    assert ("input_gradient" in launched) == (frozen != "x")


def test_halves_sum_in_float32(device: torch.device) -> None:
    """With the parameters in float32, as under autocast; statistics are those of products that are not rounded."""
    given = Case().tensor("x", 2, 40, 9, 11, device=device).bfloat16().requires_grad_()
    parameters, buffers = convolutions(device, 2, 6, 40, torch.float32)
    with torch.no_grad():
        for weight in parameters.weights:
            weight.copy_(weight.bfloat16())
    exact, exact_buffers = (
        given.detach().double().requires_grad_(),
        Buffers(*([tensor.double() for tensor in each] for each in buffers[:2]), copied(buffers).num_batches),
    )
    doubles = Parameters(*([leaf.detach().double().requires_grad_() for leaf in leaves] for leaves in parameters))
    actual = torch.cat(conv1x1_batch_norm(given, parameters, buffers, **OPTIONS))
    expected = torch.cat(one_by_one(exact, doubles, exact_buffers, **OPTIONS))
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.double(), expected, rtol=2**-7, atol=1e-3)
    for mine, other in zip(flat(buffers[:2]), flat(exact_buffers[:2]), strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-5, atol=1e-5)
    probe = Case().tensor("probe", *actual.shape, device=device).bfloat16()
    found = gradients(actual, [given, *flat(parameters)], probe)
    wanted = gradients(expected, [exact, *flat(doubles)], probe.double())
    for mine, other, leaf in zip(found, wanted, [given, *flat(parameters)], strict=True):
        assert mine.dtype == leaf.dtype
        bound = 2**-6 * float(other.abs().max())
        torch.testing.assert_close(mine.double(), other, rtol=2**-6, atol=max(bound, 1e-6))


@pytest.mark.usefixtures("tensor_cores")
@pytest.mark.parametrize("mean", [0.0, 30.0, 1000.0])
def test_a_large_mean_does_no_harm(device: torch.device, mean: float) -> None:
    """In float32 by three products on tensor cores; most of the map is noise that its channels share."""
    exact = Case().tensor("x", 2, 20, 13, 11, device=device)
    exact = (exact + 60 * Case().tensor("noise", 2, 1, 13, 11, device=device) + mean).float().double()
    parameters, buffers = convolutions(device, 2, 6, 20, torch.float32)
    probe = Case().tensor("probe", 4, 6, 13, 11, device=device)

    def results(call: Any, dtype: torch.dtype) -> list[Tensor]:
        x = exact.to(dtype).requires_grad_()
        leaves = Parameters(*([leaf.detach().to(dtype).requires_grad_() for leaf in each] for each in parameters))
        running = Buffers(
            *([each.clone().to(dtype) for each in tensors] for tensors in buffers[:2]), buffers.num_batches
        )
        y = torch.cat(call(x, leaves, running, **OPTIONS))
        wanted = [x, *leaves.weights, *leaves.scales, *leaves.offsets]
        return [y, *gradients(y, wanted, probe.to(dtype)), *flat(running[:2])]

    oracle, peer = results(one_by_one, torch.float64), results(one_by_one, torch.float32)
    for mine, other, true in zip(results(conv1x1_batch_norm, torch.float32), peer, oracle, strict=True):
        error, allowed = (rms(found.detach().double() - true) for found in (mine, other))
        assert error <= 6 * allowed + 2**-21 * rms(true)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's in the interpreter, of who sees the NaN
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_moves_nothing(device: torch.device, wrong: float) -> None:
    x = Case().tensor("x", 2, 5, 4, 3, device=device)
    x[1, 2, 3, 0] = wrong
    parameters, buffers = convolutions(device, 2, 3, 5)
    before = copied(buffers)
    outputs = conv1x1_batch_norm(x, parameters, buffers, **OPTIONS)
    assert not torch.cat(outputs).isfinite().any()
    for mine, other in zip(flat(buffers), flat(before), strict=True):
        assert_bit_equal(mine, other)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["plain checkpoint", "reentrant checkpoint"])
def test_checkpointing_changes_no_bit(device: torch.device, use_reentrant: bool) -> None:
    """Neither the output, nor a gradient, nor the running statistics, which move once."""

    def results(checkpointed: bool) -> list[Tensor]:
        x = Case().tensor("x", 2, 5, 4, 3, device=device).requires_grad_()
        parameters, buffers = convolutions(device, 2, 3, 5)

        def call(x: Tensor) -> Tensor:
            return torch.cat(conv1x1_batch_norm(x, parameters, buffers, **OPTIONS))

        y = checkpoint(call, x, use_reentrant=use_reentrant) if checkpointed else call(x)
        y.square().sum().backward()
        return [y.detach(), x.grad, *(leaf.grad for leaf in flat(parameters)), *flat(buffers)]

    for mine, other in zip(results(checkpointed=True), results(checkpointed=False), strict=True):
        assert_bit_equal(mine, other)


def test_several_processes_join_their_statistics(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """As without the kernels; the other process has had twice the values."""
    for module in (batch_norm, conv_norm_triton):
        monkeypatch.setattr(module, "several_processes", lambda: True)
    others = torch.tensor([2.0, 4.0, 1.0], dtype=torch.float64, device=device)[:, None]  # of mean, variance and count
    monkeypatch.setattr(batch_norm, "gathered", lambda rows, what: torch.stack([rows, rows * others]))
    x = Case().tensor("x", 2, 5, 4, 3, device=device)
    parameters, buffers = convolutions(device, 2, 3, 5)
    expected = copied(buffers)
    wanted = one_by_one(x, parameters, expected, **OPTIONS)
    monkeypatch.setattr(batch_norm, "runs_kernels", lambda device: True)
    outputs = conv1x1_batch_norm(x, parameters, buffers, **OPTIONS)
    for mine, other in zip(outputs, wanted, strict=True):
        assert_values_close(mine, other)
    for mine, other in zip(flat(buffers), flat(expected), strict=True):
        assert_values_close(mine, other)


@both_memories
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("size", "features"), [((2, 3, 1, 5), 2), ((1, 70, 9, 11), 66), ((1, 3, 1, 1), 2)], ids=str)
def test_evaluation(
    device: torch.device, memory: torch.memory_format, dtype: torch.dtype, size: Sizes, features: int
) -> None:
    x = Case().tensor("x", *size, dtype=dtype, device=device).contiguous(memory_format=memory)
    parameters, buffers = convolutions(device, 2, features, size[1], dtype)
    with torch.no_grad():
        outputs = conv1x1_norm(x, parameters, buffers, eps=1e-3)
    bound = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2**-7, "atol": 1e-3}
    doubles = [[tensor.detach().double() for tensor in each] for each in (*parameters, *buffers[:2])]
    for actual, weight, bias, scale, offset, mean, var in zip(outputs, *doubles, strict=True):
        expected = F.batch_norm(F.conv2d(x.double(), weight, bias), mean, var, scale, offset, eps=1e-3)
        assert actual.dtype == dtype
        assert actual.is_contiguous(memory_format=memory)
        torch.testing.assert_close(actual.double(), expected, **bound)


USAGE = """
import sys
import machine_code
import torch
from sparse_sr_attn.functional import _conv_launch, conv_norm_kernels, conv_norm_triton
from sparse_sr_attn.functional._triton import precision_options

SIZES = ("num_pixels", "height", "width", "channels", "features", "share", "num_parts")
pixels, columns, read = _conv_launch.PIXELS, _conv_launch.COLUMNS, _conv_launch.READ
narrow, wide = dict(PIXELS=pixels, CHANNELS=read, FEATURES=columns), dict(CHANNELS=columns, READ=read)
KERNELS = {
    "conv_norm": narrow | {"EPS": 1e-5},
    "partial_statistics": narrow | {"PIXELS": read},
    "batch_statistics": {"MOMENTUM": 0.1, "MOVES": True},
    "partial_moments": wide | {"FEATURES": columns},
    "parameter_gradients": {"EPS": 1e-5},
    "input_gradient": wide | {"PIXELS": pixels},
}
MAPS = ("x", "outputs", "output", "grads")
OF_WORK = ("partial", "deviations", "statistics", "gradients", "coefficients")
ALONE = ("x", "output", *OF_WORK)
for dtype, weights in (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float64, torch.float64),
):
    work = torch.float64 if dtype == torch.float64 else torch.float32
    for name, sides in KERNELS.items():
        kernel = getattr(conv_norm_kernels, name)
        for number, width in ((1, 60), (2, 60), (2, 180)):
            def kind(argument):
                if argument == "nums_batches":
                    return number * ("i64",)
                if argument == "maps":
                    return 2 * number * (machine_code.NAMES[dtype],)
                found = machine_code.NAMES[dtype if argument in MAPS else work if argument in OF_WORK else weights]
                return found if argument in ALONE else number * (found,)

            like = torch.empty(1, width, 1, 1, dtype=dtype)
            if name in ("batch_statistics", "parameter_gradients"):
                options = conv_norm_triton._adding(like, width, *("WORK", "DOT")[: 1 + ("DOT" in kernel.arg_names)])
                options["num_stages"] = 3
            else:
                options = precision_options(dtype, dtype, "tf32x3", "highest") | _conv_launch.LAUNCH | {"LAST": True}
            found = machine_code.usage(kernel, {**options, **sides}, SIZES, kind)
            print(name, dtype, weights, number, width, found, flush=True)
            assert dtype == torch.float64 or found.spilled == 0, (name, dtype, found)
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "90"])
def test_kernels_compile_for_gpus(capability: str, tmp_path: os.PathLike[str]) -> None:
    """The interpreter forgives types."""
    machine_code.run(USAGE, capability, tmp_path)
