"""Batch normalisation against torch's module and plain formulae, and when its running statistics must stay."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from strategies import Case
from tolerances import (
    LOW_PRECISION,
    assert_bit_equal,
    assert_gradients_close,
    assert_no_worse,
    assert_values_close,
    gradients,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparse_sr_attn.functional import batch_norm as fast
from sparse_sr_attn.reference import batch_norm as slow

half_precisions = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


class Running(NamedTuple):
    """The running statistics, in the order of the function's arguments."""

    mean: Tensor
    var: Tensor
    num_batches: Tensor

    def copy(self) -> "Running":
        return Running(*(tensor.clone() for tensor in self))


@dataclass(frozen=True)
class Map:
    """Sizes of a map and options of its normalisation, and the seed of its numbers."""

    batch: int = 2
    channels: int = 3
    height: int = 4
    width: int = 5
    momentum: float = 0.1
    eps: float = 1e-5
    seed: int = 0

    @property
    def count(self) -> int:
        """Values per channel."""
        return self.batch * self.height * self.width

    @property
    def options(self) -> dict[str, float]:
        return {"momentum": self.momentum, "eps": self.eps}

    def tensor(
        self, name: str, *shape: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64
    ) -> Tensor:
        return Case(seed=self.seed).tensor(name, *shape, dtype=dtype, device=device)

    def x(self, device: torch.device, name: str = "x", dtype: torch.dtype = torch.float64) -> Tensor:
        """A map whose channels differ in mean and deviation."""
        shape = (self.batch, self.channels, self.height, self.width)
        offset = 1 + torch.arange(self.channels, dtype=torch.float64, device=device)[:, None, None]
        return (offset - offset.sqrt() * self.tensor(name, *shape, device=device)).to(dtype).requires_grad_()

    def parameters(self, device: torch.device, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        weight, bias = (self.tensor(name, self.channels, device=device, dtype=dtype) for name in ("weight", "bias"))
        return weight.requires_grad_(), bias.requires_grad_()

    def running(self, device: torch.device, dtype: torch.dtype = torch.float64) -> Running:
        """Statistics as some batches have left them."""
        mean, root = (self.tensor(name, self.channels, device=device, dtype=dtype) for name in ("mean", "root"))
        return Running(mean, root.square() + 0.1, torch.tensor(7, device=device))

    def module(self, device: torch.device) -> nn.BatchNorm2d:
        """Torch's own, with the same parameters and statistics."""
        norm = nn.BatchNorm2d(self.channels, eps=self.eps, momentum=self.momentum, device=device, dtype=torch.float64)
        values = (*self.parameters(device), *self.running(device))
        norm.load_state_dict(dict(zip(norm.state_dict(), values, strict=True)))
        return norm


def maps() -> st.SearchStrategy[Map]:
    return st.builds(
        Map,
        batch=st.integers(1, 3),
        channels=st.integers(1, 7),
        height=st.integers(1, 9),
        width=st.integers(1, 9),
        momentum=st.sampled_from((0.0, 0.1, 0.37, 1.0)),
        eps=st.sampled_from((1e-5, 1e-3, 0.1)),
        seed=st.integers(0, 2**16),
    )


TWO_VALUES = Map(batch=2, height=1, width=1)
ONE_VALUE = Map(batch=1, height=1, width=1, seed=1)
LAST_BATCH_ONLY = Map(momentum=1.0, seed=2)


def normed(case: Map, x: Tensor, parameters: tuple[Tensor, Tensor], running: Running) -> Tensor:
    return fast.batch_norm(x, *parameters, *running, **case.options)


def assert_unmoved(running: Running, before: Running) -> None:
    for now, then in zip(running, before, strict=True):
        assert_bit_equal(now, then)


@given(case=maps(), steps=st.integers(1, 4))
@example(case=TWO_VALUES, steps=3)
@example(case=LAST_BATCH_ONLY, steps=2)
def test_it_is_torchs_module_in_training(device: torch.device, case: Map, steps: int) -> None:
    """Output, gradients and buffers, over several batches."""
    assume(case.count > 1)
    module, parameters, running = case.module(device), case.parameters(device), case.running(device)
    for step in range(steps):
        x = case.x(device, f"x {step}")
        actual, expected = normed(case, x, parameters, running), module(x)
        assert_values_close(actual, expected)
        probe = case.tensor("probe", *actual.shape, device=device)
        assert_gradients_close(
            gradients(actual, (x, *parameters), probe), gradients(expected, (x, *module.parameters()), probe)
        )
        for mine, other in zip(running, module.buffers(), strict=True):
            assert mine.dtype == other.dtype
            assert_values_close(mine, other)
    assert running.num_batches == 7 + steps


@given(case=maps())
@example(case=TWO_VALUES)
@example(case=ONE_VALUE)
@example(case=LAST_BATCH_ONLY)
def test_it_equals_the_formulae(device: torch.device, case: Map) -> None:
    x, parameters, running = case.x(device), case.parameters(device), case.running(device)
    expected, *moved = slow.batch_norm(x, *parameters, *running.copy(), **case.options)
    actual = normed(case, x, parameters, running)
    assert_values_close(actual, expected)
    leaves = (x, *parameters)
    probe = case.tensor("probe", *actual.shape, device=device)
    assert_gradients_close(gradients(actual, leaves, probe), gradients(expected, leaves, probe))
    for mine, other in zip(running, moved, strict=True):
        assert_values_close(mine, other)


@given(case=maps())
@example(case=LAST_BATCH_ONLY)
def test_statistics_move_without_gradients_too(device: torch.device, case: Map) -> None:
    """Not a bit otherwise than with them, and they are no part of a graph."""
    x, parameters, running = case.x(device), case.parameters(device), case.running(device)
    silent = running.copy()
    with torch.no_grad():
        output = normed(case, x, parameters, silent)
    assert_bit_equal(output, normed(case, x, parameters, running).detach())
    assert_unmoved(silent, running)
    assert not any(tensor.requires_grad for tensor in running)


@given(case=maps())
@example(case=TWO_VALUES)
def test_strides_do_not_matter(device: torch.device, case: Map) -> None:
    """A map in channels-last memory is the same map."""
    x, parameters, running = case.x(device).detach(), case.parameters(device), case.running(device)
    other = running.copy()
    expected = normed(case, x, parameters, running)
    assert_values_close(normed(case, x.contiguous(memory_format=torch.channels_last), parameters, other), expected)
    for mine, then in zip(other, running, strict=True):
        assert_values_close(mine, then)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["plain checkpoint", "reentrant checkpoint"])
