"""Triton kernels against the slow twins; without a GPU by triton's interpreter, which `conftest.py` switches on."""

import copy
import os
from collections.abc import Callable

import machine_code
import pytest
import torch
from accuracy import assert_as_accurate
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import Case, cases
from tolerances import (
    assert_bit_equal,
    assert_gradients_close,
    assert_no_worse,
    assert_values_close,
    gradients,
)
from torch import Tensor

from sparse_sr_attn import CoA, LCoA
from sparse_sr_attn.errors import BackendError
from sparse_sr_attn.functional import backend, kmeans, l2_normalize
from sparse_sr_attn.functional import cluster as fast
from sparse_sr_attn.functional.cluster import triton as cluster_triton
from sparse_sr_attn.layers import base, lcoa
from sparse_sr_attn.reference import cluster as slow
from sparse_sr_attn.states import ClusterPattern

pytest.importorskip("triton", reason="needs triton")
pytestmark = pytest.mark.unhooked  # triton reads the source of what it compiles

WIDTH, VALUE_WIDTH = 5, 3  # no powers of two
small = cases(max_batch=2, max_tokens=9, max_chunk_size=5)
few = settings(max_examples=8)  # a kernel takes the interpreter a few milliseconds a block

NEIGHBOURS_COINCIDE = Case(num_tokens=5, num_clusters=1, chunk_size=3, seed=1)
TWO_CHUNKS_PUBLISHED = Case(num_tokens=6, num_clusters=2, chunk_size=3, count_keys_once=False, seed=2)
PADDED_TAIL = Case(batch=2, num_tokens=7, num_clusters=9, chunk_size=3, seed=3)
PADDED_TAIL_PUBLISHED = Case(batch=2, num_tokens=10, num_clusters=4, chunk_size=3, count_keys_once=False, seed=4)
REPEATED_TWICE_OVER = Case(num_tokens=2, num_clusters=2, chunk_size=7, count_keys_once=False, seed=6)
FOUR_CHUNKS_TWO_SIDES = Case(num_tokens=8, num_clusters=3, chunk_size=2, num_adjacent=2, seed=8)
LONELY_TAIL = Case(num_tokens=4, num_clusters=1, chunk_size=3, num_adjacent=0, seed=1)
SEVERAL_BLOCKS = Case(num_tokens=45, num_clusters=5, chunk_size=18, seed=10)  # of 16 slots
SEVERAL_BLOCKS_PUBLISHED = SEVERAL_BLOCKS.but(count_keys_once=False)
NEAREST = Case(batch=2, num_tokens=13, num_clusters=5, chunk_size=2, seed=10, nearest=True)
NEAREST_FEW = Case(batch=2, num_tokens=7, num_clusters=3, chunk_size=3, num_adjacent=3, seed=11, nearest=True)
NEAREST_BLOCKS = SEVERAL_BLOCKS.but(num_tokens=80, nearest=True)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small chunks have several; launch options are computed anew, also after a test that changes others."""
    monkeypatch.setattr(cluster_triton, "_SLOTS", 16)
    monkeypatch.setattr(cluster_triton._Launch, "_kept", classmethod(cluster_triton._Launch._kept.__wrapped__))


def inputs_of(
    case: Case, device: torch.device, dtype: torch.dtype = torch.float64, value_width: int = VALUE_WIDTH
) -> tuple[Tensor, Tensor, Tensor]:
    query, key = (case.tokens(name, WIDTH, dtype=dtype, device=device).requires_grad_() for name in ("query", "key"))
    return query, key, case.tokens("value", value_width, dtype=dtype, device=device).requires_grad_()


@few
@given(case=small, scale=st.sampled_from((1.0, 0.3)))
@example(case=Case(num_tokens=1, num_clusters=1, chunk_size=1), scale=1.0)
@example(case=NEIGHBOURS_COINCIDE, scale=1.0)
@example(case=TWO_CHUNKS_PUBLISHED, scale=1.0)
@example(case=PADDED_TAIL, scale=0.3)
@example(case=PADDED_TAIL_PUBLISHED, scale=0.3)
@example(case=REPEATED_TWICE_OVER, scale=1.0)
@example(case=FOUR_CHUNKS_TWO_SIDES, scale=1.0)
@example(case=LONELY_TAIL, scale=1.0)
@example(case=SEVERAL_BLOCKS, scale=1.0)
@example(case=SEVERAL_BLOCKS_PUBLISHED, scale=1.0)
@example(case=NEAREST, scale=1.0)
@example(case=NEAREST_FEW, scale=1.0)
@example(case=NEAREST_BLOCKS, scale=0.3)
def test_attention_equals_masked_dense_attention(device: torch.device, case: Case, scale: float) -> None:
    leaves = inputs_of(case, device)
    pattern = case.pattern(device=device)
    actual = fast.cluster_attention(*leaves, pattern, scale=scale, backend="triton")
    expected = slow.cluster_attention(*leaves, pattern, scale=scale)
    assert_values_close(actual, expected)
    probe = case.tokens("probe", VALUE_WIDTH, device=device)
    assert_gradients_close(gradients(actual, leaves, probe), gradients(expected, leaves, probe))


@few
@given(case=small, scale=st.sampled_from((1.0, 0.3)))
@example(case=PADDED_TAIL, scale=0.3)
@example(case=PADDED_TAIL_PUBLISHED, scale=0.3)
@example(case=SEVERAL_BLOCKS, scale=1.0)
@example(case=NEAREST_BLOCKS, scale=1.0)
def test_lse_equals_dense(device: torch.device, case: Case, scale: float) -> None:
    leaves = inputs_of(case, device)[:2]
    pattern = case.pattern(device=device)
    actual = fast.cluster_lse(*leaves, pattern, scale=scale, backend="triton")
    expected = slow.cluster_lse(*leaves, pattern, scale=scale)
    assert_values_close(actual, expected)
    probe = case.tensor("probe", case.batch, case.num_tokens, device=device)
    assert_gradients_close(gradients(actual, leaves, probe), gradients(expected, leaves, probe))


@pytest.mark.parametrize("with_lse", [False, True])
@few
@given(case=small, value_width=st.sampled_from((VALUE_WIDTH, 35)))
@example(case=PADDED_TAIL, value_width=35)
@example(case=PADDED_TAIL_PUBLISHED, value_width=35)
@example(case=REPEATED_TWICE_OVER, value_width=3)
@example(case=SEVERAL_BLOCKS, value_width=3)
@example(case=NEAREST_BLOCKS, value_width=3)
def test_keys_that_are_unit_queries(device: torch.device, with_lse: bool, case: Case, value_width: int) -> None:
    """Made by the kernels: of zeros and short rows, too, with values in parts, and a gradient of the lse or none."""
    query, _, value = inputs_of(case, device, value_width=value_width)
    lengths = torch.tensor([1.0, 3e-5, 0.0, 2.0], dtype=torch.float64, device=device)
    with torch.no_grad():
        query *= lengths[case.integers("lengths", 4, case.batch, case.num_tokens, 1, device=device)]
    pattern = case.pattern(device=device)
    length = query.norm(dim=-1, keepdim=True).clamp(min=5e-5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster_triton, "_VALUE_COLUMNS", 16)
        actual, lse = fast._attention(query, query, value, pattern, 0.7, True, "triton", with_lse=True)
        expected = slow.cluster_attention(query, query / length, value, pattern, scale=0.7)
        if with_lse:
            expected_lse = slow.cluster_lse(query, query / length, pattern, scale=0.7)
            actual, expected = (
                torch.cat([r, e[..., None]], dim=-1) for r, e in ((actual, lse), (expected, expected_lse))
            )
        assert_values_close(actual, expected)
        probe = case.tokens("probe", actual.shape[-1], device=device)
        mine, other = (gradients(output, (query, value), probe) for output in (actual, expected))
    size = length.detach()  # gradients of short rows are as much longer
    assert_gradients_close((size * mine[0], mine[1]), (size * other[0], other[1]))


@pytest.mark.parametrize("case", [PADDED_TAIL, PADDED_TAIL_PUBLISHED, NEAREST], ids=["exact", "published", "nearest"])
def test_rounds_equal_dense_attention(device: torch.device, case: Case) -> None:
    leaves = inputs_of(case, device)
    pattern = case.but(batch=2 * case.batch).pattern(device=device)
    actual = fast.cluster_attention_rounds(*leaves, pattern, 2, backend="triton")
    expected = slow.cluster_attention_rounds(*leaves, pattern, 2)
    assert_values_close(actual, expected)
    probe = case.tokens("probe", VALUE_WIDTH, device=device)
    assert_gradients_close(gradients(actual, leaves, probe), gradients(expected, leaves, probe))


@pytest.mark.parametrize("case", [PADDED_TAIL, PADDED_TAIL_PUBLISHED], ids=["exact", "published"])
def test_wide_values_go_in_parts(device: torch.device, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the gradient of the lse counts once, not with every part."""
    monkeypatch.setattr(cluster_triton, "_VALUE_COLUMNS", 16)
    leaves = inputs_of(case, device, value_width=35)
    pattern = case.pattern(device=device)
    layout = (pattern.order, pattern.neighbors, pattern.chunk_size, pattern.num_adjacent, pattern.count_keys_once)
    output, lse, *_ = cluster_triton.attention_op(*leaves, *layout, 1.0)
    actual = torch.cat([output, lse[..., None]], dim=-1)
    output, lse = slow.cluster_attention(*leaves, pattern), slow.cluster_lse(*leaves[:2], pattern)
    expected = torch.cat([output, lse[..., None]], dim=-1)
    assert_values_close(actual, expected)
    probe = case.tokens("probe", 36, device=device)
    assert_gradients_close(gradients(actual, leaves, probe), gradients(expected, leaves, probe))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's in the interpreter, of who sees the NaN
