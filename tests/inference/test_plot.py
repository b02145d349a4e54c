"""Figures show the image, the clusters, and one map for each state."""

import numpy as np
import pytest
import torch

from sparse_sr_attn import EDSR, ELAN, load_model
from sparse_sr_attn.inference.plot import plot_attention
from sparse_sr_attn.inference.visualize import attention_map_of, attention_picture, attention_states


def test_maps_are_those_of_the_states() -> None:
    attention = {"type": "LCoA", "every": 1, "share": 2, "chunk_size": 16, "num_clusters": 4}
    model = EDSR(num_feat=8, num_block=4, upscale=2, img_range=1.0, attention=attention).eval()
    image = torch.rand(3, 12, 20, generator=torch.Generator().manual_seed(0))
    axes = plot_attention(model, image, pixel=(3, 7)).axes
    assert [one.get_title().partition("\n")[0] for one in axes] == [
        "image",
        "clusters",
        "attention.0 and 1 more",
        "attention.2 and 1 more",
    ]
    for one in axes:
        assert [(float(x), float(y)) for x, y in one.lines[0].get_xydata()] == [(7, 3)]
    states = attention_states(model, image)
    for drawn, name in zip(axes[2:], ("attention.0", "attention.2"), strict=True):
        weights = attention_map_of(states[name], torch.tensor([3 * 20 + 7]))[0]
        expected = attention_picture(weights, 1, image, (3, 7)).numpy()
        assert np.array_equal(np.asarray(drawn.images[0].get_array()), expected)


@pytest.mark.parametrize("pixel", [(24, 0), (0, 32), (-1, 0)])
def test_pixels_outside_are_refused(pixel: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"pixel must lie in the image, 0\.\.23 and 0\.\.31, got"):
        plot_attention(load_model("LCoAN-light_x2"), torch.rand(3, 24, 32), pixel=pixel)


def test_layers_are_chosen_by_name() -> None:
    model, image = ELAN(num_feat=12, num_block=2, share=1, upscale=2).eval(), torch.rand(3, 16, 16)
    names = list(attention_states(model, image))
    drawn = plot_attention(model, image, layers=names[1:]).axes
    assert [axes.get_title().partition("\n")[0] for axes in drawn] == ["image", *names[1:]]
    with pytest.raises(ValueError, match=rf"layers must .* got head \(layers that do: {names[0]}"):
        plot_attention(model, image, layers=["head"])