@given(case=maps())
@example(case=TWO_VALUES)
@example(case=ONE_VALUE)
def test_checkpointing_changes_no_bit(device: torch.device, use_reentrant: bool, case: Map) -> None:
    """Neither the output, nor a gradient, nor the running statistics, which move once a step."""

    def steps(through: Callable[..., Tensor]) -> tuple[list[Tensor], Running]:
        parameters, running = case.parameters(device), case.running(device)
        results: list[Tensor] = []
        for step in range(2):
            x = case.x(device, f"x {step}")
            output = through(lambda x, *parameters: normed(case, x, parameters, running), x, *parameters)
            probe = case.tensor("probe", *output.shape, device=device)
            (output * probe).sum().backward()
            results += [output.detach(), x.grad]
        return results + [parameter.grad for parameter in parameters], running

    expected, plain = steps(lambda function, *inputs: function(*inputs))
    actual, again = steps(lambda function, *inputs: checkpoint(function, *inputs, use_reentrant=use_reentrant))
    for mine, other in zip(actual, expected, strict=True):
        assert_bit_equal(mine, other)
    assert_unmoved(again, plain)
    assert plain.num_batches == (7 if case.count == 1 else 9)


@given(case=maps())
@example(case=TWO_VALUES)
def test_nothing_moves_while_a_backward_runs(device: torch.device, case: Map) -> None:
    x, parameters, running = case.x(device), case.parameters(device), case.running(device)
    forward = normed(case, x, parameters, running)
    before = running.copy()
    recomputed = []

    def recompute(_: Tensor) -> None:
        recomputed.append(normed(case, x, parameters, running))

    forward.register_hook(recompute)
    forward.sum().backward()
    assert_bit_equal(recomputed[0].detach(), forward.detach())
    assert_unmoved(running, before)


