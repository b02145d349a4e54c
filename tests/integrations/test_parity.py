"""BasicSR's EDSR and ours: the same network under the same names."""

from pathlib import Path

import pytest
import torch
from basicsr.archs import edsr_arch
from torch import nn

from sparse_sr_attn_basicsr import SparseEDSR

OPTIONS = {"num_in_ch": 3, "num_out_ch": 3, "num_feat": 16, "num_block": 4, "res_scale": 0.5}
ATTENTION = {"type": "LCoA", "every": 2, "share": 2, "num_clusters": 4, "chunk_size": 16}


def _theirs(upscale: int, **options: float) -> nn.Module:
    """A random EDSR of BasicSR whose weights, biases included, are far from their initial ones."""
    torch.manual_seed(upscale)
    net = edsr_arch.EDSR(**OPTIONS, upscale=upscale, **options)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return net


@pytest.mark.parametrize("img_range", [1.0, 255.0])
@pytest.mark.parametrize("upscale", [2, 3, 4, 8])
def test_weights_load_strictly_both_ways_and_images_are_equal(upscale: int, img_range: float) -> None:
    theirs = _theirs(upscale, img_range=img_range)
    ours = SparseEDSR(**OPTIONS, upscale=upscale, img_range=img_range, attention=None)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    again = edsr_arch.EDSR(**OPTIONS, upscale=upscale, img_range=img_range)
    again.load_state_dict(ours.state_dict(), strict=True)
    image = torch.rand(2, 3, 11, 9)
    with torch.no_grad():
        expected = theirs(image)
        torch.testing.assert_close(ours(image), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(again(image), expected, rtol=0, atol=0)


@pytest.mark.parametrize("upscale", [2, 3, 4, 8])
def test_new_attention_leaves_the_image_of_a_trained_edsr_alone(upscale: int) -> None:
    theirs = _theirs(upscale)
    plain = SparseEDSR(**OPTIONS, upscale=upscale, attention=None)
    plain.load_state_dict(theirs.state_dict())
    attentive = SparseEDSR(**OPTIONS, upscale=upscale, attention=ATTENTION)
    keys = attentive.load_state_dict(theirs.state_dict(), strict=False)
    assert keys.unexpected_keys == []
    assert keys.missing_keys
    assert all(key.startswith("attention.") for key in keys.missing_keys)
    image = torch.rand(1, 3, 8, 10)
    with torch.no_grad():
        assert torch.equal(attentive(image), plain(image))
        torch.testing.assert_close(attentive(image), theirs(image), rtol=0, atol=1e-6)


def test_defaults_are_basicsrs(tmp_path: Path) -> None:
    """The same option map builds the same network, so an option file needs a new `type` and nothing else."""
    torch.manual_seed(0)
    theirs = edsr_arch.EDSR(num_in_ch=3, num_out_ch=3)
    ours = SparseEDSR(num_in_ch=3, num_out_ch=3)
    torch.save(theirs.state_dict(), tmp_path / "net.pth")
    ours.load_state_dict(torch.load(tmp_path / "net.pth", weights_only=True), strict=True)
    image = torch.rand(1, 3, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(ours(image), theirs(image), rtol=0, atol=1e-6)
