"""Neighbours by content against loops: which chunks, in which order, ties and too few of them."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import Case, cases
from tolerances import assert_bit_equal, assert_values_close

from sparse_sr_attn.errors import ShapeError
from sparse_sr_attn.functional import cluster as fast
from sparse_sr_attn.functional.cluster import neighbors as neighbors_module
from sparse_sr_attn.reference import cluster as slow
from sparse_sr_attn.states import ClusterPattern

TAIL = Case(batch=2, num_tokens=13, num_clusters=5, chunk_size=2, seed=10)
FEW = Case(batch=2, num_tokens=7, num_clusters=3, chunk_size=3, num_adjacent=2, seed=11)


def pattern_of(case: Case, device: torch.device) -> ClusterPattern:
    return fast.cluster_pattern(
        case.assignment(device=device), chunk_size=case.chunk_size, num_adjacent=case.num_adjacent
    )


@given(case=cases(count_keys_once=True), ties=st.booleans(), block=st.sampled_from((1, 5, 2**18)))
@example(case=TAIL, ties=False, block=1)
@example(case=TAIL, ties=True, block=2**18)
@example(case=FEW, ties=True, block=5)
def test_neighbors_equal_loops(device: torch.device, case: Case, ties: bool, block: int) -> None:
    """Keys of few different values make ties."""
    key = case.integers("key", 2, case.batch, case.num_tokens, 1, device=device).double() * 2 - 1
    if not ties:
        key = case.tokens("key", 3, device=device)
    pattern = pattern_of(case, device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbors_module, "_PAIRS_PER_BLOCK", dict.fromkeys(("cpu", "cuda"), block))
        found = fast.with_nearest_chunks(pattern, key)
    assert_bit_equal(found.neighbors, slow.nearest_chunks(key, pattern))
    assert found._replace(neighbors=None)[1:] == pattern[1:]


@given(case=cases(count_keys_once=True))
@example(case=FEW)
def test_a_chunk_sees_itself_first_and_none_twice(device: torch.device, case: Case) -> None:
    pattern = fast.with_nearest_chunks(pattern_of(case, device), case.tokens("key", 3, device=device))
    num_chunks, num_seen = pattern.neighbors.shape[1:]
    assert num_seen == 2 * case.num_adjacent + 1
    own = torch.arange(num_chunks, device=device)[:, None]
    assert (pattern.neighbors[..., :1] == own).all()
    assert (pattern.neighbors[..., num_chunks:] == own).all()
    for row in pattern.neighbors[..., :num_chunks].flatten(0, 1).tolist():
        assert len(set(row)) == min(num_seen, num_chunks)
    assert slow.multiplicity(pattern).max() == 1


def test_the_length_of_keys_does_not_matter(device: torch.device) -> None:
    pattern, key = pattern_of(TAIL, device), TAIL.tokens("key", 3, device=device)
    length = 1 + TAIL.integers("length", 9, 2, TAIL.num_tokens, 1, device=device)
    assert_bit_equal(
        fast.with_nearest_chunks(pattern, length * key).neighbors, fast.with_nearest_chunks(pattern, key).neighbors
    )
    means = fast.mean_keys(pattern, length * key)
    assert_values_close(means, fast.mean_keys(pattern, key))
    assert (means.norm(dim=-1) <= 1 + 1e-9).all()


def test_a_key_that_is_no_number_hides_its_chunk_alone(device: torch.device) -> None:
    """It is as similar to others as what stands at a right angle to them, and sees itself."""
    pattern, key = pattern_of(TAIL, device), TAIL.tokens("key", 3, device=device).abs()
    chunk = pattern.order[:, 2:4]
    broken = key.scatter(1, chunk[..., None].expand(-1, -1, 3), float("nan"))
    found = fast.with_nearest_chunks(pattern, broken).neighbors
    assert (found[:, 1, 0] == 1).all()
    assert not (found[:, [0, *range(2, 7)]] == 1).any()


def test_no_gradient_flows_through_the_choice(device: torch.device) -> None:
    key = TAIL.tokens("key", 3, device=device).requires_grad_()
    assert not fast.mean_keys(pattern_of(TAIL, device), key).requires_grad
    assert not fast.with_nearest_chunks(pattern_of(TAIL, device), key).neighbors.requires_grad


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    key = TAIL.tokens("key", 3, device=device)
    published = fast.cluster_pattern(TAIL.assignment(device=device), chunk_size=2, count_keys_once=False)
    with pytest.raises(ValueError, match=r"^nearest chunks need count_keys_once=True, got False"):
        fast.with_nearest_chunks(published, key)
    with pytest.raises(ShapeError, match=r"\(b, n\) = \(2, 13\), got rows of shape \(2, 12, 3\)"):
        fast.with_nearest_chunks(pattern_of(TAIL, device), key[:, 1:])