@pytest.mark.promise("R8")
@given(case=maps(), filling=st.sampled_from((float("nan"), float("inf"), float("-inf"))))
@example(case=Map(), filling=float("nan"))
@example(case=Map(momentum=0.0), filling=float("inf"))
@example(case=LAST_BATCH_ONLY, filling=float("-inf"))
def test_a_batch_that_is_not_finite_moves_nothing(device: torch.device, case: Map, filling: float) -> None:
    """Not even the statistics of the channels that are; and the next batch moves them as if it had not been."""
    assume(case.count > 1)
    parameters, running = case.parameters(device), case.running(device)
    before = running.copy()
    broken = case.x(device, "broken").detach()
    place = int(Case(seed=case.seed).integers("place", broken.numel(), 1))
    broken.view(-1)[place] = filling
    output = normed(case, broken, parameters, running)
    assert_unmoved(running, before)
    others = torch.arange(case.channels, device=device) != place // (case.height * case.width) % case.channels
    assert not output[:, ~others].isfinite().all()
    assert output[:, others].isfinite().all()
    normed(case, case.x(device), parameters, running)
    normed(case, case.x(device), parameters, before)
    assert_unmoved(running, before)
    assert running.num_batches == 8


@pytest.mark.parametrize("largest", [1e20, 1e39], ids=["variance", "mean"])
def test_statistics_that_the_buffers_cannot_hold_move_nothing(device: torch.device, largest: float) -> None:
    """In float64 they are finite, in the float32 of the buffers they are not."""
    case = Map()
    parameters, running = case.parameters(device), case.running(device, torch.float32)
    before = running.copy()
    x = case.x(device).detach()
    x[0, 1, 2, 3] = largest * case.count
    mean, variance = x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3))
    assert mean.isfinite().all()
    assert variance.isfinite().all()
    assert not variance.float().isfinite().all()
    assert normed(case, x, parameters, running).isfinite().all()
    assert_unmoved(running, before)


@given(case=maps())
@example(case=ONE_VALUE)
def test_a_single_value_per_channel_is_normalised_by_the_running_statistics(device: torch.device, case: Map) -> None:
    """As torch's module does in evaluation; a variance there is not. Gradients flow, nothing moves."""
    case = Map(1, case.channels, 1, 1, case.momentum, case.eps, case.seed)
    x, parameters, running = case.x(device), case.parameters(device), case.running(device)
    before = running.copy()
    module = case.module(device).eval()
    actual, expected = normed(case, x, parameters, running), module(x)
    assert_values_close(actual, expected)
    probe = case.tensor("probe", *actual.shape, device=device)
    assert_gradients_close(
        gradients(actual, (x, *parameters), probe), gradients(expected, (x, *module.parameters()), probe)
    )
    assert_unmoved(running, before)


@given(case=maps())
def test_a_constant_channel_has_no_variance(device: torch.device, case: Map) -> None:
    """It becomes the bias, exactly as far as its mean can be represented."""
    assume(case.count > 1)
    parameters, running = case.parameters(device), case.running(device)
    before = running.copy()
    x = torch.full((case.batch, case.channels, case.height, case.width), 3.0, dtype=torch.float64, device=device)
    output = normed(case, x, parameters, running)
    assert_values_close(output, parameters[1][:, None, None].expand_as(output))
    assert_values_close(running.mean, (1 - case.momentum) * before.mean + case.momentum * 3)
    assert_values_close(running.var, (1 - case.momentum) * before.var)


@half_precisions
@given(case=maps())
@example(case=LAST_BATCH_ONLY)
def test_half_maps_err_no_more_than_the_formulae_in_half(device: torch.device, dtype: torch.dtype, case: Map) -> None:
    """With the parameters and statistics in float32, as under autocast; these stay as exact as float32 can be."""
    assume(case.count > 1)
    x, parameters, running = (
        case.x(device, dtype=dtype),
        case.parameters(device, torch.float32),
        case.running(device, torch.float32),
    )
    halves = [tensor.detach().to(dtype) for tensor in parameters]
    doubles = [tensor.detach().double() for tensor in (x, *parameters)]
    oracle, *moved = slow.batch_norm(*doubles, *case.running(device), **case.options)
    peer, *_ = slow.batch_norm(x, *halves, *case.running(device, dtype), **case.options)
    actual = normed(case, x, parameters, running)
    assert actual.dtype == dtype
    assert_no_worse(actual, peer, oracle, factor=LOW_PRECISION.values)
    for mine, other in zip(running[:2], moved[:2], strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, other.float(), rtol=1e-5, atol=1e-5)