@pytest.mark.parametrize("filling", [1e4, float("nan")])
@pytest.mark.parametrize(
    "case",
    [FOUR_CHUNKS_TWO_SIDES.but(num_adjacent=1), LONELY_TAIL, NEAREST.but(batch=1)],
    ids=["ring", "tail", "nearest"],
)
def test_an_unseen_token_cannot_matter(device: torch.device, case: Case, filling: float) -> None:
    query, key, value = (leaf.detach() for leaf in inputs_of(case, device))
    pattern = case.pattern(device=device)
    before = fast.cluster_attention(query, key, value, pattern, backend="triton")
    token = int(pattern.order[0, -1])
    blind = ~slow.visible_pairs(pattern)[:, :, token]
    assert blind.any()
    key[:, token], value[:, token] = filling, filling
    assert_bit_equal(fast.cluster_attention(query, key, value, pattern, backend="triton")[blind], before[blind])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's in the interpreter; what comes of it is checked
def test_large_scores_do_not_overflow(device: torch.device) -> None:
    """Rising along the keys, so that the running maximum moves with every block."""
    case = SEVERAL_BLOCKS.but(num_clusters=1)
    query, key, value = (leaf.detach() for leaf in inputs_of(case, device, torch.float32))
    key = key * torch.linspace(0, 300, case.num_tokens, device=device)[:, None]
    pattern = case.pattern(device=device)
    actual = fast.cluster_attention(query, key, value, pattern, backend="triton")
    expected = slow.cluster_attention(query.double(), key.double(), value.double(), pattern)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-3, atol=1e-3)


