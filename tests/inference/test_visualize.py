"""Cluster maps: what the LSP itself assigns, and a model that is left as it was."""

import colorsys
import copy

import pytest
import torch
from torch import Tensor, nn

from sparse_sr_attn import EDSR, LCoA, LCoAN
from sparse_sr_attn.errors import ShapeError
from sparse_sr_attn.functional.kmeans import initial_state
from sparse_sr_attn.inference.visualize import cluster_map, colour_map, palette, similarity_palette
from sparse_sr_attn.layers.lcoa import LSP


def lcoan() -> nn.Module:
    torch.manual_seed(0)
    return LCoAN(num_feat=8, num_group=2, num_block=1, num_clusters=5, chunk_size=16)


def edsr() -> nn.Module:
    torch.manual_seed(0)
    attention = {"type": "LCoA", "every": 1, "share": 1, "num_clusters": 5, "chunk_size": 16}
    model = EDSR(num_feat=8, num_block=2, upscale=2, attention=attention)
    for seed, pattern in enumerate(module for module in model.modules() if isinstance(module, LSP)):
        pattern.centroids.copy_(initial_state(5, 2, seed).centroids)  # centroids start alike in all layers
    return model


def picture(height: int = 6, width: int = 9) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(1))


def first_pattern(model: nn.Module) -> LSP:
    return next(module for module in model.modules() if isinstance(module, LSP))


@pytest.mark.parametrize("build", [lcoan, edsr])
def test_is_what_the_first_lsp_assigns(build) -> None:
    model = build().eval()
    seen: list[Tensor] = []
    hook = first_pattern(model).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    embed = first_pattern(model).embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    clusters = cluster_map(model, picture())
    hook.remove()
    embed.remove()
    with torch.no_grad():
        expected = first_pattern(model).route(seen[0])[1].assignment
    assert clusters.dtype == torch.int64
    assert torch.equal(clusters, expected.view(6, 9))
    assert len(clusters.unique()) > 1


@pytest.mark.parametrize("build", [lcoan, edsr])
def test_leaves_the_model_as_it_was(build) -> None:
    model = build().train()
    model.conv_first.eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    cluster_map(model, picture())
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_leaves_the_model_as_it_was_when_its_forward_fails() -> None:
    model = lcoan().train()
    with pytest.raises(ShapeError):
        cluster_map(model, torch.rand(4, 6, 9))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_takes_one_image_with_and_without_a_batch_axis() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), LCoA(8, num_clusters=4))
    assert torch.equal(cluster_map(model, picture()), cluster_map(model, picture()[None]))
    for wrong in (torch.rand(2, 3, 6, 9), torch.rand(6, 9)):
        with pytest.raises(ShapeError, match=r"must be one image, \(c, h, w\) or \(1, c, h, w\), got shape"):
            cluster_map(model, wrong)


def test_a_model_without_an_lsp_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a network with an LSP.*but EDSR has none; build it with attention"):
        cluster_map(EDSR(num_feat=8, num_block=1, upscale=2), picture())


def test_an_lsp_that_is_never_reached_is_reported() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = LCoA(3)

        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(ValueError, match="Idle has an LSP, but its forward does not run it"):
        cluster_map(Idle(), picture())


def test_colours_are_those_of_the_hue_circle_and_all_different() -> None:
    colours = palette(128)
    assert colours.dtype == torch.uint8
    assert len(colours.unique(dim=0)) == 128
    for index in (0, 1, 5, 127):
        saturation, value = 0.85 - 0.2 * (index % 3), 1.0 - 0.2 * (index // 3 % 3)
        expected = colorsys.hsv_to_rgb(index * 0.6180339887498949 % 1, saturation, value)
        assert colours[index].tolist() == [round(255 * channel) for channel in expected]
    assert torch.equal(palette(3), colours[:3])
    with pytest.raises(ValueError, match="num_clusters must be >= 1, got 0"):
        palette(0)


def test_each_cluster_gets_its_colour() -> None:
    clusters = torch.tensor([[0, 2], [1, 2], [0, 0]])
    colours = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=torch.uint8)
    assert colour_map(clusters, colours).tolist() == [
        [[1, 2, 3], [7, 8, 9]],
        [[4, 5, 6], [7, 8, 9]],
        [[1, 2, 3], [1, 2, 3]],
    ]
    assert torch.equal(colour_map(clusters), palette(3)[clusters])
    with pytest.raises(ShapeError, match=r"\(k, 3\) with k >= 3 clusters, got shape \(2, 3\)"):
        colour_map(clusters, colours[:2])
    with pytest.raises(ShapeError, match=r"must be a map \(h, w\).*got shape \(3,\)"):
        colour_map(clusters[:, 0])


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
