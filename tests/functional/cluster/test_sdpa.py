"""torch's scaled_dot_product_attention over sorted rows, for GPUs without triton, against dense attention."""

import pytest
import torch
from accuracy import assert_as_accurate
from strategies import Case
from tolerances import assert_bit_equal, assert_values_close, gradients
from torch import Tensor

from sparse_sr_attn.errors import BackendError
from sparse_sr_attn.functional import backend as backends
from sparse_sr_attn.functional import cluster as fast
from sparse_sr_attn.functional.cluster import sdpa
from sparse_sr_attn.reference import cluster as slow

WHOLE = Case(batch=2, num_tokens=12, num_clusters=5, chunk_size=3, seed=2)
PADDED_TAIL = Case(batch=2, num_tokens=7, num_clusters=9, chunk_size=3, seed=3)
NEAREST = Case(batch=2, num_tokens=13, num_clusters=5, chunk_size=2, seed=10, nearest=True)


def inputs_of(case: Case, device: torch.device, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    widths = {"query": 4, "key": 4, "value": 3}
    return [case.tokens(name, width, dtype=dtype, device=device).requires_grad_() for name, width in widths.items()]


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