def both(pattern: ClusterPattern) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Return the kernels and dense attention under a pattern."""
    return (
        lambda *rows: fast.cluster_attention(*rows, pattern, backend="triton"),
        lambda *rows: slow.cluster_attention(*rows, pattern),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", [PADDED_TAIL, SEVERAL_BLOCKS_PUBLISHED], ids=["tail", "blocks"])
def test_low_precision_is_no_worse_than_dense_attention(device: torch.device, case: Case, dtype: torch.dtype) -> None:
    """Values in `dtype` under queries and keys in float32, as LSP gives them."""
    wide = inputs_of(case, device, value_width=40)
    kinds = (torch.float32, torch.float32, dtype)
    rows = [leaf.detach().to(kind).requires_grad_() for leaf, kind in zip(wide, kinds, strict=True)]
    assert_as_accurate(*both(case.pattern(device=device)), rows)


@pytest.mark.parametrize("scale", [1.0, 8.0, 24.0])
def test_sharp_attention_is_no_worse_than_dense_attention(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, scale: float
) -> None:
    """Large scores: the backward must not make weights of a rounded logsumexp."""
    monkeypatch.setattr(cluster_triton, "_SLOTS", 64)
    case = Case(num_tokens=96, num_clusters=3, chunk_size=32, seed=11)
    query, key = (case.tokens(name, 16, dtype=torch.float32, device=device) for name in ("query", "key"))
    value = case.tokens("value", 16, dtype=torch.float32, device=device)
    rows = [rows.requires_grad_() for rows in (scale * query, torch.nn.functional.normalize(key, dim=-1), value)]
    exact = [row.detach().double().requires_grad_() for row in rows]
    pattern = case.pattern(device=device)
    actual = fast.cluster_attention(*rows, pattern, backend="triton")
    peer, oracle = slow.cluster_attention(*rows, pattern), slow.cluster_attention(*exact, pattern)
    probe = case.tokens("probe", 16, dtype=torch.float32, device=device)
    results = (gradients(actual, rows, probe), gradients(peer, rows, probe), gradients(oracle, exact, probe))
    # On some CPUs NumPy, which multiplies in the interpreter, rounds scores several times as much as PyTorch does.
    for mine, dense, true, factor in zip(*results, (2.0, 2.5, 6.0), strict=True):
        assert_no_worse(mine, dense, true, factor=factor)


@pytest.mark.usefixtures("tensor_cores")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_tensor_cores_are_no_worse_than_dense_attention(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, scale: float
) -> None:
    """The precision that products have on a GPU, emulated, under the bounds of the other tests."""
    monkeypatch.setattr(cluster_triton, "_SLOTS", 64)
    case = Case(num_tokens=96, num_clusters=3, chunk_size=32, seed=11)
    query, key = (
        torch.nn.functional.normalize(case.tokens(name, 16, dtype=torch.float32, device=device), dim=-1)
        for name in ("query", "key")
    )
    value = case.tokens("value", 16, dtype=dtype, device=device)
    rows = [row.detach().requires_grad_() for row in (scale * query, key, value)]
    assert_as_accurate(*both(case.pattern(device=device)), rows)


def test_results_are_the_same_in_every_run(device: torch.device) -> None:
    leaves = inputs_of(SEVERAL_BLOCKS_PUBLISHED, device, torch.float32)
    pattern = SEVERAL_BLOCKS_PUBLISHED.pattern(device=device)
    probe = SEVERAL_BLOCKS_PUBLISHED.tokens("probe", VALUE_WIDTH, dtype=torch.float32, device=device)

    def run() -> list[Tensor]:
        output = fast.cluster_attention(*leaves, pattern, backend="triton")
        return [output, *gradients(output, leaves, probe)]

    for first, second in zip(run(), run(), strict=True):
        assert_bit_equal(first, second)


@pytest.mark.parametrize("num_clusters", [1, 5, 20])
@pytest.mark.parametrize("reseed_threshold", [0.0, 0.7, 0.9])
@pytest.mark.parametrize("pending", [True, False])
def test_pending_update(device: torch.device, num_clusters: int, reseed_threshold: float, pending: bool) -> None:
    """As in plain code, with dead clusters, empty ones, fewer seeds than dead, and with nothing pending."""
    case = Case(seed=num_clusters)
    state = kmeans.initial_state(num_clusters, 6)
    state = kmeans.KMeansState(*(each.to(device).double() if each.is_floating_point() else each for each in state))
    state.num_updates.fill_(3)
    if pending:
        state.pending_sums.copy_(case.tensor("sums", num_clusters, 6, device=device))
        state.pending_counts.copy_(torch.arange(num_clusters, device=device) % 4 * 3 + (num_clusters == 1))
        seeds = torch.nn.functional.normalize(case.tensor("seeds", num_clusters, 6, device=device), dim=-1)
        state.pending_seeds[: num_clusters // 4 + 1] = seeds[: num_clusters // 4 + 1]
    expected = kmeans.KMeansState(*(each.clone() for each in state))
    kmeans._apply_pending(expected, 0.3, reseed_threshold)
    cluster_triton.apply_pending_op(*state[:5], state.num_updates, 0.3, reseed_threshold, kmeans._EPS)
    for mine, other in zip(state, expected, strict=True):
        assert_values_close(mine.double(), other.double())


def assert_stored(
    state: kmeans.KMeansState, points: Tensor, *, accumulate: bool = False, best: Tensor | None = None
) -> None:
    """The kernels store in `state` what plain code does; sums may be rounded otherwise."""
    similar, assignment = kmeans._nearest(points, state.centroids)
    best = similar if best is None else best
    expected = kmeans.KMeansState(*(each.clone() for each in state))
    kmeans._store_pending(expected, points, best, assignment, accumulate)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kmeans, "runs_kernels", lambda device: True)
        kmeans._store_pending(state, points, best, assignment, accumulate)
    assert_bit_equal(state.pending_counts, expected.pending_counts)
    assert_bit_equal(state.num_skipped, expected.num_skipped)
    for name in ("pending_sums", "pending_seeds"):
        torch.testing.assert_close(getattr(state, name), getattr(expected, name), rtol=1e-5, atol=1e-5)


@few
@given(case=small, width=st.integers(1, 20), num_clusters=st.integers(1, 40), bits=st.sampled_from((16, 32)))
@example(case=SEVERAL_BLOCKS, width=4, num_clusters=33, bits=32)
@example(case=SEVERAL_BLOCKS.but(batch=2), width=3, num_clusters=1, bits=32)
@example(case=Case(num_tokens=1), width=256, num_clusters=2, bits=16)
def test_statistics_of_a_step(device: torch.device, case: Case, width: int, num_clusters: int, bits: int) -> None:
    """With empty clusters, fewer points than clusters, points without direction; a second step replaces the first."""
    state = kmeans.KMeansState(*(each.to(device) for each in kmeans.initial_state(num_clusters, width)))
    for name in ("points", "others"):
        points = case.tokens(name, width, device=device).to(torch.float32 if bits == 32 else torch.bfloat16)
        points[-1, -1] = 0
        assert_stored(state, points)


@pytest.mark.parametrize("batch", [1, 2])
def test_statistics_of_accumulated_steps(device: torch.device, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several blocks of clusters, several parts, several turns of a part; a step that is not finite adds nothing."""
    monkeypatch.setattr(cluster_triton, "_SUMMED", 256)
    monkeypatch.setattr(cluster_triton, "_MOST_PARTS", 3)
    state = kmeans.KMeansState(*(each.to(device) for each in kmeans.initial_state(37, 6)))
    for step in range(4):
        points = Case(batch=batch, num_tokens=150).tokens(f"points {step}", 6, dtype=torch.float32, device=device)
        if step == 2:
            points[0, 70, 1] = float("nan")
        assert_stored(state, points, accumulate=step > 0)
    assert int(state.pending_counts.sum()) == 450 * batch
    assert int(state.num_skipped) == 1


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's in the interpreter, of who sees the NaN
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_statistics_of_points_that_are_not_finite(device: torch.device, poison: float) -> None:
    state = kmeans.KMeansState(*(each.to(device) for each in kmeans.initial_state(40, 5)))
    points = Case(num_tokens=100).tokens("points", 5, dtype=torch.float32, device=device)
    assert_stored(state, points)
    points[0, 50, 2] = poison
    assert_stored(state, points)
    assert int(state.num_skipped) == 1
    assert not any(pending.any() for pending in state[2:5])


