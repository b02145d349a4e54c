"""What a state keeps for later layers, weights or what they are made of, changes memory and time and no result."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerances import (
    assert_bit_equal,
    assert_gradients_close,
    assert_values_close,
    gradients,
    rms,
)
from torch import Tensor, nn

from sparse_sr_attn import GMSA, LSP, CoA, LCoA, LCoAN, SharedGMSA
from sparse_sr_attn.inference.visualize import attention_map_of, attention_overlap
from sparse_sr_attn.layers import base
from sparse_sr_attn.layers.base import add_rows
from sparse_sr_attn.states import ClusterAttention

SMALL: dict[str, Any] = {"num_clusters": 6, "chunk_size": 7, "reduction": 2, "res_scale": 1.0}
KINDS = [
    {"routing": routing, "num_rounds": num_rounds, "count_keys_once": count_keys_once}
    for routing in ("kmeans", "lsh")
    for num_rounds in (1, 3)
    for count_keys_once in (True, False)
]
KINDS += [{"neighbors": "nearest", "chunk_size": 3, "num_rounds": num_rounds} for num_rounds in (1, 3)]

kinds = pytest.mark.parametrize("kind", KINDS, ids=str)
rounds = pytest.mark.parametrize("num_rounds", [1, 3])


def features(name: int = 0, *, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Tensor:
    numbers = torch.randn(2, 8, 6, 5, generator=torch.Generator().manual_seed(name), dtype=torch.float64)
    return numbers.to(device, dtype)


def layer(**options: Any) -> LCoA:
    torch.manual_seed(0)
    return LCoA(8, **{**SMALL, **options})


def consumer() -> CoA:
    torch.manual_seed(1)
    return CoA(8, res_scale=0.7)


@kinds
@pytest.mark.parametrize("training", [False, True])
def test_the_pattern_is_as_good_as_the_weights(device: torch.device, kind: dict[str, Any], training: bool) -> None:
    """Two readers of one state: outputs, gradients of all parameters and inputs, and buffers, after two steps."""

    def results(reuse: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        first, later = layer(reuse=reuse, **kind), consumer()
        both = nn.ModuleList([first, later]).double().to(device).train(training)
        outputs, grads = [], []
        for step in (0, 2):
            x, y = (features(step + i, device=device).requires_grad_() for i in (0, 1))
            shared = first.attend(x)
            outputs += [first(x, shared), later(y, shared)]
            probe = features(9, device=device)
            grads += gradients(outputs[-2] + outputs[-1], (x, y, *both.parameters()), probe)
        return outputs, grads, list(both.buffers())

    mine, other = results("pattern"), results("weights")
    for one, two in zip(mine[0] + mine[2], other[0] + other[2], strict=True):
        assert_values_close(one.detach(), two.detach())
    assert_gradients_close(mine[1], other[1])
    assert all(grad.any() for grad in mine[1])


@rounds
@pytest.mark.parametrize(("reuse", "place", "expected"), [
    ("weights", "cpu", "weights"),
    ("pattern", "cpu", "embedding"),
    ("pattern", "meta", "embedding"),
    ("auto", "cpu", "weights"),
    ("auto", "meta", "embedding"),
])  # fmt: skip
def test_what_a_state_holds(reuse: str, place: str, expected: str, num_rounds: int) -> None:
    """One of the two, never both."""
    state = layer(reuse=reuse, num_rounds=num_rounds).to(place).lsp(features(dtype=torch.float32, device=place))
    assert isinstance(state, ClusterAttention)
    assert [name for name in ("weights", "embedding") if getattr(state, name) is not None] == [expected]
    assert getattr(state, expected).requires_grad
    shapes = {"weights": (2 * num_rounds, 5, 7, 21), "embedding": (2, 30, 4)}
    assert getattr(state, expected).shape == shapes[expected]


@rounds
def test_bfloat16_weights_err_little(device: torch.device, num_rounds: int) -> None:
    """What a later layer reads is off by 4e-3 of itself at most, and so are gradients by 1e-2; alone nothing is."""
    x, y = (features(i, dtype=torch.float32, device=device) for i in (0, 1))
    later = consumer().to(device)
    branches, grads, alone = [], [], []
    for dtype in (None, "bfloat16"):
        first = layer(reuse="weights", num_rounds=num_rounds, weights_dtype=dtype).to(device)
        output = later(y, first.attend(x))
        assert output.dtype == torch.float32
        branches.append(output - y)
        leaves = (*first.lsp.embed.parameters(), *later.parameters())
        grads.append(torch.autograd.grad((output * features(9, device=device).float()).sum(), leaves))
        alone.append(first(x))
    assert 0 < rms(branches[1] - branches[0]) <= 4e-3 * rms(branches[0])
    for whole, half in zip(*grads, strict=True):
        assert half.any()
        assert rms(half - whole) <= 1e-2 * rms(whole)
    assert_bit_equal(alone[1], alone[0])


VALUES = {
    "float32": (torch.float32, None, torch.float32),
    "float16": (torch.float16, None, torch.float32),
    "bfloat16": (torch.bfloat16, None, torch.bfloat16),
    "autocast to bfloat16": (torch.float32, torch.bfloat16, torch.bfloat16),
    "autocast to float16": (torch.float32, torch.float16, torch.float32),
}


@pytest.mark.parametrize(("dtype", "autocast", "stored"), VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("build", [
    lambda: (layer(reuse="weights"), consumer()),
    lambda: (layer(reuse="weights", num_rounds=3), consumer()),
    lambda: (GMSA(8, window_sizes=(2, 3)), SharedGMSA(8)),
], ids=["LCoA", "rounds", "GMSA"])  # fmt: skip
def test_weights_are_stored_as_readers_multiply_them(
    build: Callable[[], tuple[Any, Any]], dtype: torch.dtype, autocast: torch.dtype | None, stored: torch.dtype
) -> None:
    """Values in bfloat16 gather the same, to the bit, with weights in float32 and with these weights in bfloat16."""
    first, later = (module.to(dtype) for module in build())
    x, y = (features(i, dtype=dtype) for i in (0, 1))
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        state = first.attend(x)
        weights = state.weights if isinstance(state.weights, tuple) else (state.weights,)
        assert {each.dtype for each in weights} == {stored}
        wide = [each.detach().float() for each in weights]
        other = state._replace(weights=tuple(wide) if isinstance(state.weights, tuple) else wide[0])
        output = later(y, state)
        assert_bit_equal(output, later(y, other))
    output.float().square().sum().backward()
    assert all(parameter.grad.any() for parameter in first.parameters() if parameter.grad is not None)


@rounds
def test_autocast_moves_no_token_to_another_cluster(num_rounds: int) -> None:
    """The embedding is computed in the precision of its weights: embedding, pattern and buffers agree to the bit."""
    x = features(dtype=torch.float32)
    plain, cast = (layer(num_rounds=num_rounds).lsp.train() for _ in range(2))
    for _ in range(3):
        expected = plain.route(x)
        with torch.autocast("cpu", torch.bfloat16):
            actual = cast.route(x)
        assert_bit_equal(actual[0], expected[0])
        assert_bit_equal(actual[1].order, expected[1].order)
    for mine, other in zip(cast.buffers(), plain.buffers(), strict=True):
        assert_bit_equal(mine, other)


@pytest.mark.parametrize("of_map", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of_weights", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_joins_maps_and_weights_of_any_precision(of_map: torch.dtype, of_weights: torch.dtype) -> None:
    first = layer().to(of_weights)
    with torch.autocast("cpu", torch.bfloat16):
        assert first(features(dtype=of_map)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", [(1, 64, 12, 9), (3, 8, 5, 4), (2, 1, 3, 1)], ids=str)
@pytest.mark.parametrize("kernels", [False, True])
def test_rows_are_added_to_maps_of_any_memory(
    shape: tuple[int, ...],
    memory: torch.memory_format,
    dtype: torch.dtype,
    kernels: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also in the way of GPUs with Triton, where a gradient goes back as rows and to the map."""
    monkeypatch.setattr(base, "runs_kernels", lambda device: kernels)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).contiguous(memory_format=memory)
    rows = torch.randn(shape[0], shape[2] * shape[3], shape[1], generator=generator, dtype=torch.float64).to(dtype)
    expected = (x.double() + 0.3 * rows.double().mT.reshape(shape)).to(dtype)
    learns, rounding = rows.clone().requires_grad_(), 2 * torch.finfo(dtype).eps
    with torch.no_grad():
        added = add_rows(x, rows, alpha=0.3)
    for actual in (added, add_rows(x, learns, alpha=0.3)):
        torch.testing.assert_close(actual, expected, rtol=rounding, atol=rounding)
        assert actual.is_contiguous(memory_format=memory)
    add_rows(x.requires_grad_(), learns, alpha=0.3).sum().backward()
    torch.testing.assert_close(learns.grad, torch.full_like(rows, 0.3))
    torch.testing.assert_close(x.grad, torch.ones_like(x))


