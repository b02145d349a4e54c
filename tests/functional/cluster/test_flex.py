"""FlexAttention: its block masks against the slow twin's table, and its compiled kernel against dense attention."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import Case, cases
from torch import Tensor

from sparse_sr_attn.errors import BackendError
from sparse_sr_attn.functional import cluster as fast
from sparse_sr_attn.functional.cluster import flex as cluster_flex
from sparse_sr_attn.functional.cluster.layout import ClusterLayout
from sparse_sr_attn.reference import cluster as slow

compiles = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own

PADDED_TAIL = Case(batch=2, num_tokens=7, num_clusters=9, chunk_size=3, seed=3)
PADDED_TAIL_PUBLISHED = Case(batch=2, num_tokens=10, num_clusters=4, chunk_size=3, count_keys_once=False, seed=4)
REPEATED_TWICE_OVER = Case(num_tokens=2, num_clusters=2, chunk_size=7, count_keys_once=False, seed=6)
NEAREST = Case(batch=2, num_tokens=13, num_clusters=5, chunk_size=2, seed=10, nearest=True)
NEAREST_LONG = Case(batch=2, num_tokens=17, num_clusters=5, chunk_size=5, num_adjacent=2, seed=11, nearest=True)
FOUR_CHUNKS_TWO_SIDES = Case(num_tokens=8, num_clusters=3, chunk_size=2, num_adjacent=2, seed=8)
TWO_CHUNKS_PUBLISHED = Case(num_tokens=6, num_clusters=2, chunk_size=3, count_keys_once=False, seed=2)


def inputs_of(case: Case, device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    widths = {"query": 4, "key": 4, "value": 3}
    return [case.tokens(name, width, dtype=dtype, device=device) for name, width in widths.items()]


def entries(num_blocks: Tensor, indices: Tensor, shape: tuple[int, int]) -> Tensor:
    """The blocks that are listed, as a table of queries by keys; none twice."""
    table = torch.zeros(shape, dtype=torch.int64)
    for row, (count, columns) in enumerate(zip(num_blocks, indices, strict=True)):
        for column in columns[: int(count)].tolist():
            table[row, column] += 1
    return table


@given(case=cases(), block=st.sampled_from((None, 2, 4, 16)))
@example(case=PADDED_TAIL, block=None)
@example(case=PADDED_TAIL_PUBLISHED, block=None)
@example(case=TWO_CHUNKS_PUBLISHED, block=4)
@example(case=FOUR_CHUNKS_TWO_SIDES, block=4)
@example(case=REPEATED_TWICE_OVER, block=2)
@example(case=NEAREST, block=None)
@example(case=NEAREST, block=4)
@example(case=NEAREST_LONG, block=2)
@example(case=NEAREST_LONG, block=4)
def test_block_masks_show_what_the_pattern_shows(case: Case, block: int | None) -> None:
    """Blocks of a chunk, as on the CPU, and of any other size, as on GPUs; what is listed as whole is not masked."""
    pattern = case.pattern(device=torch.device("cpu"))
    layout = ClusterLayout.of(pattern)
    slot = torch.arange(layout.num_slots)
    block = block or layout.chunk_size
    seen, mask = cluster_flex._seen(pattern, block)

    shape = (-(-len(slot) // block), -(-len(seen) // block))
    for b, order in enumerate(pattern.order):
        row = b if pattern.neighbors is not None else 0  # on the ring, one mask serves all samples
        some, whole = (
            entries(counts[row, 0], indices[row, 0], shape)
            .repeat_interleave(block, 0)
            .repeat_interleave(block, 1)[: len(slot), : len(seen)]
            for counts, indices in (
                (mask.kv_num_blocks, mask.kv_indices),
                (mask.full_kv_num_blocks, mask.full_kv_indices),
            )
        )
        assert (some + whole).max() <= 1, "a block is listed twice"
        asked = mask.mask_mod(torch.tensor(b), torch.tensor(0), slot[:, None], torch.arange(len(seen)))
        shown = (whole + some * (torch.zeros(len(slot), len(seen)).bool() | asked))[: layout.num_tokens]

        by_query = torch.zeros(layout.num_tokens, layout.num_tokens, dtype=torch.int64)
        by_query.index_add_(1, order[layout.rank(seen)], shown)
        counts = torch.zeros_like(by_query).index_copy_(0, order, by_query)
        assert torch.equal(counts, slow.multiplicity(pattern)[b])


@compiles
@pytest.mark.unhooked
@pytest.mark.slow
@pytest.mark.parametrize("nearest", [False, True])
def test_attention_equals_masked_dense_attention(device: torch.device, nearest: bool) -> None:
    """Built once for a chunk size, or twice: not for every image size, nor for every way of counting."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    base = Case(batch=2, num_tokens=30, num_clusters=9, chunk_size=4, seed=3, nearest=nearest)
    for case in (
        base,
        base.but(num_tokens=23),
        base.but(num_tokens=40),
        base.but(num_tokens=50, count_keys_once=nearest),
    ):
        rows = inputs_of(case, device)
        pattern = case.pattern(device=device)
        with torch.no_grad():
            actual = fast.cluster_attention(*rows, pattern, scale=0.7, backend="flex")
        expected = slow.cluster_attention(*(row.double() for row in rows), pattern, scale=0.7)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@compiles
