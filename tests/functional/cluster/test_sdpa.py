"""torch's scaled_dot_product_attention over sorted rows, for GPUs without triton, against dense attention."""

import pytest
import torch
from accuracy import assert_as_accurate
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import Case, cases
from tolerances import (
    assert_bit_equal,
    assert_gradients_close,
    assert_values_close,
    gradients,
)
from torch import Tensor

from sparse_sr_attn.errors import BackendError
from sparse_sr_attn.functional import backend as backends
from sparse_sr_attn.functional import cluster as fast
from sparse_sr_attn.functional.cluster import sdpa
from sparse_sr_attn.reference import cluster as slow

NEIGHBOURS_COINCIDE = Case(num_tokens=5, num_clusters=1, chunk_size=3, seed=1)
WHOLE = Case(batch=2, num_tokens=12, num_clusters=5, chunk_size=3, seed=2)
PADDED_TAIL = Case(batch=2, num_tokens=7, num_clusters=9, chunk_size=3, seed=3)
PADDED_TAIL_PUBLISHED = Case(batch=2, num_tokens=10, num_clusters=4, chunk_size=3, count_keys_once=False, seed=4)
REPEATED_TWICE_OVER = Case(num_tokens=2, num_clusters=2, chunk_size=7, count_keys_once=False, seed=6)
AROUND_THE_RING = Case(num_tokens=5, num_clusters=3, chunk_size=3, num_adjacent=5, count_keys_once=False, seed=7)
FOUR_CHUNKS_TWO_SIDES = Case(num_tokens=8, num_clusters=3, chunk_size=2, num_adjacent=2, seed=8)
LONELY_TAIL = Case(num_tokens=4, num_clusters=1, chunk_size=3, num_adjacent=0, seed=1)
NEAREST = Case(batch=2, num_tokens=13, num_clusters=5, chunk_size=2, seed=10, nearest=True)


