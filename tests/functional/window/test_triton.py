"""Triton kernels of all groups of windows against the slow twins; without a GPU by triton's interpreter."""

import gc
import os
import weakref

import machine_code
import pytest
import torch
from accuracy import assert_as_accurate
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import Case
from tolerances import (
    assert_bit_equal,
    assert_gradients_close,
    assert_values_close,
    gradients,
)
from torch import Tensor

from sparse_sr_attn.errors import BackendError, ShapeError
from sparse_sr_attn.functional.window import grouped_window_attention, split_groups
from sparse_sr_attn.functional.window import triton as window_triton
from sparse_sr_attn.reference import window as slow

pytest.importorskip("triton", reason="needs triton")
pytestmark = pytest.mark.unhooked  # triton reads the source of what it compiles
few = settings(max_examples=4)  # a block takes the interpreter some milliseconds

Groups = dict[str, tuple[int, ...]]


def grouped(*sizes: int, shifts: tuple[int, ...] | None = None, unshifts: tuple[int, ...] | None = None) -> Groups:
    shifts = shifts or (0,) * len(sizes)
    return {"window_sizes": sizes, "shifts": shifts, "unshifts": unshifts or shifts}


PADDED = grouped(2, 3, 4)
SHIFTED = grouped(2, 3, 4, shifts=(1, 1, 2))
DISPLACED = grouped(3, 5, shifts=(2, 3), unshifts=(1, 2))
SMALL = grouped(3, 5, shifts=(1, 0))
LARGE = grouped(4, 8, 9, shifts=(2, 4, 0))  # blocks with several windows, one and a part of one


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that windows of a few pixels fill several."""
    monkeypatch.setattr(window_triton, "_SLOTS", 16)
    monkeypatch.setattr(window_triton, "_options", window_triton._options.__wrapped__)


def maps(
    query_dim: int,
    value_dim: int,
    height: int,
    width: int,
    device: torch.device,
    *,
    batch: int = 1,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    query, value = (
        Case().tensor(name, batch, dim, height, width, dtype=dtype, device=device).requires_grad_()
        for name, dim in (("query", query_dim), ("value", value_dim))
    )
    return query, value


def dense(query: Tensor, value: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
    """Masked dense attention of each group, and where its pixels do not come from padding."""
    outputs, meant = [], []
    names = ("window_sizes", "shifts", "unshifts")
    parts = (split_groups(each, len(groups["window_sizes"])) for each in (query, value))
    for own, values, size, shift, unshift in zip(*parts, *(groups[name] for name in names), strict=False):
        outputs.append(slow.window_attention(own, own, values, window_size=size, shift=shift, unshift=unshift))
        source = slow.sources(*query.shape[2:], size, shift, unshift).to(query.device)
        meant.append((source >= 0).view(1, 1, *query.shape[2:]).expand_as(values))
    return torch.cat(outputs, dim=1), torch.cat(meant, dim=1)


@few
@given(
    dims=st.tuples(st.integers(3, 7), st.integers(1, 7)),
    side=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    groups=st.sampled_from((PADDED, SHIFTED, SMALL)),
)
@example(dims=(5, 5), side=(7, 9), groups=PADDED)
@example(dims=(5, 7), side=(7, 9), groups=SHIFTED)
@example(dims=(6, 2), side=(5, 5), groups=SHIFTED)  # the last group has no values
@example(dims=(6, 6), side=(5, 7), groups=DISPLACED)
@example(dims=(3, 3), side=(1, 1), groups=SHIFTED)
@example(dims=(3, 3), side=(10, 17), groups=LARGE)
def test_attention_equals_masked_dense_attention(
    device: torch.device, dims: tuple[int, int], side: tuple[int, int], groups: Groups
) -> None:
    leaves = maps(*dims, *side, device, batch=2)
    actual = grouped_window_attention(*leaves, **groups, backend="triton")
    expected, meant = dense(*leaves, groups)
    assert actual.isfinite().all(), "also for pixels whose result comes from padding"
    assert_values_close(actual * meant, expected * meant)
    probe = Case().tensor("probe", *actual.shape, device=device) * meant
    assert_gradients_close(gradients(actual, leaves, probe), gradients(expected, leaves, probe))


@pytest.mark.parametrize("groups", [SHIFTED, DISPLACED], ids=["shifted", "displaced"])
def test_all_backends_agree(device: torch.device, groups: Groups) -> None:
    """Also for pixels whose result comes from padding."""
    leaves = maps(6, 6, 5, 7, device)
    outputs = [grouped_window_attention(*leaves, **groups, backend=name) for name in ("eager", "operator", "triton")]
    probe = Case().tensor("probe", *outputs[0].shape, device=device)
    for output in outputs[1:]:
        assert_values_close(output, outputs[0])
        assert_gradients_close(gradients(output, leaves, probe), gradients(outputs[0], leaves, probe))


def test_an_unseen_pixel_cannot_matter(device: torch.device) -> None:
    """Another query and value of a pixel changes no bit for the pixels outside its windows."""
    query, value = (leaf.detach() for leaf in maps(3, 3, 7, 9, device))
    before = grouped_window_attention(query, value, **SHIFTED, backend="triton")
    query[:, :, 3, 4], value[:, :, 3, 4] = 1e4, 1e4
    after = grouped_window_attention(query, value, **SHIFTED, backend="triton")
    for group, (size, shift) in enumerate(zip(SHIFTED["window_sizes"], SHIFTED["shifts"], strict=True)):
        blind = ~slow.visible_pairs(7, 9, size, shift)[:, 3 * 9 + 4].view(7, 9).to(device)
        assert_bit_equal(after[:, group, blind], before[:, group, blind])


@pytest.mark.usefixtures("tensor_cores")
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float32, 1.0),
        (torch.float32, 3.0),
        (torch.float16, 1.0),
        (torch.float16, 3.0),
        (torch.bfloat16, 1.0),  # not sharper: the interpreter cuts off the bits that a GPU rounds
    ],
    ids=str,
)
def test_low_precision_is_no_worse_than_dense_attention(device: torch.device, dtype: torch.dtype, scale: float) -> None:
    """With the products of tensor cores, and with long queries, whose attention is sharp."""
    query, value = maps(32, 32, 6, 7, device, dtype=torch.float32)
    query = query / 2
    low = [(scale * query).detach().to(dtype).requires_grad_(), value.detach().to(dtype).requires_grad_()]

    def attend(*leaves: Tensor) -> Tensor:
        return grouped_window_attention(*leaves, **SMALL, backend="triton")

    assert_as_accurate(attend, lambda *leaves: dense(*leaves, SMALL)[0], low)


def test_results_are_the_same_in_every_run_and_memory(device: torch.device) -> None:
    leaves = maps(5, 7, 6, 7, device, dtype=torch.float32)
    probe = Case().tensor("probe", 1, 7, 6, 7, dtype=torch.float32, device=device)

    def run(*inputs: Tensor) -> list[Tensor]:
        output = grouped_window_attention(*inputs, **SMALL, backend="triton")
        return [output, *gradients(output, inputs, probe)]

    last = [leaf.detach().contiguous(memory_format=torch.channels_last).requires_grad_() for leaf in leaves]
    for first, second in zip(run(*leaves), run(*last), strict=True):
        assert_bit_equal(first, second)


def test_the_table_of_groups(device: torch.device) -> None:
    """Read off a map of 5x7: 3 and 2 windows a side, in blocks of 16 slots."""
    groups = window_triton._Groups.of(torch.empty(1, 7, 5, 7), [2, 4], [1, 2], [1, 1], [3, 2], [4, 3])
    (table,) = window_triton.group_table(groups, 16, device)
    assert table.tolist() == [
        [0, 2, 3, 4, 1, 1, 0, 3, 0, 4, 0],
        [3, 4, 2, 2, 2, 1, 3, 2, 4, 3, 48],
    ]


def test_a_cuda_graph_keeps_the_table_of_its_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def table(height: int) -> Tensor:
        groups = window_triton._Groups.of(torch.empty(1, 2, height, 5), [2], [0], [0], [1], [1])
        return window_triton.table_for(groups, 16, torch.device("cuda"))

    monkeypatch.setattr(Tensor, "to", lambda self, _: self)  # as if there were a GPU
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    warm = weakref.ref(table(5))
    with monkeypatch.context() as capturing:
        capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        capturing.setattr(torch, "tensor", None)
        assert table(5) is warm()
    for height in range(6, 40):  # more than are kept for later calls
        table(height)
    gc.collect()
    assert warm() is not None


def test_wrong_arguments_are_explained(device: torch.device) -> None:
    query, value = maps(3, 3, 4, 4, device)
    with pytest.raises(ShapeError, match="each window size must have a shift, got 3 sizes, 2 shifts and 2 unshifts"):
        grouped_window_attention(query, value, window_sizes=(2, 3, 4), shifts=(0, 0))
    with pytest.raises(ShapeError, match="query and value must be of one size"):
        grouped_window_attention(query, value[..., 1:], **PADDED)
    wide = torch.zeros(1, 129, 2, 2, device=device)
    with pytest.raises(BackendError, match="groups of at most 128 channels, got 129"):
        grouped_window_attention(wide, value[:, :, :2, :2], window_sizes=(2,), shifts=(0,), backend="triton")


COMPILE = """
import torch
from machine_code import NAMES, usage
from sparse_sr_attn.functional.window import triton as window_triton
from sparse_sr_attn.functional.window import triton_kernels

