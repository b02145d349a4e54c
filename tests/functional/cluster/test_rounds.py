"""Several rounds of cluster attention are dense attention in which a key counts once for each round that sees it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import Case, cases
from tolerances import assert_gradients_close, assert_values_close, gradients

from sparse_sr_attn.functional import cluster as fast
from sparse_sr_attn.functional import kmeans
from sparse_sr_attn.reference import cluster as slow


@pytest.mark.promise("R2")
@given(case=cases(max_batch=2), num_rounds=st.integers(1, 3), backend=st.sampled_from(("eager", "tiles")))
@example(case=Case(batch=2, num_tokens=7, num_clusters=9, chunk_size=3, seed=3), num_rounds=2, backend="tiles")
@example(case=Case(batch=2, num_tokens=9, chunk_size=2, seed=3, nearest=True), num_rounds=2, backend="tiles")
@example(case=Case(batch=2, num_tokens=9, chunk_size=2, seed=3, nearest=True), num_rounds=2, backend="eager")
def test_rounds_are_dense_attention_over_what_any_round_sees(
    device: torch.device, case: Case, num_rounds: int, backend: fast.Backend
) -> None:
    query, key, value = (case.tokens(name, 4, device=device).requires_grad_() for name in ("query", "key", "value"))
    rounds = [case.but(seed=case.seed + turn).assignment(device=device) for turn in range(num_rounds)]
    options = {
        "chunk_size": case.chunk_size,
        "num_adjacent": case.num_adjacent,
        "count_keys_once": case.count_keys_once,
    }

    pattern = fast.cluster_pattern(torch.stack(rounds, dim=1).flatten(0, 1), **options)
    patterns = [slow.cluster_pattern(assignment, **options) for assignment in rounds]
    if case.nearest:
        pattern = fast.with_nearest_chunks(pattern, key.repeat_interleave(num_rounds, dim=0))
        patterns = [replace(each, neighbors=slow.nearest_chunks(key, each)) for each in patterns]
    weights = fast.cluster_weights_rounds(query, key, pattern, num_rounds, scale=0.7, backend=backend)
    attended = fast.apply_cluster_weights(weights, value.repeat_interleave(num_rounds, dim=0), pattern, backend=backend)
    actual = attended.unflatten(0, (-1, num_rounds)).sum(dim=1)

    counts = sum(slow.multiplicity(each) for each in patterns)
    expected = slow.dense_attention(query, key, value, counts, scale=0.7)
    fused = fast.cluster_attention_rounds(query, key, value, pattern, num_rounds, scale=0.7, backend=backend)
    assert_values_close(slow.cluster_attention_rounds(query, key, value, pattern, num_rounds, scale=0.7), expected)
    probe = case.tensor("probe", *actual.shape, device=device)
    inputs = (query, key, value)
    for output in (actual, fused):
        assert_values_close(output, expected)
        assert_gradients_close(gradients(output, inputs, probe), gradients(expected, inputs, probe))


@pytest.mark.parametrize("backend", ["eager", "tiles"])
@pytest.mark.parametrize("num_rounds", [1, 2])
def test_no_samples(backend: fast.Backend, num_rounds: int) -> None:
    rows, values = torch.zeros(0, 7, 4), torch.zeros(0, 7, 3)
    pattern = fast.cluster_pattern(torch.zeros(0, 7, dtype=torch.int64), chunk_size=3)
    assert fast.cluster_attention_rounds(rows, rows, values, pattern, num_rounds, backend=backend).shape == (0, 7, 3)
    weights = fast.cluster_weights_rounds(rows, rows, pattern, num_rounds, backend=backend)
    assert weights.shape == (0, 3, 3, 9)
    assert fast.apply_cluster_weights(weights, values, pattern, backend=backend).shape == (0, 7, 3)
    assert fast.cluster_lse(rows, rows, pattern, backend=backend).shape == (0, 7)


@given(case=cases(nearest=False), backend=st.sampled_from(("eager", "tiles")), scale=st.sampled_from((1.0, 0.3)))
@example(case=Case(batch=2, num_tokens=7, num_clusters=9, chunk_size=3, seed=3), backend="tiles", scale=0.3)
@example(
    case=Case(num_tokens=10, num_clusters=4, chunk_size=3, count_keys_once=False, seed=4), backend="tiles", scale=1.0
)
def test_lse_equals_loops(device: torch.device, case: Case, backend: fast.Backend, scale: float) -> None:
    query, key = (case.tokens(name, 4, device=device).requires_grad_() for name in ("query", "key"))
    pattern = case.pattern(device=device)
    actual = fast.cluster_lse(query, key, pattern, scale=scale, backend=backend)
    expected = slow.cluster_lse(query, key, pattern, scale=scale)
    assert_values_close(actual, expected)
    probe = case.tensor("probe", *actual.shape, device=device)
    assert_gradients_close(gradients(actual, (query, key), probe), gradients(expected, (query, key), probe))


def test_fused_rounds_store_no_weights() -> None:
    """Nothing that autograd keeps of the fused rounds is as large as the weights of one of them."""
    case = Case(num_tokens=600, num_clusters=8, chunk_size=60)
    rows = [case.tokens(name, 4).requires_grad_() for name in ("query", "key", "value")]
    pattern = fast.cluster_pattern(case.assignment().repeat(2, 1), chunk_size=60)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        fast.cluster_attention_rounds(*rows, pattern, 2, backend="tiles")
    assert max(kept) < 600 * 3 * 60 / 8


@given(case=cases())
def test_hash_is_the_larger_of_both_signs(device: torch.device, case: Case) -> None:
    """Buckets are the argmax over [pR, -pR]; the same seed gives the same hash, another gives another."""
    directions = kmeans.hash_directions(2 * case.num_clusters, 4, case.seed).double()
    points = case.tokens("points", 4)
    rotated = points @ directions[: case.num_clusters].T
    expected = torch.cat([rotated, -rotated], dim=-1).argmax(dim=-1)
    assert torch.equal(kmeans.assign(points, directions), expected)
    assert torch.equal(directions, kmeans.hash_directions(2 * case.num_clusters, 4, case.seed).double())
    assert not torch.equal(directions, kmeans.hash_directions(2 * case.num_clusters, 4, case.seed + 1).double())
    assert kmeans.hash_directions(3, 4).shape == (3, 4)
