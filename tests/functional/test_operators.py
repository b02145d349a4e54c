"""The operators as torch sees them: schema, fake tensors, autograd registration, and dynamic shapes."""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from strategies import Case
from torch import Tensor
from torch.testing._internal.optests import OpCheckError
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_sr_attn.functional import (  # noqa: F401  registers the operators
    batch_norm,
    cluster,
    conv_norm_triton,
    kmeans,
    lsh,
    shift,
    sparsemax,
    window,
)
from sparse_sr_attn.functional.backend import HAS_TRITON
from sparse_sr_attn.functional.cluster import order  # noqa: F401  registers an operator that layers import
from sparse_sr_attn.functional.window.grid import group_widths
from sparse_sr_attn.reference import cluster as slow

pytestmark = pytest.mark.unhooked

CASES = {
    "padded": Case(batch=2, num_tokens=7, num_clusters=3, chunk_size=3),
    "published": Case(batch=2, num_tokens=10, num_clusters=3, chunk_size=4, count_keys_once=False),
    "one token": Case(num_tokens=1, chunk_size=4),
    "many chunks": Case(num_tokens=17, num_clusters=5, chunk_size=2, num_adjacent=2),
    "nearest": Case(batch=2, num_tokens=17, num_clusters=5, chunk_size=2, nearest=True),
}
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
cases = pytest.mark.parametrize("case", list(CASES.values()), ids=list(CASES))


def operator(name: str) -> Any:
    return getattr(torch.ops.sparse_sr_attn, name).default


def check(op: Any, args: Sequence[object], **options: Any) -> None:
    """`opcheck`, whose findings are failures of the test."""
    try:
        torch.library.opcheck(op, tuple(args), **options)
    except OpCheckError as problem:
        raise AssertionError(str(problem)) from problem


