"""Formulas of `torch.utils.flop_counter` against hand counts, and against torch's own counts of the plain backends."""

import subprocess
import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch
from strategies import Case
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sparse_sr_attn import GMSA, NLSA, LCoA, ShiftConv2d
from sparse_sr_attn.functional import channels_last as layout
from sparse_sr_attn.functional import cluster, conv_norm_triton, conv_triton, flops, sparsemax, window
from sparse_sr_attn.functional.backend import HAS_TRITON


def counted(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def forward_and_backward(call: Callable[[], Tensor]) -> tuple[int, int]:
    forward = counted(call)
    return forward, counted(lambda: call().sum().backward()) - forward


CASES = {
    "whole chunks": Case(batch=2, num_tokens=12, num_clusters=3, chunk_size=4),
    "a tail": Case(batch=2, num_tokens=11, num_clusters=3, chunk_size=4),
    "published": Case(num_tokens=7, num_clusters=3, chunk_size=4, count_keys_once=False),
    "fewer than a chunk": Case(num_tokens=3, chunk_size=8),
    "two on each side": Case(num_tokens=25, num_clusters=3, chunk_size=3, num_adjacent=2),
    "nearest": Case(batch=2, num_tokens=25, num_clusters=3, chunk_size=3, num_adjacent=2, nearest=True),
}


def operations(case: Case) -> dict[str, tuple[Callable[..., Tensor], int]]:
    """Return operations of a backend, and how many times their backward computes the scores again."""
    query, key = (case.tokens(name, 5).requires_grad_() for name in ("query", "key"))
    value = case.tokens("value", 3).requires_grad_()
    pattern = case.pattern()
    weights = cluster.cluster_weights(query, key, pattern).detach().requires_grad_()
    return {
        "attention": (lambda backend: cluster.cluster_attention(query, key, value, pattern, backend=backend), 1),
        "weights": (lambda backend: cluster.cluster_weights(query, key, pattern, backend=backend), 0),
        "lse": (lambda backend: cluster.cluster_lse(query, key, pattern, backend=backend), 1),
        "apply": (lambda backend: cluster.apply_cluster_weights(weights, value, pattern, backend=backend), 0),
    }


@pytest.mark.parametrize("case", list(CASES.values()), ids=list(CASES))
@pytest.mark.parametrize("name", ["attention", "weights", "lse", "apply"])
def test_tiles_count_as_much_as_plain_code(name: str, case: Case) -> None:
    found = operations(case)
    call, again = found[name]
    plain, plain_backward = forward_and_backward(lambda: call("eager"))
    tiles, tiles_backward = forward_and_backward(lambda: call("tiles"))
    assert tiles == plain > 0
    scores = counted(lambda: found["weights"][0]("eager"))
    assert tiles_backward == plain_backward + again * scores


@pytest.mark.parametrize("size", [(8, 8), (7, 9)])
@pytest.mark.parametrize("keyed", [False, True])
def test_windows_count_as_much_as_plain_code(size: tuple[int, int], keyed: bool) -> None:
    query, value = (torch.randn(2, c, *size, requires_grad=True) for c in (5, 3))
    key = torch.randn(2, 5, *size, requires_grad=True) if keyed else None
    weights = window.window_weights(query, key, window_size=4).detach().requires_grad_()
    scores = counted(lambda: window.window_weights(query, key, window_size=4, backend="eager"))
    one_product = 0 if keyed else scores  # where the queries are the keys, one product sends back what is two here
    for call, more in (
        (
            lambda backend: window.window_attention(query, key, value, window_size=4, backend=backend),
            scores - one_product,
        ),
        (lambda backend: window.window_weights(query, key, window_size=4, backend=backend), -one_product),
        (lambda backend: window.apply_window_weights(weights, value, window_size=4, backend=backend), 0),
    ):
        plain, plain_backward = forward_and_backward(partial(call, "eager"))
        ours, ours_backward = forward_and_backward(partial(call, "operator"))
        assert ours == plain > 0
        assert ours_backward == plain_backward + more


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
def test_groups_of_windows_count_as_much_as_plain_code() -> None:
    query, value = (torch.randn(2, c, 7, 9, requires_grad=True) for c in (5, 4))
    groups = {"window_sizes": (2, 4), "shifts": (0, 2)}
    (plain, _), (ours, backward) = (
        forward_and_backward(lambda name=name: window.grouped_window_attention(query, value, **groups, backend=name))
        for name in ("eager", "triton")
    )
    assert ours == plain
    scores = 2 * 20 * 4**2, 2 * 6 * 16**2  # of both samples
    assert backward == 2 * (scores[0] * (2 * 3 + 3 * 2) + scores[1] * (2 * 2 + 3 * 2))


def test_sparsemax_and_pointwise_count_as_much_as_plain_code() -> None:
    query, key, value = (torch.randn(2, n, c, requires_grad=True) for n, c in ((9, 5), (11, 5), (11, 3)))
    plain, plain_backward = forward_and_backward(
        lambda: sparsemax.sparsemax_attention(query, key, value, backend="eager")
    )
    ours, ours_backward = forward_and_backward(
        lambda: sparsemax.sparsemax_attention(query, key, value, backend="tiles")
    )
    assert ours == plain
    assert ours_backward == plain_backward + 2 * 2 * 9 * 11 * 5
    x = torch.randn(2, 6, 5, 7).contiguous(memory_format=torch.channels_last).requires_grad_()
    conv = torch.nn.Conv2d(6, 4, 1)
    expected = forward_and_backward(lambda: conv(x))
    assert forward_and_backward(lambda: layout.pointwise_conv2d(x, conv.weight, conv.bias)) == expected


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
@pytest.mark.parametrize("learns", [False, True])
def test_convolutions_by_kernels_count_as_much_as_plain_code(learns: bool) -> None:
    conv, norm = torch.nn.Conv2d(6, 4, 1), torch.nn.BatchNorm2d(4)
    x = torch.randn(2, 6, 5, 7).requires_grad_(learns)
    parameters = conv.weight, conv.bias
    plain, backward = forward_and_backward(lambda: conv(x))
    assert forward_and_backward(lambda: conv_triton.conv1x1(x, *parameters, shift=True)) == (plain, backward)
    both = (
        conv_norm_triton.Parameters(*([each, each] for each in (*parameters, *norm.parameters()))),
        conv_norm_triton.Buffers(*([each, each] for each in norm.buffers())),
    )
    # Products are computed twice; those of gradients with the input come with those of outputs.
    normalized = forward_and_backward(
        lambda: torch.cat(conv_norm_triton.conv1x1_batch_norm(x, *both, momentum=0.1, eps=1e-5))
    )
    assert normalized == (2 * 2 * plain, 2 * (plain + backward))
    with torch.no_grad():
        assert counted(lambda: conv_norm_triton.conv1x1_norm(x, *both, eps=1e-5)) == 2 * plain


def test_layers_by_hand() -> None:
    x = torch.randn(1, 8, 8, 8)
    layer = LCoA(8, num_clusters=4, chunk_size=16, reduction=4)
    embed, nearest, value = 2 * 64 * 8 * 2 * 9, 2 * 64 * 2 * 4, 2 * 64 * 8 * 8
    attention = 2 * (4 * 16 * 48) * (2 + 8)
    for mode in (layer.eval(), layer.train()):
        assert counted(partial(mode, x)) == embed + nearest + value + attention
    layer = GMSA(8, window_sizes=(4, 8))
    products = 3 * 2 * 64 * 8 * 8
    assert counted(lambda: layer.eval()(x)) == products + 2 * (4 * 16**2 + 64**2) * (4 + 4)
    layer = NLSA(8, chunk_size=16, num_rounds=2, max_buckets=4)
    hashes = 2 * 64 * 2 * 2 * 2
    assert counted(lambda: layer.train()(x)) == embed + value + hashes + 2 * attention
    assert counted(lambda: ShiftConv2d(8, 4)(x)) == 2 * 64 * 8 * 4


def test_every_operator_with_products_has_a_formula() -> None:
    names = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if "sparse_sr_attn::" in name}
    without = {"l2_normalize", "l2_normalize_backward", "move_running_statistics", "order_clusters"}
    assert names - set(flops._FORMULAS) == without | {"argsort_of_bytes", "sort_by_cluster"}
    assert set(flops._FORMULAS) <= names


@pytest.mark.parametrize("first", ["import torch.utils.flop_counter", "pass"])
def test_the_order_of_imports_does_not_matter(first: str) -> None:
    """And a counter that was made before the first forward counts, too."""
    code = f"""
import torch
{first}
from sparse_sr_attn import LCoA
from torch.utils.flop_counter import FlopCounterMode
layer = LCoA(8, num_clusters=4, chunk_size=16, reduction=4).eval()
with FlopCounterMode(display=False) as counter:
    layer(torch.zeros(1, 8, 8, 8))
print(counter.get_total_flops())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(18432 + 1024 + 8192 + 61440)]
