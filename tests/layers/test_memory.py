"""How much memory LCoA and GMSA take, in float32 feature maps: every allocation counts, and the machine does not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_sr_attn import GMSA, CoA, LCoA
from sparse_sr_attn.functional.cluster import tiles as cluster_tiles
from sparse_sr_attn.testing.memory import NewMemory, in_maps, new_memory

SCORES_PER_TILE = cluster_tiles._SCORES_PER_TILE  # before the tests of layers make it small

sides = pytest.mark.parametrize("side", [128, 256])


@pytest.fixture(autouse=True)
def _as_shipped(_strict: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_tiles, "_SCORES_PER_TILE", SCORES_PER_TILE)
    torch.use_deterministic_algorithms(False)


def picture(side: int) -> Tensor:
    return torch.randn(1, 64, side, side, generator=torch.Generator().manual_seed(0))


def layer(**options: Any) -> LCoA:
    torch.manual_seed(0)
    return LCoA(64, **options).eval()


def weights_of(x: Tensor) -> int:
    """Bytes of the weights of a map: of each slot of as many chunks of 144 as it takes, over three chunks."""
    return 4 * 144 * -(-x[0, 0].numel() // 144) * 3 * 144


def map_of(x: Tensor) -> int:
    """Bytes of a feature map."""
    return 4 * x.numel()


def memory_of(call: Callable[[], object]) -> NewMemory:
    with torch.no_grad():
        return new_memory(call)


@pytest.mark.promise("R25")
@sides
def test_alone(side: int) -> None:
    x, lcoa = picture(side), layer()
    memory = memory_of(lambda: lcoa(x))
    assert 2 < in_maps(memory.peak, x) <= 3.5
    assert memory.kept == map_of(x)
    assert memory.largest <= 1.01 * map_of(x)  # a map with the slots past its last token


@sides
def test_forward_and_backward(side: int) -> None:
    x, lcoa, probe = picture(side).requires_grad_(), layer(), torch.ones(1, 64, side, side)
    memory = new_memory(lambda: lcoa(x).backward(probe))
    assert 4 < in_maps(memory.peak, x) <= 8
    assert memory.largest < 1.1 * map_of(x)  # and those around the ring


@sides
def test_several_rounds_alone_store_no_weights(side: int) -> None:
    x, lcoa = picture(side), layer(num_rounds=3)
    memory = memory_of(lambda: lcoa(x))
    assert memory.largest <= 3.1 * map_of(x)  # the values of three rounds; their weights would be 20 maps
    assert in_maps(memory.peak, x) <= 13.5


@sides
def test_sharing_keeps_the_weights_and_no_more(side: int) -> None:
    x, lcoa, later = picture(side), layer(reuse="weights"), CoA(64)
    memory = memory_of(lambda: lcoa.attend(x))
    assert memory.largest == weights_of(x)
    assert memory.peak <= weights_of(x) + map_of(x)
    with torch.no_grad():
        state = lcoa.attend(x)
    memory = memory_of(lambda: later(x, state))
    assert in_maps(memory.peak, x) <= 3.5
    assert memory.kept == map_of(x)


@sides
def test_bfloat16_weights_take_half(side: int) -> None:
    x, lcoa, later = picture(side), layer(reuse="weights", weights_dtype="bfloat16"), CoA(64)
    memory = memory_of(lambda: lcoa.attend(x))
    assert memory.largest == weights_of(x) / 2
    assert memory.peak <= weights_of(x) / 2 + map_of(x)
    with torch.no_grad():
        state = lcoa.attend(x)
    memory = memory_of(lambda: later(x, state))
    assert in_maps(memory.peak, x) <= 4.1  # values and what they are gathered to are there in both precisions
    assert memory.largest <= 1.01 * map_of(x)


@sides
def test_a_pattern_keeps_a_quarter_of_a_map(side: int) -> None:
    """The embedding, which has a quarter of the channels, and who is where: two numbers a token of 8 bytes."""
    x, lcoa, later = picture(side), layer(reuse="pattern"), CoA(64)
    memory = memory_of(lambda: lcoa.attend(x))
    assert in_maps(memory.kept, x) <= 0.25 + 4 / 64 + 0.01
    assert in_maps(memory.peak, x) <= 2
    with torch.no_grad():
        state = lcoa.attend(x)
    memory = memory_of(lambda: later(x, state))
    assert in_maps(memory.peak, x) <= 3.5
    assert memory.largest <= 1.01 * map_of(x)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_gmsa_holds_queries_values_and_the_result(memory_format: torch.memory_format) -> None:
    """And the windows of one group; neither a copy of the map nor queries are left when the sum is made."""
    torch.manual_seed(0)
    gmsa, x = GMSA(60).eval(), picture(256)[:, :60].contiguous(memory_format=memory_format)
    memory = memory_of(lambda: gmsa(x))
    assert 4 < in_maps(memory.peak, x) <= 4.1
    assert memory.kept == map_of(x)