def rows_of(case: Case, names: Sequence[str], device: torch.device, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [case.tokens(name, 4, dtype=dtype, device=device).requires_grad_() for name in names]


def layout_of(case: Case, device: torch.device) -> tuple[Tensor, Tensor | None, int, int, bool]:
    pattern = slow.cluster_pattern(
        case.assignment(device=device),
        chunk_size=case.chunk_size,
        num_adjacent=case.num_adjacent,
        count_keys_once=case.count_keys_once,
    )
    neighbors = slow.nearest_chunks(case.tokens("routing", 3, device=device), pattern) if case.nearest else None
    return pattern.order, neighbors, pattern.chunk_size, pattern.num_adjacent, pattern.count_keys_once


@cases
@pytest.mark.parametrize("with_lse", [False, True])
def test_cluster_attention(device: torch.device, case: Case, with_lse: bool) -> None:
    rows = rows_of(case, ("query", "key", "value"), device)
    options = (*layout_of(case, device), 0.5, True, with_lse)
    check(operator("cluster_attention"), (*rows, *options))
    grad, *inputs = (row.detach() for row in rows_of(case, ("grad", "query", "key", "value"), device))
    lse = operator("cluster_attention")(*inputs, *options)[1]
    check(operator("cluster_attention_backward"), (grad, torch.ones_like(lse), *inputs, *options))


@cases
@pytest.mark.parametrize("with_lse", [False, True])
def test_cluster_weights(device: torch.device, case: Case, with_lse: bool) -> None:
    # Rows past the last token mean nothing but do exist, so both runs that opcheck compares must fill them alike.
    rows, layout = rows_of(case, ("query", "key"), device), layout_of(case, device)
    check(operator("cluster_weights"), (*rows, *layout, 0.5, True, torch.float64, with_lse))
    check(
        operator("cluster_weights"),
        (*rows, *layout, 0.5, True, torch.bfloat16, with_lse),
        test_utils=("test_schema", "test_faketensor"),
    )
    query, key = (row.detach() for row in rows)
    weights, lse = operator("cluster_weights")(query, key, *layout, 0.5, True, torch.float64, with_lse)
    grad = case.tensor("grad", *weights.shape, device=device)
    args = (grad, torch.ones_like(lse), weights, query, key, *layout, 0.5, True, with_lse)
    check(operator("cluster_weights_backward"), args)


@cases
def test_apply_cluster_weights(device: torch.device, case: Case) -> None:
    query, key, value = rows_of(case, ("query", "key", "value"), device)
    layout = layout_of(case, device)
    weights, _ = operator("cluster_weights")(query, key, *layout, 0.5, True, torch.float64, False)
    weights = weights.detach().requires_grad_()
    check(operator("apply_cluster_weights"), (weights, value, *layout))
    grad = case.tokens("grad", 4, device=device)
    check(operator("apply_cluster_weights_backward"), (grad, weights.detach(), value.detach(), *layout))


@cases
def test_cluster_lse(device: torch.device, case: Case) -> None:
    rows, layout = rows_of(case, ("query", "key"), device), layout_of(case, device)
    check(operator("cluster_lse"), (*rows, *layout, 0.5, True))
    grad = case.tensor("grad", case.batch, case.num_tokens, device=device)
    check(operator("cluster_lse_backward"), (grad, *(row.detach() for row in rows), *layout, 0.5, True))


@needs_triton
@cases
def test_cluster_attention_triton(device: torch.device, case: Case) -> None:
    rows, layout = rows_of(case, ("query", "key", "value"), device), layout_of(case, device)
    check(operator("cluster_attention_triton"), (*rows, *layout, 0.5))
    query, key, value, grad = (row.detach() for row in (*rows, *rows_of(case, ("grad",), device)))
    _, lse, *statistics = operator("cluster_attention_triton")(query, key, value, *layout, 0.5)
    args = (grad, torch.ones_like(lse), query, key, value, *layout[:2], *statistics, *layout[2:], 0.5)
    check(operator("cluster_attention_triton_backward"), args)
    check(operator("cluster_attention_triton"), (rows[0], None, rows[2], *layout, 0.5))
    args = (grad, None, query, None, value, *layout[:2], *statistics, *layout[2:], 0.5)
    check(operator("cluster_attention_triton_backward"), args)


@needs_triton
@cases
def test_nearest_centroid_triton(device: torch.device, case: Case) -> None:
    points = case.tokens("points", 4, dtype=torch.float32, device=device)
    check(operator("nearest_centroid_triton"), (points, case.centroids(4, device=device).float()))


@needs_triton
@cases
def test_sort_by_cluster(device: torch.device, case: Case) -> None:
    check(operator("sort_by_cluster"), (case.assignment(device=device), torch.arange(9, device=device)[None]))


@cases
def test_nearest_rows(device: torch.device, case: Case) -> None:
    check(operator("nearest_rows"), (case.tokens("rows", 4, device=device), 2 * case.num_adjacent + 1))


@cases
def test_sparsemax_attention(device: torch.device, case: Case) -> None:
    rows = rows_of(case, ("query", "key", "value"), device)
    check(operator("sparsemax_attention"), (*rows, 0.5))
    inputs = [row.detach() for row in rows_of(case, ("grad", "query", "key", "value"), device)]
    check(operator("sparsemax_attention_backward"), (*inputs, 0.5))


@cases
def test_argsort_of_bytes(case: Case) -> None:
    for dtype in (torch.uint8, torch.int16):
        keys = case.assignment().to(dtype)
        check(operator("argsort_of_bytes"), (keys,))
        assert torch.equal(operator("argsort_of_bytes")(keys), keys.argsort(dim=1, stable=True))


@pytest.mark.parametrize("size", [(4, 8), (5, 7), (1, 1)], ids=str)
@pytest.mark.parametrize("keyed", [False, True])
def test_window_attention(device: torch.device, size: tuple[int, int], keyed: bool) -> None:
    """In windows of 4x4, whole and padded, shifted by 2 and back by 1; with keys and with queries that are the keys."""
    options = [4], [2], [1], [3], [5], 0.5
    for memory in (torch.contiguous_format, torch.channels_last):
        query, key, value, grad = (
            Case().tensor(name, 2, width, *size, device=device).contiguous(memory_format=memory)
            for name, width in (("query", 3), ("key", 3), ("value", 5), ("grad", 5))
        )
        leaves = (query.requires_grad_(), key.requires_grad_() if keyed else None, value.requires_grad_())
        check(operator("window_attention"), (*leaves, *options))
        maps = (query.detach(), key.detach() if keyed else None, value.detach())
        check(operator("window_attention_backward"), (grad, *maps, *options))
        check(operator("window_weights"), (query, leaves[1], 4, 2, 0.5))
        weights = operator("window_weights")(query, leaves[1], 4, 2, 0.5).detach()
        check(operator("window_weights_backward"), (weights.sin(), weights, *maps[:2], 2, 0.5))
        check(operator("apply_window_weights_backward"), (grad, weights, maps[2], 2, 1))
        check(operator("apply_window_weights"), (weights.requires_grad_(), leaves[2], 4, 2, 1))


@pytest.mark.parametrize("channels", [(3, 5), (5, 1)], ids=str)
def test_window_attention_in_groups(device: torch.device, channels: tuple[int, int]) -> None:
    """With groups of different widths, and with a group that has no values."""
    query, value = (Case().tensor(name, 1, c, 3, 4, device=device) for name, c in zip("qv", channels, strict=True))
    options = [2, 3], [1, 2], [1, 1], *(group_widths(dim, 2) for dim in channels), 0.5
    grad = Case().tensor("grad", *value.shape, device=device)
    check(operator("window_attention_backward"), (grad, query, None, value, *options))
    check(operator("window_attention"), (query.requires_grad_(), None, value.requires_grad_(), *options))


@needs_triton
@pytest.mark.parametrize("channels", [(3, 5), (5, 1)], ids=str)
def test_grouped_window_attention(device: torch.device, channels: tuple[int, int]) -> None:
    query, value = (Case().tensor(name, 1, c, 3, 4, device=device) for name, c in zip("qv", channels, strict=True))
    groups = [2, 3], [1, 2], [1, 1], *(group_widths(dim, 2) for dim in channels)
    output, *statistics = operator("grouped_window_attention")(query, value, *groups)
    grad = Case().tensor("grad", *output.shape, device=device)
    check(operator("grouped_window_attention_backward"), (grad, query, value, output, *statistics, *groups))
    check(operator("grouped_window_attention"), (query.requires_grad_(), value.requires_grad_(), *groups))


@pytest.mark.parametrize("size", [(2, 3, 5, 7), (1, 5, 1, 1)], ids=str)
def test_pointwise_conv2d(device: torch.device, size: tuple[int, ...]) -> None:
    x, weight, bias, grad = (
        Case().tensor(name, *shape, dtype=torch.float32, device=device)
        for name, shape in (
            ("x", size),
            ("weight", (4, size[1], 1, 1)),
            ("bias", (4,)),
            ("grad", (size[0], 4, *size[2:])),
        )
    )
    check(operator("pointwise_conv2d"), (x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()))
    check(operator("pointwise_conv2d_backward"), (grad, x.detach(), weight.detach()))


def test_move_running_statistics(device: torch.device) -> None:
    mean, var, running_mean, running_var = (
        Case().tensor(name, 5, dtype=torch.float32, device=device)
        for name in ("mean", "var", "running_mean", "running_var")
    )
    num_batches = torch.zeros((), dtype=torch.int64, device=device)
    for count in (12, 1):
        running = (running_mean, running_var.abs(), num_batches)
        check(operator("move_running_statistics"), (mean, var.abs(), count, *running, 0.1, 1e-5))


@needs_triton
def test_kernels_of_maps(device: torch.device) -> None:
    x = Case().tensor("x", 2, 7, 3, 4, device=device).requires_grad_()
    last = x.detach().contiguous(memory_format=torch.channels_last)
    weight, bias = (Case().tensor(name, *size, device=device) for name, size in (("w", (3, 7, 1, 1)), ("b", (3,))))
    grad = Case().tensor("grad", 2, 3, 3, 4, device=device)
    for given in (x, last):
        for residual in (None, grad.float().requires_grad_()):
            check(operator("conv1x1"), (given, weight.requires_grad_(), bias, True, True, residual, 0.1))
        for wanted in ((True, True), (True, False), (False, True)):
            check(operator("conv1x1_backward"), (grad, given.detach(), weight.detach(), True, True, 0.1, *wanted))
    rows = Case().tensor("rows", 2, 5, 3, device=device)
    logit_scale = torch.ones(1, dtype=torch.float64, device=device)
    for given in (rows, rows.mT.contiguous().mT, rows[0], rows[None].expand(2, -1, -1, -1).transpose(1, 2)):
        for scale in (None, logit_scale):
            check(operator("l2_normalize_backward"), (given, given, scale))
            leaves = (given.clone().requires_grad_(), scale if scale is None else scale.clone().requires_grad_())
            check(operator("l2_normalize"), leaves)


@needs_triton
@pytest.mark.parametrize("number", [1, 2])
def test_normalised_convolutions(device: torch.device, number: int) -> None:
    x, weight, *vectors = (
        Case().tensor(name, *size, device=device)
        for name, size in (("x", (2, 7, 3, 4)), ("w", (3, 7, 1, 1)), *((name, (3,)) for name in "bsomv"))
    )
    parameters = [[tensor.clone() for _ in range(number)] for tensor in (weight, *vectors[:3])]
    means, variances = ([tensor.abs() for _ in range(number)] for tensor in vectors[3:])
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        check(operator("conv1x1_norm"), (given, *parameters, means, variances, 1e-5))
        counts = [torch.zeros((), dtype=torch.int64, device=device) for _ in range(number)]
        args = (given, *parameters[:2], means, variances, counts, 0.1, 1e-5)
        check(operator("conv1x1_statistics"), args)
        statistics = operator("conv1x1_statistics")(*args)
        outputs, (weights, _, *others) = (
            operator("conv1x1_norm")(given, *parameters, means, variances, 1e-5),
            parameters,
        )
        grads = [output.square() for output in outputs]
        for of_x in (False, True):
            args = (grads, outputs, given, weights, *others, statistics, 1e-5, of_x)
            check(operator("conv1x1_batch_norm_backward"), args)


@cases
def test_hash_step(device: torch.device, case: Case) -> None:
    state = [tensor.to(device) for tensor in lsh.initial_hash(2, 8, 4)]
    check(operator("hash_step"), (case.tokens("points", 4, device=device), *state, 6, 0))


@pytest.mark.parametrize("batch", [1, 2])
def test_strides(device: torch.device, batch: int) -> None:
    """Rows cut from a feature map; with one sample their strides are ambiguous, and outputs must keep to the fakes'."""
    case = CASES["padded"].but(batch=batch)
    query, key, value, grad = (
        case.tensor(name, batch, width, case.num_tokens, device=device).mT
        for name, width in (("query", 4), ("key", 4), ("value", 3), ("grad", 3))
    )
    layout = layout_of(case, device)
    weights, lse = operator("cluster_weights")(query, key, *layout, 0.5, True, torch.float64, True)
    weights = weights.mT.contiguous().mT
    utils = ("test_schema", "test_faketensor")
    for name, rows, scale in (
        ("cluster_attention", (query, key, value), (0.5, True, True)),
        ("cluster_weights", (query, key), (0.5, True, torch.float64, True)),
        ("cluster_lse", (query, key), (0.5, True)),
        ("apply_cluster_weights", (weights, value), ()),
        ("cluster_attention_backward", (grad, lse, query, key, value), (0.5, True, True)),
        ("cluster_weights_backward", (weights, lse, weights, query, key), (0.5, True, True)),
        ("apply_cluster_weights_backward", (grad, weights, value), ()),
        ("cluster_lse_backward", (grad[..., 0], query, key), (0.5, True)),
    ):
        check(operator(name), (*rows, *layout, *scale), test_utils=utils)
    if HAS_TRITON:
        check(operator("cluster_attention_triton"), (query, key, value, *layout, 0.5), test_utils=utils)
        ones = torch.ones_like(grad[..., 0])
        inputs = (grad, ones, query, key, value, *layout[:2], ones, ones.clone())
        check(operator("cluster_attention_triton_backward"), (*inputs, *layout[2:], 0.5), test_utils=utils)
        check(operator("nearest_centroid_triton"), (query, key[0]), test_utils=utils)
    check(operator("sparsemax_attention"), (query, key, value, 0.5), test_utils=utils)
    check(operator("sparsemax_attention_backward"), (grad, query, key, value, 0.5), test_utils=utils)
    hashed = [tensor.to(device) for tensor in lsh.initial_hash(2, 8, 4)]
    check(operator("hash_step"), (query.float(), *hashed, 6, 0), test_utils=utils)
    state = kmeans.KMeansState(*(tensor.to(device) for tensor in kmeans.initial_state(case.num_clusters, 4)))
    check(operator("kmeans_step"), (query.float(), *state, 0.9, 0.5, False), test_utils=utils)


@cases
def test_nearest(device: torch.device, case: Case) -> None:
    centroids = kmeans.initial_state(case.num_clusters, 4).centroids.to(device, torch.float64)
    check(operator("nearest"), (case.tokens("points", 4, device=device), centroids))


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kmeans_step(device: torch.device, case: Case, dtype: torch.dtype) -> None:
    state = kmeans.initial_state(case.num_clusters, 4)
    state = kmeans.KMeansState(*(tensor.to(device) for tensor in state))
    points = case.tokens("points", 4, dtype=dtype, device=device)
    kmeans.kmeans_step(points, state, ema_decay=0.9, reseed_threshold=0.5)  # so that something is pending
    for accumulate in (False, True):
        check(operator("kmeans_step"), (points, *state, 0.9, 0.5, accumulate))


@cases
def test_order_clusters(device: torch.device, case: Case) -> None:
    centroids = case.centroids(4, device=device)
    for updates in (4, 5):
        rank = torch.arange(len(centroids), device=device)
        check(operator("order_clusters"), (centroids, torch.tensor(updates, device=device), rank))


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names += [func._opname] if func.namespace == "sparse_sr_attn" else []
        return func(*args, **(kwargs or {}))


def test_dispatch_modes_see_operators() -> None:
    query, key, value = rows_of(CASES["padded"], ("query", "key", "value"), torch.device("cpu"))
    with _Seen() as seen:
        sparsemax.sparsemax_attention(query.detach(), key.detach(), value.detach())
        sparsemax.sparsemax_attention(query, key, value).sum().backward()
    assert seen.names == ["sparsemax_attention", "sparsemax_attention", "sparsemax_attention_backward"]


def test_gradients_of_gradients_raise() -> None:
    query, key, value = rows_of(CASES["padded"], ("query", "key", "value"), torch.device("cpu"))
    output = sparsemax.sparsemax_attention(query, key, value)
    (grad,) = torch.autograd.grad(output.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


def test_autograd_knows_which_arguments_change() -> None:
    state = kmeans.initial_state(3, 4)
    before = [tensor._version for tensor in state]
    kmeans.kmeans_step(torch.rand(1, 8, 4), state, ema_decay=0.9, reseed_threshold=0.5)
    assert all(tensor._version > version for tensor, version in zip(state, before, strict=True))


def test_a_call_does_not_import_the_compiler() -> None:
    """Which takes a second."""
    code = """
import sys, torch
from sparse_sr_attn import LCoA
LCoA(8, chunk_size=4)(torch.rand(1, 8, 6, 6)).sum().backward()
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_operator_is_checked_here() -> None:
    """An operator that is added must be added above."""
    registered = {
        name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if "sparse_sr_attn::" in name
    }
    assert registered == set(re.findall(r"operator\(\"(\w+)\"\)", Path(__file__).read_text(encoding="utf-8")))
