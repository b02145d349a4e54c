"""Sparsemax against alternating projections, the conditions of optimality, and numerical derivatives."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import Case, cases
from tolerances import (
    assert_bit_equal,
    assert_gradients_close,
    assert_values_close,
    gradients,
)

from sparse_sr_attn.functional import sparsemax as fast
from sparse_sr_attn.reference import sparsemax as slow

BACKENDS = ("eager", "tiles")
spreads = st.sampled_from((0.01, 0.3, 1.0, 10.0, 1e5))


@pytest.fixture(autouse=True)
def _many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small inputs take several tiles, and more scores than are looked at first."""
    monkeypatch.setattr(fast, "_SCORES_PER_TILE", 24)
    monkeypatch.setattr(fast, "_FIRST_GUESS", 2)


@given(case=cases(max_tokens=40), spread=spreads)
@example(case=Case(num_tokens=1), spread=1.0)
def test_it_equals_alternating_projections(device: torch.device, case: Case, spread: float) -> None:
    scores = (spread * case.tensor("scores", case.batch, 3, case.num_tokens, device=device)).requires_grad_()
    actual, expected = fast.sparsemax(scores), slow.sparsemax(scores)
    assert_values_close(actual, expected)
    probe = case.tensor("probe", *actual.shape, device=device)
    assert_gradients_close(gradients(actual, (scores,), probe), gradients(expected, (scores,), probe))


@given(case=cases(max_tokens=40), spread=spreads)
def test_it_is_the_closest_point_of_the_simplex(device: torch.device, case: Case, spread: float) -> None:
    """Sums to 1; exact zeros; and no vertex lies in a direction that comes closer, which proves the minimum."""
    scores = spread * case.tokens("scores", 5, device=device)
    weights = fast.sparsemax(scores)
    assert (weights >= 0).all()
    assert_values_close(weights.sum(dim=-1), torch.ones_like(weights[..., 0]))
    far_below = scores <= scores.amax(dim=-1, keepdim=True) - 1
    assert not weights[far_below].any()
    to_scores = scores - weights
    towards_vertices = to_scores - (to_scores * weights).sum(dim=-1, keepdim=True)
    assert (towards_vertices <= 1e-9 * max(1.0, spread)).all()


@given(case=cases(max_tokens=30), num_keys=st.integers(1, 20), scale=st.sampled_from((0.1, 1.0, 5.0)))
@example(case=Case(batch=2, num_tokens=9), num_keys=12, scale=0.1)
def test_attention_equals_its_twin(device: torch.device, case: Case, num_keys: int, scale: float) -> None:
    query = case.tokens("query", 4, device=device).requires_grad_()
    key = case.tensor("key", case.batch, num_keys, 4, device=device).requires_grad_()
    value = case.tensor("value", case.batch, num_keys, 3, device=device).requires_grad_()
    inputs = (query, key, value)
    expected = slow.sparsemax_attention(*inputs, scale=scale)
    probe = case.tensor("probe", *expected.shape, device=device)
    wanted = gradients(expected, inputs, probe)
    for backend in BACKENDS:
        actual = fast.sparsemax_attention(*inputs, scale=scale, backend=backend)
        assert_values_close(actual, expected)
        assert_gradients_close(gradients(actual, inputs, probe), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_gets_no_weight_cannot_matter(device: torch.device, backend: fast.Backend) -> None:
    """A key that all scores leave far behind may hold any value, and gets no gradient."""
    case = Case(num_tokens=12)
    query = case.tokens("query", 3, device=device).abs() + 1
    key = case.tokens("key", 3, device=device).abs()
    key[:, 5] = -100
    value = case.tokens("value", 3, device=device)
    other = value.clone()
    other[:, 5] = 1e9
    assert_bit_equal(
        fast.sparsemax_attention(query, key, value, backend=backend),
        fast.sparsemax_attention(query, key, other, backend=backend),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scores_of_half_inputs_are_float32(device: torch.device, dtype: torch.dtype, backend: fast.Backend) -> None:
    """Weights differ where scores differ by less than half precision tells apart."""
    query = torch.tensor([[[100.0, 1.0]]], device=device, dtype=dtype)
    key = torch.tensor([[[10.0, 0.25], [10.0, 0.0]]], device=device, dtype=dtype)
    value = torch.tensor([[[1.0], [0.0]]], device=device, dtype=dtype)
    output = fast.sparsemax_attention(query, key, value, backend=backend)
    assert output.dtype == dtype
    assert output.item() == 0.625


@pytest.mark.unhooked
def test_an_unknown_form_is_refused(device: torch.device) -> None:
    rows = torch.zeros(1, 2, 3, device=device)
    with pytest.raises(ValueError, match="backend must be 'auto', 'eager' or 'tiles', got 'tile'"):
        fast.sparsemax_attention(rows, rows, rows, backend="tile")  # type: ignore[arg-type]
