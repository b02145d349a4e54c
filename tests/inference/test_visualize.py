"""Colours of clusters: similar for similar centroids."""

import colorsys

import pytest
import torch

from sparse_sr_attn import CoA, LCoA
from sparse_sr_attn.errors import ShapeError
from sparse_sr_attn.inference.visualize import cluster_picture, similarity_palette


@pytest.mark.parametrize("has_centroids", [True, False])
def test_each_cluster_has_one_colour(has_centroids: bool) -> None:
    torch.manual_seed(0)
    layer = LCoA(8, num_clusters=12, chunk_size=16)
    state = layer.attend(torch.randn(1, 8, 3, 4))
    picture = cluster_picture(layer if has_centroids else CoA(8), state)
    assert picture.shape == (3, 4, 3)
    clusters = state.pattern.assignment[0].tolist()
    assert max(clusters) < 11  # the last is empty, and has a colour nevertheless
    pairs = set(zip(clusters, map(tuple, picture.flatten(0, 1).tolist()), strict=True))
    assert len(pairs) == len(set(clusters)) == len({colour for _, colour in pairs})


def test_kin_get_alike_colours() -> None:
    """Two bundles of directions: colours differ less within a bundle than between the two."""
    generator = torch.Generator().manual_seed(0)
    poles = torch.eye(8)[[0, 3]].repeat_interleave(6, 0)
    centroids = torch.nn.functional.normalize(poles + 0.05 * torch.randn(12, 8, generator=generator), dim=1)
    hues = torch.tensor([colorsys.rgb_to_hsv(*(colour / 255).tolist())[0] for colour in similarity_palette(centroids)])
    apart = (hues[:, None] - hues).abs()
    apart = torch.minimum(apart, 1 - apart)
    assert apart[:6, 6:].mean() > 2 * apart[:6, :6].mean()
    assert len(similarity_palette(centroids).unique(dim=0)) == 12
    assert torch.equal(similarity_palette(centroids.requires_grad_()), similarity_palette(centroids.double()))


def test_counts_spread_the_colours_over_the_picture() -> None:
    """Clusters that are not in the picture use up no colours; those that fill it are told apart best."""
    centroids = torch.nn.functional.normalize(torch.randn(40, 6, generator=torch.Generator().manual_seed(3)), dim=1)
    counts = torch.tensor([100, 100, 100, 100] + [0] * 36)
    weighted, plain = similarity_palette(centroids, counts)[:4].double(), similarity_palette(centroids)[:4].double()
    assert torch.pdist(weighted).min() > torch.pdist(plain).min()
    assert torch.equal(similarity_palette(centroids, torch.full((40,), 7)), similarity_palette(centroids))
    with pytest.raises(ShapeError, match=r"one number for each of 40 rows, got shape \(4,\)"):
        similarity_palette(centroids, counts[:4])
    for wrong in (torch.zeros(40, dtype=torch.int64), -counts):
        with pytest.raises(ValueError, match=r"counts must be >= 0 and not all 0, got \["):
            similarity_palette(centroids, wrong)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (2, 1), (3, 2), (64, 16)])
def test_kinship_palette_takes_any_number_of_clusters(shape: tuple[int, int]) -> None:
    colours = similarity_palette(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    assert colours.shape == (shape[0], 3)
    assert colours.dtype == torch.uint8
    with pytest.raises(ShapeError, match=r"centroids must be \(k >= 1, d >= 1\), got shape \(4,\)"):
        similarity_palette(torch.ones(4))