def test_the_earlier_of_equal_points_is_the_seed(device: torch.device) -> None:
    """Zeros of both signs are equal, and come between numbers of either."""
    state = kmeans.KMeansState(*(each.to(device) for each in kmeans.initial_state(50, 80)))
    points = torch.eye(80, device=device).view(2, 40, 80)
    best = Case().integers("best", 5, 2, 40, device=device) - 3
    best = torch.where(best == -3, -0.0, best.float())
    assert_stored(state, points, best=best)


def test_statistics_count_beyond_float32(device: torch.device) -> None:
    """Which cannot count beyond 2**24."""
    from sparse_sr_attn.functional.cluster import triton_kernels

    state = kmeans.KMeansState(*(each.to(device) for each in kmeans.initial_state(1, 2)))
    parts = torch.zeros(3, 1, 2, device=device), torch.tensor([[2**24], [1], [1]], dtype=torch.int32, device=device)
    points, chosen = torch.ones(1, 1, 2, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    triton_kernels.store_pending[(1,)](
        *(points, *parts, chosen, *state[2:5], state.num_skipped, 1, 3, 1),
        WIDTH=2,
        EPS=1e-12,
        ACCUMULATE=False,
        BLOCK_K=16,
        BLOCK_D=16,
    )
    assert int(state.pending_counts) == 2**24 + 2


@few
@given(case=small, width=st.integers(1, 20), num_clusters=st.integers(1, 40))
@example(case=SEVERAL_BLOCKS, width=4, num_clusters=33)
def test_nearest_centroid(device: torch.device, case: Case, width: int, num_clusters: int) -> None:
    points = case.tokens("points", width, device=device)
    centroids = case.but(num_clusters=num_clusters).centroids(width, device=device)
    best, index = cluster_triton.nearest_op(points, centroids)
    scores = torch.einsum("bnd,kd->bnk", points, centroids)
    assert_values_close(best, scores.amax(dim=-1))
    assert_bit_equal(index, scores.argmax(dim=-1))


def test_the_lowest_index_wins_a_tie(device: torch.device) -> None:
    """Within a block of centroids, and between blocks."""
    points = PADDED_TAIL.integers("points", 5, 2, 7, 3, device=device).double() - 2
    some = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, -1]], dtype=torch.float64, device=device)
    centroids = some.repeat(15, 1)  # 45: two whole blocks of 16 and a part
    _, index = cluster_triton.nearest_op(points, centroids)
    scores = points @ some.T
    lowest = torch.where(scores == scores.amax(dim=-1, keepdim=True), torch.arange(3, device=device), 3).amin(dim=-1)
    assert_bit_equal(index, lowest)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_points_are_assigned_in_float32(device: torch.device, dtype: torch.dtype) -> None:
    points = SEVERAL_BLOCKS.tokens("points", 6, dtype=dtype, device=device)
    centroids = SEVERAL_BLOCKS.centroids(6, device=device).float()
    best, index = cluster_triton.nearest_op(points, centroids)
    wide_best, wide_index = cluster_triton.nearest_op(points.float(), centroids)
    assert best.dtype == torch.float32
    assert_bit_equal(best, wide_best)
    assert_bit_equal(index, wide_index)


