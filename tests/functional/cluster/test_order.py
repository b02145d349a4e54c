"""The order of clusters: a path through similar centroids, the same in every backend and on every device."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tolerances import assert_bit_equal
from torch import Tensor
from torch.nn import functional as F

from sparse_sr_attn import LSP
from sparse_sr_attn.functional.backend import HAS_TRITON
from sparse_sr_attn.functional.cluster.order import chain_rank, order_clusters


def centroids_of(num_clusters: int, dim: int, seed: int, device: torch.device) -> Tensor:
    numbers = torch.randn(num_clusters, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(numbers, dim=-1).to(device)


def walked(centroids: Tensor) -> list[int]:
    """The path by loops: clusters in the order in which they are met."""
    path, left = [0], set(range(1, len(centroids)))
    while left:
        similar = {k: round(float(centroids[path[-1]] @ centroids[k]) * 2**24) for k in left}
        path.append(min(left, key=lambda k: (-similar[k], k)))
        left.remove(path[-1])
    return path


@given(num_clusters=st.integers(1, 30), dim=st.integers(1, 5), seed=st.integers(0, 99))
@example(num_clusters=9, dim=1, seed=0)  # many ties
def test_a_path_to_the_most_similar_cluster_left(device: torch.device, num_clusters: int, dim: int, seed: int) -> None:
    centroids = centroids_of(num_clusters, dim, seed, device)
    rank = chain_rank(centroids)
    assert rank.argsort().tolist() == walked(centroids.cpu())
    assert_bit_equal(rank, chain_rank(centroids))


@pytest.mark.parametrize("routing", ["kmeans", "lsh"])
def test_lengths_do_not_matter(device: torch.device, routing: str) -> None:
    """Directions of a hash, and averages of centroids, are no unit vectors."""
    layer = LSP(8, num_clusters=40, routing=routing, seed=1).to(device)
    lengths = torch.linspace(0.1, 9, 40, device=device)[:, None]
    rank = chain_rank(layer.centroids)
    assert rank.sort().values.tolist() == list(range(40))
    assert_bit_equal(chain_rank(layer.centroids * lengths), rank)
    before = layer.rank.clone()
    layer.order_clusters()
    assert_bit_equal(layer.rank, before)


def test_neighbours_are_more_similar_than_by_index(device: torch.device) -> None:
    centroids = centroids_of(128, 16, 0, device)
    ordered = centroids[chain_rank(centroids).argsort()]
    by_chain, by_index = ((c[1:] * c[:-1]).sum(dim=-1).mean().item() for c in (ordered, centroids))
    assert by_chain > by_index + 0.3


def test_the_order_follows_the_centroids_after_some_updates(device: torch.device) -> None:
    centroids = centroids_of(7, 3, 1, device)
    wanted, other = chain_rank(centroids), torch.arange(7, device=device)
    assert not torch.equal(wanted, other)
    for updates in range(70):
        rank = other.clone()
        order_clusters(centroids, torch.tensor(updates, device=device), rank)
        assert_bit_equal(rank, wanted if updates in (0, 1, 2, 4, 8, 16, 32, 48, 64) else other)


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
@pytest.mark.unhooked
@settings(max_examples=10)
@given(num_clusters=st.integers(1, 20), dim=st.integers(1, 4), seed=st.integers(0, 99))
@example(num_clusters=9, dim=1, seed=0)
def test_the_kernel_walks_the_same_path(device: torch.device, num_clusters: int, dim: int, seed: int) -> None:
    from sparse_sr_attn.functional.cluster import order as cluster_order
    from sparse_sr_attn.functional.cluster.triton import chain_op

    centroids = centroids_of(num_clusters, dim, seed, device)
    similarity = cluster_order._similarity(centroids).int()
    for updates, moves in ((4, True), (5, False), (48, True)):
        rank = torch.full((num_clusters,), -1, device=device)
        chain_op(similarity, torch.tensor(updates, device=device), rank, 16)
        assert_bit_equal(rank, chain_rank(centroids) if moves else torch.full_like(rank, -1))


def test_a_layer_follows_its_centroids_in_training_only(device: torch.device) -> None:
    """Each round has an order of its own; evaluation reads it, and a fresh layer has that of its first centroids."""
    layer = LSP(8, num_clusters=12, chunk_size=4, num_rounds=2, ema_decay=0.0, reseed_threshold=0).to(device)
    rounds = [layer, layer.further_rounds[0]]
    for module in rounds:
        assert_bit_equal(module.rank, chain_rank(module.centroids))
    before = [module.rank.clone() for module in rounds]
    x = torch.randn(2, 8, 9, 9, generator=torch.Generator().manual_seed(0)).to(device)
    layer.eval()(x)
    for module, rank in zip(rounds, before, strict=True):
        assert_bit_equal(module.rank, rank)
    for _ in range(3):
        layer.train()(x)
    for module in rounds:
        assert int(module.num_updates) == 2
        assert_bit_equal(module.rank, chain_rank(module.centroids))
    assert any(not torch.equal(module.rank, rank) for module, rank in zip(rounds, before, strict=True))
    embedding, pattern = layer.eval().route(x)
    for turn, module in enumerate(rounds):
        places = module.rank[pattern.assignment.unflatten(0, (2, 2))[:, turn]]
        order = pattern.order.unflatten(0, (2, 2))[:, turn]
        assert (places.gather(1, order).diff(dim=1) >= 0).all()
    assert embedding.shape == (2, 81, 2)
