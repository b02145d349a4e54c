"""Random feature attention against its twin, and against the softmax that it estimates."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import Case, cases
from tolerances import assert_gradients_close, assert_values_close, gradients, rms
from torch.nn.functional import normalize

from sparse_sr_attn.errors import ShapeError
from sparse_sr_attn.functional import random_features as fast
from sparse_sr_attn.reference import dense
from sparse_sr_attn.reference import random_features as slow


@given(case=cases(), num_keys=st.integers(1, 9), num_features=st.integers(1, 9))
@example(case=Case(num_tokens=1), num_keys=1, num_features=1)
def test_it_equals_its_twin(device: torch.device, case: Case, num_keys: int, num_features: int) -> None:
    query = case.tokens("query", 3, device=device).requires_grad_()
    key = case.tensor("key", case.batch, num_keys, 3, device=device).requires_grad_()
    value = case.tensor("value", case.batch, num_keys, 2, device=device).requires_grad_()
    directions = fast.random_directions(num_features, 3, case.seed).double().to(device)
    actual = fast.kernel_attention(query, key, value, directions)
    expected = slow.kernel_attention(query, key, value, directions)
    assert_values_close(actual, expected)
    probe = case.tensor("probe", *actual.shape, device=device)
    inputs = (query, key, value)
    assert_gradients_close(gradients(actual, inputs, probe), gradients(expected, inputs, probe))


@pytest.mark.parametrize("dim", [2, 5])
def test_features_estimate_the_kernel_without_bias(dim: int) -> None:
    """The mean over many draws is exp<q, k>: within five standard errors of it, which are small."""
    case = Case(num_tokens=3, seed=1)
    query, key = (0.7 * normalize(case.tokens(name, dim)[0], dim=-1) for name in ("query", "key"))
    directions = fast.random_directions(10_000, dim, seed=7).double()
    each = slow.features(query, directions)[:, None] * slow.features(key, directions)[None]
    error = len(directions) ** 0.5 * each.std(dim=-1)
    exact = torch.exp(query @ key.T)
    assert (error < 0.05 * exact).all()
    assert ((each.sum(dim=-1) - exact).abs() < 5 * error).all()


def test_it_converges_to_softmax_attention(device: torch.device) -> None:
    """The error falls like one over the root of the number of features."""
    case = Case(batch=2, num_tokens=20, seed=2)
    query, key, value = (case.tokens(name, 4, device=device) for name in ("query", "key", "value"))
    query, key = (normalize(rows, dim=-1) for rows in (query, key))
    exact = dense.dense_attention(query, key, value)
    errors = []
    for num_features in (256, 65536):
        directions = [fast.random_directions(num_features, 4, seed).double().to(device) for seed in range(8)]
        outputs = torch.stack([fast.kernel_attention(query, key, value, one) for one in directions])
        errors.append(rms(outputs - exact))
    assert errors[1] < 0.1 * rms(exact - value.mean(dim=1, keepdim=True))
    assert 16 / 2 < errors[0] / errors[1] < 16 * 2


def test_orthogonal_directions_estimate_better_than_independent_ones() -> None:
    case = Case(batch=2, num_tokens=20, seed=2)
    query, key, value = (case.tokens(name, 8) for name in ("query", "key", "value"))
    query, key = (normalize(rows, dim=-1) for rows in (query, key))
    exact = dense.dense_attention(query, key, value)
    ours = [fast.random_directions(8, 8, seed).double() for seed in range(200)]
    theirs = [case.tensor(f"directions {seed}", 8, 8) for seed in range(200)]
    errors = [
        rms(torch.stack([fast.kernel_attention(query, key, value, one) for one in draws]) - exact)
        for draws in (ours, theirs)
    ]
    assert errors[0] < 0.95 * errors[1]


def test_directions_are_normal_and_orthogonal_in_groups() -> None:
    directions = fast.random_directions(600, 6, seed=3).double()
    products = directions.view(100, 6, 6) @ directions.view(100, 6, 6).mT
    assert (products - torch.diag_embed(products.diagonal(dim1=1, dim2=2))).abs().max() < 1e-5
    assert abs(directions.mean().item()) < 0.1
    assert abs(directions.square().mean().item() - 1) < 0.1
    squares = directions.square().sum(dim=-1)  # chi-square with 6 degrees of freedom: mean 6, variance 12
    assert abs(squares.mean().item() - 6) < 0.6
    assert abs(squares.var().item() - 12) < 3
    assert (directions.mean(dim=0).abs() < 0.2).all()


def test_directions_depend_on_the_seed_alone() -> None:
    state = torch.random.get_rng_state()
    first = fast.random_directions(5, 3, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(fast.random_directions(5, 3, seed=1), first)
    assert not torch.equal(fast.random_directions(5, 3, seed=2), first)
    assert first.shape == (5, 3)
    assert first.dtype == torch.float32


def test_nothing_overflows(device: torch.device) -> None:
    """Exponents of thousands, of both signs, in float32: exp would be infinite, or all denominators 0."""
    case = Case(num_tokens=9)
    query, key, value = (case.tokens(name, 4, dtype=torch.float32, device=device) for name in ("query", "key", "value"))
    directions = fast.random_directions(16, 4).to(device)
    output = fast.kernel_attention(300 * query, 30 * key, value, directions)
    assert torch.isfinite(output).all()
    expected = fast.kernel_attention(300 * query.double(), 30 * key.double(), value.double(), directions.double())
    torch.testing.assert_close(output.double(), expected, rtol=1e-3, atol=1e-3)


@given(case=cases(min_tokens=2), shares=st.sampled_from(((0.02, 0.08), (0.2, 0.4), (0.5, 0.9))))
def test_contrastive_loss_equals_sorting(device: torch.device, case: Case, shares: tuple[float, float]) -> None:
    query, key = (case.tokens(name, 3, device=device).requires_grad_() for name in ("query", "key"))
    options = {"positive": shares[0], "negative": shares[1]}
    actual = fast.contrastive_loss(query, key, **options)
    expected = slow.contrastive_loss(query, key, **options)
    assert_values_close(actual, expected)
    probe = torch.ones_like(actual)
    assert_gradients_close(gradients(actual, (query, key), probe), gradients(expected, (query, key), probe))


def test_contrastive_loss_of_some_queries(device: torch.device) -> None:
    """It is that of the queries drawn, which the seed alone sets, and its memory is theirs."""
    case = Case(num_tokens=400)
    query, key = (case.tokens(name, 3, device=device).requires_grad_() for name in ("query", "key"))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        few = fast.contrastive_loss(query, key, num_queries=5, seed=1)
    assert max(kept) <= 5 * 400
    assert torch.equal(few, fast.contrastive_loss(query, key, num_queries=5, seed=1))
    assert not torch.equal(few, fast.contrastive_loss(query, key, num_queries=5, seed=2))
    everything = fast.contrastive_loss(query, key, num_queries=400)
    several = torch.stack([fast.contrastive_loss(query, key, num_queries=5, seed=seed) for seed in range(200)])
    assert (several.mean() - everything).abs() < 5 * several.std() / 200**0.5


def test_one_key_cannot_be_compared(device: torch.device) -> None:
    rows = torch.zeros(1, 1, 3, device=device)
    with pytest.raises(ShapeError, match="at least 2 of them, got 1"):
        fast.contrastive_loss(rows, rows)