def test_too_wide_queries_are_refused(device: torch.device) -> None:
    rows = torch.zeros(1, 2, 257, device=device)
    pattern = Case(num_tokens=2).pattern(device=device)
    with pytest.raises(BackendError, match="at most 256 channels, got 257; 'eager' takes any number"):
        fast.cluster_attention(rows, rows, rows, pattern, backend="triton")


@few
@given(case=cases(max_batch=5, max_tokens=60), num_clusters=st.integers(1, 40), rounds=st.integers(1, 3))
@example(case=Case(batch=2, num_tokens=700), num_clusters=40, rounds=2)  # several parts
@example(case=Case(batch=3, num_tokens=60), num_clusters=512, rounds=3)
@example(case=Case(num_tokens=1), num_clusters=1, rounds=1)
def test_sorting_equals_a_stable_sort(device: torch.device, case: Case, num_clusters: int, rounds: int) -> None:
    """To the bit, with a rank of clusters for each round; some clusters are empty."""
    assignment = case.integers("assignment", num_clusters, case.batch * rounds, case.num_tokens, device=device)
    rank = torch.stack(
        [torch.randperm(num_clusters, generator=torch.Generator().manual_seed(r)) for r in range(rounds)]
    )
    order = cluster_triton.sort_by_cluster_op(assignment, rank.to(device))
    expected = [rank[row % rounds][own].argsort(stable=True) for row, own in enumerate(assignment.cpu())]
    assert_bit_equal(order.cpu(), torch.stack(expected))


