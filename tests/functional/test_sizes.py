"""The whole layer against the slow twins, at each of the 289 sizes from 1x1 to 17x17 and at lopsided ones."""

import itertools
from dataclasses import replace

import pytest
import torch
from strategies import generator
from tolerances import assert_bit_equal, assert_values_close
from torch import Tensor
from torch.nn import functional as F

from sparse_sr_attn import LCoA
from sparse_sr_attn.reference import cluster, kmeans

pytestmark = pytest.mark.promise("R5")

CHANNELS = 4
LONGEST = 17


def layer_of(device: torch.device, **options: object) -> LCoA:
    layer = LCoA(CHANNELS, num_clusters=5, reduction=2, res_scale=0.7, seed=3, **options).double().to(device).eval()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator(0, name), dtype=torch.float64))
    return layer


def expected_of(layer: LCoA, x: Tensor) -> tuple[Tensor, Tensor]:
    """The formulae of the layer, written out: returns the output and the assignment."""
    batch, _, height, width = x.shape
    query = F.conv2d(x, layer.lsp.embed.weight, layer.lsp.embed.bias, padding=1).flatten(2).mT
    value = F.conv2d(x, layer.coa.value.weight, layer.coa.value.bias).flatten(2).mT
    key = query / query.norm(dim=-1, keepdim=True).clamp(min=5e-5)
    assignment = kmeans.assign(query, layer.lsp.centroids)
    if layer.lsp.similarity == "cosine":
        query = layer.lsp.scale_logits.logit_scale.exp() * key
    pattern = cluster.cluster_pattern(
        assignment,
        place=layer.lsp.rank[assignment] if layer.lsp.cluster_order == "chain" else None,
        chunk_size=layer.lsp.chunk_size,
        num_adjacent=layer.lsp.num_adjacent,
        count_keys_once=layer.lsp.count_keys_once,
    )
    if layer.lsp.neighbors == "nearest":
        pattern = replace(pattern, neighbors=cluster.nearest_chunks(key, pattern))
    attended = cluster.cluster_attention(query, key, value, pattern)
    return x + 0.7 * attended.mT.reshape(batch, CHANNELS, height, width), assignment


@pytest.mark.parametrize("num_adjacent", [0, 1, 4])
@pytest.mark.parametrize("chunk_size", [1, 3, 48])
def test_nearest_chunks(device: torch.device, chunk_size: int, num_adjacent: int) -> None:
    layer = layer_of(device, chunk_size=chunk_size, num_adjacent=num_adjacent, neighbors="nearest")
    for height, width in ((1, 1), (1, 5), (5, 6), (9, 7)):
        check(layer, device, height, width)


def check(layer: LCoA, device: torch.device, height: int, width: int) -> None:
    x = torch.randn(2, CHANNELS, height, width, generator=generator(height, str(width)), dtype=torch.float64).to(device)
    with torch.no_grad():
        expected, assignment = expected_of(layer, x)
        state = layer.attend(x)
        assert_bit_equal(state.pattern.assignment, assignment)
        assert (state.height, state.width) == (height, width)
        for output in (layer(x), layer(x, state)):
            assert output.shape == x.shape
            assert_values_close(output, expected)


@pytest.mark.parametrize(
    "count_keys_once", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["each key once", "as published"]
)
@pytest.mark.parametrize("heights", [range(1, 10), range(10, LONGEST + 1)], ids=["small", "large"])
def test_every_size(device: torch.device, heights: range, count_keys_once: bool) -> None:
    published = {} if count_keys_once else {"similarity": "dot", "cluster_order": "index"}
    layer = layer_of(device, chunk_size=7, count_keys_once=count_keys_once, **published)
    for height in heights:
        for width in range(1, LONGEST + 1):
            check(layer, device, height, width)


@pytest.mark.parametrize(("height", "width"), [(1, 257), (257, 1), (31, 33)])
def test_lopsided_sizes(device: torch.device, height: int, width: int) -> None:
    check(layer_of(device, chunk_size=16), device, height, width)


@pytest.mark.parametrize("num_adjacent", [0, 1, 2, 3])
def test_every_layout_at_one_size(device: torch.device, num_adjacent: int) -> None:
    for chunk_size, count_keys_once in itertools.product((1, 2, 5, 48), (True, False)):
        layer = layer_of(device, chunk_size=chunk_size, num_adjacent=num_adjacent, count_keys_once=count_keys_once)
        check(layer, device, 5, 6)
