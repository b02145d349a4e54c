"""Hashing against loops; draws that depend on a seed and their number, and happen once a training step."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import Case, cases
from tolerances import assert_bit_equal
from torch.utils.checkpoint import checkpoint

from sparse_sr_attn.functional import lsh as fast
from sparse_sr_attn.reference import lsh as slow


@given(case=cases(), num_rounds=st.integers(1, 3), half=st.integers(1, 4), used=st.integers(1, 4))
@example(case=Case(batch=2, num_tokens=9), num_rounds=2, half=4, used=2)
def test_buckets_equal_loops(device: torch.device, case: Case, num_rounds: int, half: int, used: int) -> None:
    points = case.tokens("points", 3, device=device)
    rotations = case.tensor("rotations", num_rounds, half, 3, device=device)
    num_buckets = 2 * min(used, half)
    actual = fast.hash_tokens(points, rotations, num_buckets)
    assert_bit_equal(actual, slow.hash_tokens(points, rotations, num_buckets))
    assert actual.max() < num_buckets


@given(num_tokens=st.integers(1, 4000), chunk_size=st.integers(1, 200), half=st.integers(1, 70))
@example(num_tokens=10, chunk_size=144, half=64)
@example(num_tokens=2304, chunk_size=144, half=64)
def test_number_of_buckets(num_tokens: int, chunk_size: int, half: int) -> None:
    assert fast.bucket_count(num_tokens, chunk_size, 2 * half) == slow.bucket_count(num_tokens, chunk_size, 2 * half)


def test_number_of_buckets_as_published() -> None:
    """A 48x48 patch has 16 chunks of 144; an odd number is made even; 128 is the most."""
    assert [fast.bucket_count(n, 144, 128) for n in (2304, 15 * 144, 2304 - 1, 144 * 200)] == [16, 16, 16, 128]


def state_of(seed: int, device: torch.device) -> fast.HashState:
    return fast.HashState(*(tensor.to(device) for tensor in fast.initial_hash(2, 8, 3, seed)))


def test_a_step_draws_and_hashes_by_what_it_drew(device: torch.device) -> None:
    state = state_of(0, device)
    before = state.rotations.clone()
    points = Case(num_tokens=30).tokens("points", 3, dtype=torch.float32, device=device)
    buckets = fast.hash_step(points, state, 8, seed=0)
    assert state.num_draws == 1
    assert not torch.equal(state.rotations, before)
    assert_bit_equal(buckets, fast.hash_tokens(points, state.rotations, 8))


def test_draws_depend_on_seed_and_number_alone(device: torch.device) -> None:
    """Two states go alike; another seed differs in every draw; training that goes on draws what comes next."""
    points = Case(num_tokens=4).tokens("points", 3, device=device)
    dice = torch.random.get_rng_state()
    draws: dict[int, list[torch.Tensor]] = {}
    for run, seed in enumerate((0, 0, 1)):
        state = state_of(seed, device)
        draws[run] = [state.rotations.clone()]
        for _ in range(4):
            fast.hash_step(points, state, 8, seed=seed)
            draws[run].append(state.rotations.clone())
    assert torch.equal(torch.random.get_rng_state(), dice)
    for one, same, other in zip(*draws.values(), strict=True):
        assert_bit_equal(one, same)
        assert not any(torch.equal(another, other) for another in draws[0])
    assert len({tuple(one.flatten().tolist()) for one in draws[0]}) == 5

    resumed = fast.HashState(draws[0][2].clone(), torch.tensor(2, device=device))
    fast.hash_step(points, resumed, 8, seed=0)
    assert_bit_equal(resumed.rotations, draws[0][3])


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_step_draws_once(device: torch.device, reentrant: bool) -> None:
    state = state_of(0, device)
    seen: list[torch.Tensor] = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        seen.append(fast.hash_step(x, state, 8, seed=0))
        return x.square()

    x = Case(num_tokens=30).tokens("points", 3, device=device).requires_grad_()
    checkpoint(forward, x, use_reentrant=reentrant).sum().backward()
    assert state.num_draws == 1
    assert len(seen) == 2
    assert_bit_equal(seen[1], seen[0])