def test_sorting_in_parts_of_several_blocks(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_triton, "_SORTED_AT_A_TIME", 256)
    monkeypatch.setattr(cluster_triton, "_MOST_PARTS", 20)
    assignment = Case().integers("assignment", 16, 2, 777, device=device)
    order = cluster_triton.sort_by_cluster_op(assignment, torch.arange(16, device=device)[None])
    assert_bit_equal(order, assignment.argsort(dim=1, stable=True))


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_layers_train_as_without_kernels(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, similarity: str
) -> None:
    """LCoA and a CoA that shares its state, for two steps: outputs, gradients and the state of k-means."""
    torch.manual_seed(0)
    options = {"num_clusters": 5, "chunk_size": 8, "reduction": 2, "num_rounds": 2, "similarity": similarity}
    plain = LCoA(6, **options).to(device).double(), CoA(6).to(device).double()
    layers = copy.deepcopy(plain)
    images = [Case().tensor(name, 2, 6, 5, 7, device=device) for name in ("first", "second")]

    def train(first: LCoA, later: CoA) -> list[Tensor]:
        found = []
        for image in images:
            x = image.clone().requires_grad_()
            state = first.lsp(x, reuse="pattern")
            y = later(first(x, state), state)
            leaves = (x, *first.parameters(), *later.parameters())
            found += [y, *torch.autograd.grad((y * y.sin()).sum(), leaves)]
        return found + list(first.buffers())

    expected = train(*plain)
    monkeypatch.setattr(backend, "_best_backend", lambda _: "triton")
    for module in (base, fast, kmeans, l2_normalize, lcoa):
        monkeypatch.setattr(module, "runs_kernels", lambda _: True)
    for mine, other in zip(train(*layers), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-8)