def inputs_of(case: Case, device: torch.device, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    widths = {"query": 4, "key": 4, "value": 3}
    return [case.tokens(name, width, dtype=dtype, device=device).requires_grad_() for name, width in widths.items()]


@given(case=cases(nearest=False), scale=st.sampled_from((1.0, 0.3)))
@example(case=Case(num_tokens=1, num_clusters=1, chunk_size=1), scale=1.0)
@example(case=NEIGHBOURS_COINCIDE, scale=1.0)
@example(case=WHOLE, scale=1.0)
@example(case=PADDED_TAIL, scale=0.3)
@example(case=PADDED_TAIL_PUBLISHED, scale=1.0)
@example(case=REPEATED_TWICE_OVER, scale=1.0)
@example(case=AROUND_THE_RING, scale=1.0)
@example(case=FOUR_CHUNKS_TWO_SIDES, scale=1.0)
@example(case=LONELY_TAIL, scale=1.0)
def test_attention_equals_masked_dense_attention(device: torch.device, case: Case, scale: float) -> None:
    leaves = inputs_of(case, device)
    pattern = case.pattern(device=device)
    actual = fast.cluster_attention(*leaves, pattern, scale=scale, backend="sdpa")
    expected = slow.cluster_attention(*leaves, pattern, scale=scale)
    assert_values_close(actual, expected)
    probe = case.tokens("probe", 3, device=device)
    assert_gradients_close(gradients(actual, leaves, probe), gradients(expected, leaves, probe))


@pytest.mark.parametrize("filling", [1e4, float("nan")])
@pytest.mark.parametrize("case", [FOUR_CHUNKS_TWO_SIDES.but(num_adjacent=1), LONELY_TAIL], ids=["ring", "tail"])
def test_an_unseen_token_cannot_matter(device: torch.device, case: Case, filling: float) -> None:
    query, key, value = (leaf.detach() for leaf in inputs_of(case, device))
    pattern = case.pattern(device=device)
    before = fast.cluster_attention(query, key, value, pattern, backend="sdpa")
    token = int(pattern.order[0, -1])
    blind = ~slow.visible_pairs(pattern)[:, :, token]
    assert blind.any()
    key[:, token], value[:, token] = filling, filling
    assert_bit_equal(fast.cluster_attention(query, key, value, pattern, backend="sdpa")[blind], before[blind])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("autocast", [True, False])
def test_low_precision_is_no_worse_than_dense_attention(
    device: torch.device, dtype: torch.dtype, autocast: bool
) -> None:
    """Values in `dtype` under queries and keys in float32, as LSP gives them."""
    case = Case(batch=2, num_tokens=90, num_clusters=5, chunk_size=16, seed=11)
    kinds = (torch.float32, torch.float32, dtype)
    rows = [leaf.detach().to(kind).requires_grad_() for leaf, kind in zip(inputs_of(case, device), kinds, strict=True)]
    pattern = case.pattern(device=device)

    def attend(*rows: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            return fast.cluster_attention(*rows, pattern, backend="sdpa")

    assert_as_accurate(attend, lambda *rows: slow.cluster_attention(*rows, pattern), rows)


def test_what_is_kept_serves_later_calls(device: torch.device) -> None:
    """In training too, if the first call was in inference mode, and not for another precision."""
    sdpa._kept.cache_clear()
    pattern = PADDED_TAIL.pattern(device=device)
    for dtype in (torch.float32, torch.float64):
        query, key, _ = inputs_of(PADDED_TAIL, device, dtype)
        leaves = [query, key, key]  # of one width, for which the CPU has a fused kernel, too: it keeps the mask
        with torch.inference_mode():
            first = fast.cluster_attention(*leaves, pattern, backend="sdpa")
        again = fast.cluster_attention(*leaves, pattern, backend="sdpa")
        assert_bit_equal(again, first)
        gradients(again, leaves, torch.ones_like(again))
    assert sdpa._kept.cache_info()[:2] == (2, 2)


@pytest.mark.unhooked
def test_compiled_code_keeps_nothing(device: torch.device) -> None:
    """And has no graph break, at the first size and at the next, which is symbolic."""
    torch._dynamo.reset()
    sdpa._kept.cache_clear()
    compiled = torch.compile(
        lambda rows, pattern: fast.cluster_attention(rows, rows, rows, pattern, backend="sdpa"),
        backend="aot_eager",
        fullgraph=True,
    )
    for case in (PADDED_TAIL, PADDED_TAIL.but(num_tokens=11), PADDED_TAIL.but(num_tokens=14)):
        rows, pattern = case.tokens("rows", 4, device=device), case.pattern(device=device)
        actual = compiled(rows, pattern)
        assert sdpa._kept.cache_info().currsize == 0
        assert_values_close(actual, slow.cluster_attention(rows, rows, rows, pattern))


def test_what_it_cannot_do_goes_to_eager_code_or_is_refused(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, ...]] = []
    attention = sdpa.cluster_attention
    monkeypatch.setattr(sdpa, "cluster_attention", lambda *args: calls.append(args[0].shape) or attention(*args))
    ring, nearest = WHOLE.pattern(device=device), NEAREST.pattern(device=device)
    leaves, others = inputs_of(WHOLE, device), inputs_of(NEAREST, device)
    rounds = WHOLE.but(batch=4).pattern(device=device)
    for call, refusal in (
        (lambda backend: fast.cluster_lse(*leaves[:2], ring, backend=backend), "has no logsumexp"),
        (lambda backend: fast.cluster_attention_rounds(*leaves, rounds, 2, backend=backend), "has no logsumexp"),
        (lambda backend: fast.cluster_attention(*others, nearest, backend=backend), "knows only rings of chunks"),
    ):
        with pytest.raises(BackendError, match=f"backend 'sdpa' {refusal}.*'eager' works on any device"):
            call("sdpa")
        with monkeypatch.context() as patch:
            patch.setattr(backends, "_best_backend", lambda _: "sdpa")
            assert_bit_equal(call("auto"), call("eager"))
    assert not calls
    monkeypatch.setattr(backends, "_best_backend", lambda _: "sdpa")
    fast.cluster_attention(*leaves, ring)
    assert calls == [(2, 12, 4)]
