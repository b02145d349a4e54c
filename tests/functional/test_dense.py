"""Dense attention against loops; memory against the square."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import Case, cases
from tolerances import (
    LOW_PRECISION,
    assert_gradients_close,
    assert_no_worse,
    assert_values_close,
    gradients,
)

from sparse_sr_attn.functional.dense import dense_attention
from sparse_sr_attn.reference import dense as slow


@given(case=cases(), num_keys=st.integers(1, 9), width=st.sampled_from((1, 3, 6)), scale=st.sampled_from((1.0, 0.5)))
@example(case=Case(num_tokens=1), num_keys=1, width=1, scale=1.0)
@example(case=Case(batch=2, num_tokens=7), num_keys=4, width=6, scale=0.5)
def test_it_equals_loops(device: torch.device, case: Case, num_keys: int, width: int, scale: float) -> None:
    """Values narrower than, as wide as and wider than queries; fewer and more keys than queries."""
    query = case.tokens("query", 3, device=device).requires_grad_()
    key = case.tensor("key", case.batch, num_keys, 3, device=device).requires_grad_()
    value = case.tensor("value", case.batch, num_keys, width, device=device).requires_grad_()
    actual = dense_attention(query, key, value, scale=scale)
    expected = slow.dense_attention(query, key, value, scale=scale)
    assert_values_close(actual, expected)
    probe = case.tensor("probe", *actual.shape, device=device)
    inputs = (query, key, value)
    assert_gradients_close(gradients(actual, inputs, probe), gradients(expected, inputs, probe))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scores_of_half_inputs_are_float32(device: torch.device, dtype: torch.dtype) -> None:
    """Loud queries, and unit keys in float32, as layers give them: rounded to half, scores would be off by 1."""
    case = Case(batch=2, num_tokens=40)
    query, value = (case.tokens(name, 4, device=device).to(dtype) for name in ("query", "value"))
    query = 300 * query
    key = torch.nn.functional.normalize(case.tokens("key", 4, dtype=torch.float32, device=device), dim=-1)
    oracle = slow.dense_attention(*(rows.double() for rows in (query, key, value)))
    peer = slow.dense_attention(query.float(), key, value.float()).to(dtype)
    actual = dense_attention(query, key, value)
    assert actual.dtype == dtype
    assert_no_worse(actual, peer, oracle, factor=LOW_PRECISION.values)


def test_memory_does_not_grow_with_the_square() -> None:
    """Nothing that autograd keeps is as large as the scores, for rows as they come from a feature map."""
    maps = [torch.randn(1, width, 24, 24, requires_grad=True) for width in (4, 4, 16)]
    rows = [x.flatten(2).mT for x in maps]
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        dense_attention(*rows)
    assert kept
    assert max(kept) < 576**2 / 8