SIZES = {"num_groups", "num_slots", "height", "width", "query_dim", "value_dim"}

half, single, double = torch.bfloat16, torch.float32, torch.float64
for query_type, value_type, dim, unshift in (
    (single, single, 60, 0), (half, half, 60, 0), (single, half, 60, 0), (double, double, 60, 0), (half, half, 60, 1),
    (single, single, 180, 0), (half, half, 180, 0), (single, half, 180, 0),
    (single, single, 360, 0), (torch.float16, torch.float16, 360, 0),
):
    query, value = (torch.empty(1, dim, 33, 17, dtype=dtype) for dtype in (query_type, value_type))
    groups = window_triton._Groups.of(value, [4, 8, 16], [0] * 3, [unshift] * 3, [dim // 3] * 3, [dim // 3] * 3)
    for name in ("forward", "backward"):
        options = window_triton._options(name, query_type, value_type, groups, "highest")
        work = "fp64" if query_type == double else "fp32"
        kinds = dict.fromkeys(("query", "grad_query"), NAMES[query_type])
        kinds |= {"groups": "i32", "maximum": work, "inverse": work}
        kernel = getattr(triton_kernels, name)
        needs = usage(kernel, options, SIZES, lambda argument: kinds.get(argument, NAMES[value_type]))
        print(query_type, value_type, dim, unshift, name, needs, flush=True)
        assert needs.spilled == 0 or unshift, "registers are spilled to memory"
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "90"])
def test_kernels_compile_for_gpus(capability: str, tmp_path: os.PathLike[str]) -> None:
    """Down to machine code, without spilled registers."""
    machine_code.run(COMPILE, capability, tmp_path)
