"""Statistics of k-means in networks that are cast to low precision, or loaded in it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_sr_attn import CategoryAttention, LCoA
from sparse_sr_attn.functional.cluster.order import chain_rank
from sparse_sr_attn.functional.kmeans import KMeansState, cluster_sums
from sparse_sr_attn.layers.running_state import KMeansStatistics

STATISTICS = tuple(name for name in KMeansState._fields if not name.startswith("num_"))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def statistics(layer: torch.nn.Module) -> dict[str, Tensor]:
    return {name: b for name, b in layer.named_buffers() if name.rpartition(".")[2] in STATISTICS}


LAYERS: dict[str, Any] = {
    "LCoA": lambda: LCoA(8, num_clusters=2, chunk_size=16, reduction=4, num_rounds=2),
    "CategoryAttention": lambda: CategoryAttention(8, num_clusters=2, chunk_size=16, reduction=4),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("built", [False, True])
def test_clusters_of_more_tokens_than_float16_can_count(name: str, dtype: torch.dtype, built: bool) -> None:
    """Whether the layer was cast to the precision, or built in it."""
    torch.manual_seed(0)
    with default_dtype(dtype if built else torch.float32):
        layer = LAYERS[name]().train()
    layer = layer if built else layer.to(dtype)
    assert len(statistics(layer)) == (10 if name == "LCoA" else 5)
    x = torch.randn(1, 8, 1, 1).expand(1, 8, 300, 300).to(dtype)  # 90,000 tokens in one cluster
    for _ in range(3):
        with torch.no_grad():
            output = layer(x)
        assert output.isfinite().all()
    for path, value in statistics(layer).items():
        assert value.dtype == torch.float32, path
        assert value.isfinite().all(), path
    assert max(value.max() for path, value in statistics(layer).items() if path.endswith("counts")) == 90_000
    for path, value in layer.named_buffers():
        if path.endswith(("num_updates", "num_skipped")):
            assert value == (2 if path.endswith("updates") else 0), path


def test_casts_keep_the_numbers_of_statistics() -> None:
    layer = LAYERS["LCoA"]()
    layer(torch.randn(2, 8, 9, 9))
    before = {name: value.clone() for name, value in statistics(layer).items()}
    for cast in (layer.half, layer.bfloat16, layer.float):
        for name, value in statistics(cast()).items():
            assert torch.equal(value, before[name]), name
    for value in statistics(layer.double()).values():
        assert value.dtype == torch.float64


def test_the_default_dtype_raises_the_precision_of_statistics() -> None:
    with default_dtype(torch.float64):
        layer = LAYERS["LCoA"]()
    for name, value in statistics(layer).items():
        assert value.dtype == torch.float64, name


@pytest.mark.parametrize("assign", [False, True])
def test_loading_weights_in_float16_keeps_statistics_in_float32(assign: bool) -> None:
    layer = LAYERS["LCoA"]()
    layer(torch.randn(2, 8, 9, 9))
    low = {name: value.half() if value.is_floating_point() else value for name, value in layer.state_dict().items()}
    fresh = LAYERS["LCoA"]()
    fresh.load_state_dict(low, assign=assign)
    for name, value in statistics(fresh).items():
        assert value.dtype == torch.float32, name
        assert torch.equal(value, low[name].float()), name
    assert fresh.coa.value.weight.dtype == (torch.float16 if assign else torch.float32)


def test_an_average_of_orders_is_mended_when_it_is_loaded() -> None:
    """Tools that average buffers make the order of clusters none; the centroids tell it."""
    layer = LCoA(8, num_clusters=20, chunk_size=16, reduction=2, num_rounds=2).train()
    layer(torch.randn(2, 8, 9, 9))
    state = layer.state_dict()
    averaged = {key: value // 2 if key.endswith(".rank") else value for key, value in state.items()}
    fresh = LCoA(8, num_clusters=20, chunk_size=16, reduction=2, num_rounds=2)
    fresh.load_state_dict(averaged)
    for module in (fresh.lsp, fresh.lsp.further_rounds[0]):
        assert torch.equal(module.rank, chain_rank(module.centroids))
    swapped = state["lsp.rank"].flip(0)
    fresh.load_state_dict({**state, "lsp.rank": swapped})
    assert torch.equal(fresh.lsp.rank, swapped)  # an order stays as it is


def test_statistics_stay_on_the_device_that_a_module_is_moved_to() -> None:
    layer = LAYERS["LCoA"]().to("meta", torch.float16)
    assert all(value.is_meta and value.dtype == torch.float32 for value in statistics(layer).values())
    assert isinstance(layer.lsp.further_rounds[0], KMeansStatistics)


def test_counts_do_not_stop_at_the_largest_whole_number_of_float32() -> None:
    num_tokens = 2**24 + 3
    points = torch.ones(1, 1, 1).expand(1, num_tokens, 1)
    _, counts = cluster_sums(points, torch.zeros(1, 1, dtype=torch.int64).expand(1, num_tokens), 1)
    assert counts.item() >= 2**24 + 2  # float32 has even numbers only there


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_that_are_kept_in_float8(name: str, dtype: torch.dtype) -> None:
    """For storage, cast or loaded: statistics stay as they are, and all is float32 again afterwards."""
    layer = LAYERS[name]()
    layer(torch.randn(2, 8, 9, 9))
    before = {path: value.clone() for path, value in statistics(layer).items()}
    for path, value in statistics(layer.to(dtype)).items():
        assert torch.equal(value, before[path]), path
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
    fresh = LAYERS[name]()
    fresh.load_state_dict(layer.state_dict())
    assert fresh(torch.randn(2, 8, 9, 9)).isfinite().all()
