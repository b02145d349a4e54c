"""Stand-ins compute the published functions: by the slow twins in float64, at sizes where counting keys matters."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.speed import standins
from sparse_sr_attn import ELAN, GMSA, LFE, NLA, NLSA, LCoA, ShiftConv2d
from sparse_sr_attn.reference import cluster, dense, kmeans, lsh, shift, window
from sparse_sr_attn.testing.tolerances import assert_values_close

C = 10


def features(height: int, width: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, C, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def rows(conv: Any, x: Tensor) -> Tensor:
    return conv(x).flatten(2).mT


def unit(tensor: Tensor) -> Tensor:
    return normalize(tensor, dim=-1, eps=5e-5)


def as_map(attended: Tensor, x: Tensor) -> Tensor:
    return attended.mT.reshape(x.shape)


# One chunk, two chunks (a neighbour twice), several, a full last chunk, and one whose filling repeats tokens.
SIZES = [(2, 3), (3, 4), (5, 6), (6, 6), (5, 7)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_lcoa_counts_keys_as_published(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = LCoA(C, num_clusters=4, chunk_size=6, reduction=2, res_scale=0.5, count_keys_once=False).double().eval()
    plain = standins.PlainLCoA(layer).double().eval()
    x = features(*size)
    query = rows(layer.lsp.embed, x)
    pattern = cluster.cluster_pattern(kmeans.assign(query, layer.lsp.centroids), chunk_size=6, count_keys_once=False)
    attended = cluster.cluster_attention(query, unit(query), rows(layer.coa.value, x), pattern)
    assert_values_close(plain(x), x + 0.5 * as_map(attended, x))
    y = features(*size).flip(-1)
    gathered = cluster.cluster_attention(query, unit(query), rows(layer.coa.value, y), pattern)
    assert_values_close(plain(y, plain.attend(x)), y + 0.5 * as_map(gathered, y))


def test_lcoa_in_training_computes_the_same_and_moves_nothing() -> None:
    plain = standins.PlainLCoA(LCoA(C, num_clusters=4, chunk_size=6)).double()
    x = features(5, 6)
    before = plain.centroids.clone()
    expected = plain.eval()(x)
    assert_values_close(plain.train()(x), expected)
    assert torch.equal(plain.centroids, before)


@pytest.mark.parametrize("size", SIZES[1:], ids=str)  # the released code has no bucket for less than a chunk
def test_nlsa_with_given_rotations(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = NLSA(C, chunk_size=6, num_rounds=3, max_buckets=4, reduction=2, res_scale=0.5).double()
    plain = standins.PlainNLSA(layer, redraw=False).double()
    x = features(*size)
    query = rows(layer.embed, x)
    num_buckets = lsh.bucket_count(query.shape[1], 6, 4)
    assignment = lsh.hash_tokens(query, layer.rotations, num_buckets).flatten(0, 1)
    pattern = cluster.cluster_pattern(assignment, chunk_size=6, count_keys_once=False)
    attended = cluster.cluster_attention_rounds(query, unit(query), rows(layer.value, x), pattern, 3)
    assert_values_close(plain(x), x + 0.5 * as_map(attended, x))


def test_nlsa_draws_new_hashes_in_every_forward() -> None:
    plain = standins.PlainNLSA(NLSA(C, chunk_size=6, num_rounds=1)).double().eval()
    x = features(5, 6)
    assert not torch.equal(plain(x), plain(x))


def test_dense_attention() -> None:
    layer = NLA(C, reduction=2, res_scale=0.5).double()
    x = features(4, 5)
    query = rows(layer.embed, x)
    attended = dense.dense_attention(query, unit(query), rows(layer.value, x))
    assert_values_close(standins.DenseSDPA(layer).double()(x), x + 0.5 * as_map(attended, x))


def uneven_statistics(module: torch.nn.Module) -> None:
    for norm in module.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            for name in ("weight", "bias", "running_mean", "running_var"):
                torch.nn.init.uniform_(getattr(norm, name), 0.5, 1.5)


@pytest.mark.parametrize("shift_windows", [False, True])
def test_gmsa(shift_windows: bool) -> None:
    torch.manual_seed(0)
    layer = GMSA(C, window_sizes=(2, 4, 8), shift=shift_windows, res_scale=0.5).double().eval()
    uneven_statistics(layer)
    consumer = layer.make_consumer().double().eval()
    uneven_statistics(consumer)
    plain = standins.PlainGMSA(layer).double().eval()
    reader = standins.PlainSharedGMSA(consumer, layer.window_sizes, shift_windows).double().eval()
    x, y = features(8, 16), features(8, 16).flip(-1)

    def expected(conv_norm: Any, source: Tensor, output: Any) -> Tensor:
        query = layer.query.norm(layer.query.conv(x)).split([4, 3, 3], dim=1)
        value = conv_norm.norm(conv_norm.conv(source)).split([4, 3, 3], dim=1)
        groups = [
            window.window_attention(q, q, v, window_size=size, shift=shift_windows * (size // 2))
            for q, v, size in zip(query, value, (2, 4, 8), strict=True)
        ]
        return source + 0.5 * output(torch.cat(groups, dim=1))

    assert_values_close(plain(x), expected(layer.shared.value, x, layer.shared.output))
    assert_values_close(reader(y, plain.attend(x)), expected(consumer.value, y, consumer.output))


def test_shift_convolutions() -> None:
    layer = ShiftConv2d(C, 7).double()
    x = features(5, 6)
    assert_values_close(standins.PlainShiftConv2d(layer).double()(x), shift.shift_conv2d(x, layer.weight, layer.bias))
    lfe = LFE(C).double()
    inner = torch.relu(shift.shift_conv2d(x, lfe.conv1.weight, lfe.conv1.bias))
    expected = shift.shift_conv2d(inner, lfe.conv2.weight, lfe.conv2.bias)
    assert_values_close(standins.PlainLFE(lfe).double()(x), expected)


def test_elan_is_ours() -> None:
    """Ours is held to the released network by golden tensors elsewhere."""
    torch.manual_seed(0)
    network = ELAN(num_feat=10, num_block=2, share=2, window_sizes=(2, 4), upscale=3, img_range=1.0).double().eval()
    uneven_statistics(network)
    plain = standins.PlainELAN(network).double().eval()
    image = torch.rand(2, 3, 9, 10, dtype=torch.float64)
    torch.testing.assert_close(plain(image), network(image), rtol=1e-9, atol=1e-9)


def test_weights_are_copied() -> None:
    layer = NLA(C)
    plain = standins.DenseSDPA(layer)
    torch.nn.init.zeros_(plain.value.weight)
    assert layer.value.weight.any()
