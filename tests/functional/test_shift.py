"""Shift convolution against loops and against the depthwise convolution with one-hot kernels: values and gradients."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given
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
from torch import Tensor

from sparse_sr_attn.functional import shift as fast
from sparse_sr_attn.reference import shift as slow

forms = pytest.mark.parametrize("form", ["slices", "masked"])
low_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@dataclass(frozen=True)
class Map:
    """Sizes of a map and of a convolution on it, and the seed of its numbers."""

    batch: int = 1
    channels: int = 5
    height: int = 3
    width: int = 3
    out_channels: int = 2
    bias: bool = True
    seed: int = 0

    def tensor(
        self, name: str, *shape: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64
    ) -> Tensor:
        return Case(seed=self.seed).tensor(name, *shape, dtype=dtype, device=device)

    def x(self, device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
        shape = (self.batch, self.channels, self.height, self.width)
        return self.tensor("x", *shape, device=device, dtype=dtype).requires_grad_()

    def parameters(self, device: torch.device, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        weight = self.tensor("weight", self.out_channels, self.channels, 1, 1, device=device, dtype=dtype)
        if not self.bias:
            return (weight.requires_grad_(),)
        bias = self.tensor("bias", self.out_channels, device=device, dtype=dtype)
        return weight.requires_grad_(), bias.requires_grad_()


def maps(*, shortest: int = 1, longest: int = 17) -> st.SearchStrategy[Map]:
    return st.builds(
        Map,
        batch=st.integers(1, 3),
        channels=st.integers(1, 17),
        height=st.integers(shortest, longest),
        width=st.integers(shortest, longest),
        out_channels=st.integers(1, 6),
        bias=st.booleans(),
        seed=st.integers(0, 2**16),
    )


TOO_FEW_TO_SHARE = Map(channels=4)
ONE_PIXEL = Map(channels=10, height=1, width=1)
ONE_ROW = Map(channels=10, height=1, width=5)
ONE_COLUMN = Map(channels=10, height=5, width=1)
WITH_A_REST = Map(batch=2, channels=13, height=4, width=6, seed=1)
NO_BIAS = Map(batch=2, channels=10, height=3, width=2, bias=False, seed=2)


def test_each_fifth_reads_the_neighbour_it_should(device: torch.device) -> None:
    """Written out on numbers one can read: right, left, below, above, and itself."""
    picture = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.float64, device=device)
    expected = [
        [[2, 3, 0], [5, 6, 0]],
        [[0, 1, 2], [0, 4, 5]],
        [[4, 5, 6], [0, 0, 0]],
        [[0, 0, 0], [1, 2, 3]],
        [[1, 2, 3], [4, 5, 6]],
        [[1, 2, 3], [4, 5, 6]],
    ]
    actual = fast.shift2d(picture.expand(1, 6, 2, 3))
    assert_bit_equal(actual[0], torch.tensor(expected, dtype=torch.float64, device=device))


@given(case=maps(longest=7))
@example(case=TOO_FEW_TO_SHARE)
@example(case=ONE_PIXEL)
@example(case=ONE_ROW)
@example(case=ONE_COLUMN)
@example(case=WITH_A_REST)
def test_shift_equals_loops(device: torch.device, case: Map) -> None:
    x = case.x(device)
    actual, expected = fast.shift2d(x), slow.shift2d(x)
    assert_bit_equal(actual, expected)
    with torch.no_grad():  # where nothing learns, it writes in place
        assert_bit_equal(fast.shift2d(x), expected)
    probe = case.tensor("probe", *actual.shape, device=device)
    assert_bit_equal(*(gradients(output, (x,), probe)[0] for output in (actual, expected)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@given(case=maps())
@example(case=ONE_PIXEL)
@example(case=WITH_A_REST)
def test_shift_in_channels_last_memory_equals_loops(device: torch.device, dtype: torch.dtype, case: Map) -> None:
    """To the bit, forward and backward, though it is carried out in another way."""
    x = case.x(device, dtype)
    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    actual, expected = fast.shift2d(last), slow.shift2d(x)
    assert_bit_equal(actual, expected)
    probe = case.tensor("probe", *actual.shape, device=device).to(dtype)
    assert_bit_equal(gradients(actual, (last,), probe)[0], gradients(expected, (x,), probe)[0])


@forms
@given(case=maps())
@example(case=TOO_FEW_TO_SHARE)
@example(case=ONE_PIXEL)
@example(case=ONE_ROW)
@example(case=WITH_A_REST)
@example(case=NO_BIAS)
def test_shift_convolution_equals_two_convolutions(device: torch.device, form: str, case: Map) -> None:
    """Values, and the gradients in the map and in both parameters."""
    x, parameters = case.x(device), case.parameters(device)
    actual, expected = fast.shift_conv2d(x, *parameters, form=form), slow.shift_conv2d(x, *parameters)
    assert_values_close(actual, expected)
    probe = case.tensor("probe", *actual.shape, device=device)
    leaves = (x, *parameters)
    assert_gradients_close(gradients(actual, leaves, probe), gradients(expected, leaves, probe))


@forms
@given(case=maps())
@example(case=WITH_A_REST)
def test_strides_do_not_matter(device: torch.device, form: str, case: Map) -> None:
    """A map in channels-last memory is the same map."""
    x, parameters = case.x(device), case.parameters(device)
    view = x.detach().contiguous(memory_format=torch.channels_last)
    assert_bit_equal(fast.shift2d(view), fast.shift2d(x))
    actual = fast.shift_conv2d(view, *parameters, form=form)
    assert_values_close(actual, fast.shift_conv2d(x, *parameters, form=form))


@forms
@low_precisions
@given(case=maps(shortest=5))
@example(case=WITH_A_REST)
def test_low_precision_errs_no_more_than_two_convolutions(
    device: torch.device, dtype: torch.dtype, form: str, case: Map
) -> None:
    """Against the float64 result of the same rounded numbers; on enough of them, lest chance decide."""
    low = (case.x(device, dtype), *case.parameters(device, dtype))
    exact = [tensor.detach().double() for tensor in low]
    actual = fast.shift_conv2d(*low, form=form)
    assert actual.dtype == dtype
    assert_no_worse(actual, slow.shift_conv2d(*low), slow.shift_conv2d(*exact), factor=LOW_PRECISION.values)


@pytest.mark.unhooked
def test_an_unknown_form_is_refused() -> None:
    case = WITH_A_REST
    with pytest.raises(ValueError, match="form must be 'slices' or 'masked', got 'slice'"):
        fast.shift_conv2d(case.x("cpu"), *case.parameters("cpu"), form="slice")