@kinds
def test_pictures_of_a_pattern_are_those_of_its_weights(kind: dict[str, Any]) -> None:
    with torch.no_grad():
        states = [layer(reuse=reuse, **kind).double().lsp(features()[:1]) for reuse in ("pattern", "weights")]
        other = layer(reuse="pattern", seed=5, **kind).double().lsp(features(1)[:1])
    tokens = torch.arange(30)
    maps = [attention_map_of(state, tokens) for state in states]
    assert_values_close(maps[0], maps[1])
    assert_values_close(maps[0].flatten(1).sum(dim=1), torch.ones(30, dtype=torch.float64))
    overlaps = [attention_overlap([state, other], num_tokens=30) for state in states]
    torch.testing.assert_close(overlaps[0], overlaps[1])
    assert overlaps[0][0, 1] < 0.99


def test_a_network_passes_both_on() -> None:
    x = features(dtype=torch.float32)
    options: dict[str, Any] = {"num_feat": 8, "num_group": 3, "num_block": 1, "chunk_size": 7, "share": 2}
    held = []
    for change in ({}, {"reuse": "pattern"}, {"weights_dtype": "bfloat16"}):
        patterns = [module for module in LCoAN(**options, **change).modules() if isinstance(module, LSP)]
        assert len(patterns) == 2
        states = [pattern(x) for pattern in patterns]
        held.append({None if state.weights is None else state.weights.dtype for state in states})
    assert held == [{torch.float32}, {None}, {torch.bfloat16}]