@pytest.mark.unhooked
@pytest.mark.slow
def test_half_values_are_gathered_in_float32(device: torch.device) -> None:
    case = Case(batch=2, num_tokens=23, num_clusters=9, chunk_size=4, seed=3)
    query, key, value = inputs_of(case, device)
    pattern = case.pattern(device=device)
    with torch.no_grad():
        actual = fast.cluster_attention(query, key, value.bfloat16(), pattern, backend="flex")
    expected = slow.cluster_attention(query, key, value.bfloat16().float(), pattern).bfloat16()
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.cuda
@pytest.mark.parametrize(("chunk_size", "nearest"), [(144, False), (48, True)])
def test_gradients_and_lse_on_a_gpu(chunk_size: int, nearest: bool) -> None:
    """In chunks of 144 or 48, which blocks of 128 do not divide."""
    device = torch.device("cuda")
    case = Case(batch=2, num_tokens=1000, num_clusters=20, chunk_size=chunk_size, nearest=nearest)
    rows = [case.tokens(name, 16, dtype=torch.float32, device=device).requires_grad_() for name in ("q", "k", "v")]
    pattern = case.pattern(device=device)
    probe = case.tokens("probe", 16, dtype=torch.float32, device=device)
    actual = fast.cluster_attention(*rows, pattern, backend="flex")
    expected = fast.cluster_attention(*rows, pattern, backend="eager")
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
    # Compiled backwards give their memory away, so `gradients`, which keeps the graph, cannot be used.
    for mine, other in zip(
        *(torch.autograd.grad((output * probe).sum(), rows) for output in (actual, expected)), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)
    lse = fast.cluster_lse(*rows[:2], pattern, backend="flex")
    torch.testing.assert_close(lse, fast.cluster_lse(*rows[:2], pattern, backend="eager"), rtol=1e-4, atol=1e-4)


def test_what_it_cannot_do_on_a_cpu_is_refused() -> None:
    device = torch.device("cpu")
    query, key, value = inputs_of(PADDED_TAIL, device)
    pattern = PADDED_TAIL.pattern(device=device)
    with pytest.raises(BackendError, match="no gradient on 'cpu', and an input requires one; 'tiles' and 'eager' have"):
        fast.cluster_attention(query, key, value.requires_grad_(), pattern, backend="flex")
    with pytest.raises(
        BackendError, match=r"computes in float32, got torch.float64; 'tiles' and 'eager' compute in it"
    ):
        fast.cluster_attention(query.double(), key.double(), value, pattern, backend="flex")
    with pytest.raises(BackendError, match="no logsumexp on 'cpu'; 'tiles' and 'eager' work there"):
        fast.cluster_lse(query, key, pattern, backend="flex")


@compiles
@pytest.mark.unhooked
def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    torch._dynamo.reset()
    query, key, value = inputs_of(PADDED_TAIL, torch.device("cpu"))
    pattern = PADDED_TAIL.pattern(device=torch.device("cpu"))
    with (
        torch.no_grad(),
        pytest.raises(BackendError, match=r"cannot build its kernel here: .*; 'tiles' and 'eager' need no"),
    ):
        fast.cluster_attention(query, key, value, pattern, backend="flex")