COMPILE = """
import itertools
import torch
from machine_code import NAMES, usage
from sparse_sr_attn.functional import cluster
from sparse_sr_attn.functional.cluster import triton as cluster_triton
from sparse_sr_attn.functional.cluster import triton_kernels
from sparse_sr_attn.functional.cluster.layout import ClusterLayout

SIZES = {"num_tokens", "chunk_size", "num_slots", "first", "num_seen", "fill", "num_repeats"}

for dtype, query_dim, value_dim, kind, chunk_size in (
    (torch.float32, 16, 64, "exact", 144), (torch.float32, 16, 64, "exact", 128),
    (torch.float32, 32, 128, "exact", 256), (torch.float32, 128, 128, "exact", 384),
    (torch.bfloat16, 16, 64, "exact", 144), (torch.bfloat16, 32, 128, "exact", 256),
    (torch.bfloat16, 128, 128, "exact", 384), (torch.float16, 16, 180, "exact", 144),
    (torch.float32, 256, 128, "exact", 144), (torch.float64, 16, 64, "exact", 144),
    (torch.bfloat16, 16, 64, "published", 144), (torch.float32, 16, 64, "nearest", 48),
    (torch.bfloat16, 128, 128, "nearest", 48),
):
    query = torch.empty(1, 1000, query_dim, dtype=torch.promote_types(dtype, torch.float32))
    value = torch.empty(1, 1000, value_dim, dtype=dtype)
    nobody = torch.zeros(1, 1000).long()
    pattern = cluster.cluster_pattern(nobody, chunk_size=chunk_size, count_keys_once=kind != "published")
    if kind == "nearest":
        pattern = cluster.with_nearest_chunks(pattern, query)
    units = (False, True) if query_dim <= cluster_triton.MAX_UNIT_DIM else (False,)
    for name, unit in itertools.product(("forward", "backward_query", "backward_key"), units):
        options = cluster_triton._Launch.of(name, query, value, ClusterLayout.of(pattern), 1.0, unit=unit).options
        options = options | {"START": 0} | ({"LSE": not unit} if name == "backward_query" else {})
        kinds = {"order": "i64", "chunks": "i32", "starts": "i64"}
        kinds |= dict.fromkeys(("value", "output", "grad_output", "grad_value"), NAMES[dtype])
        kernel = getattr(triton_kernels, name)
        needs = usage(kernel, options, SIZES, lambda argument: kinds.get(argument, NAMES[query.dtype]))
        print(dtype, query_dim, value_dim, kind, name, unit, needs, flush=True)
        usual = query_dim <= 128 and dtype != torch.float64 and kind == "exact"
        assert needs.spilled == 0 or not usual, "registers are spilled to memory"

SIZES = {"num_points", "num_clusters", "share", "num_parts", "num_chosen"}
KINDS = {"assignment": "i64", "part_counts": "i32", "keys": "i64", "chosen": "i64", "num_skipped": "i64"}
for width, block_k in ((16, 128), (64, 64), (128, 32), (256, 16)):
    options = {"WIDTH": width, "EPS": 1e-12, "BLOCK_D": width, "num_warps": 4, "num_stages": 2}
    for name, more in (
        ("sum_points", {"BLOCK_K": block_k, "BLOCK_I": cluster_triton._SUMMED_AT_A_TIME}),
        ("store_pending", {"BLOCK_K": 16, "ACCUMULATE": True}),
    ):
        kernel = getattr(triton_kernels, name)
        needs = usage(kernel, {**options, **more}, SIZES, lambda argument: KINDS.get(argument, "fp32"))
        print(name, width, needs, flush=True)
        assert needs.spilled == 0, "registers are spilled to memory"

SIZES = {"num_tokens", "num_clusters", "num_ranks", "share"}
for clusters in (16, 128, 512):
    block = cluster_triton._SORTED_AT_A_TIME // clusters
    options = {"BLOCK_I": block, "BLOCK_K": clusters, "num_warps": 4, "num_stages": 3}
    for name, more in (("count_places", {}), ("sort_tokens", {"BLOCK_P": block})):
        kernel = getattr(triton_kernels, name)
        needs = usage(kernel, {**options, **more}, SIZES, lambda argument: "i32" if argument == "counts" else "i64")
        print(name, clusters, needs, flush=True)
        assert needs.spilled == 0, "registers are spilled to memory"
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "90"])
def test_kernels_compile_for_gpus(capability: str, tmp_path: os.PathLike[str]) -> None:
    """Down to machine code, without spilled registers in the usual sizes."""
    machine_code.run(COMPILE, capability, tmp_path)
