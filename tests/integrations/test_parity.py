"""BasicSR's EDSR and RCAN and ours: the same networks under the same names."""

from pathlib import Path
from typing import Any

import pytest
import torch
from basicsr.archs import edsr_arch, rcan_arch
from torch import nn

from sparse_sr_attn import load_model
from sparse_sr_attn_basicsr import SparseEDSR, SparseRCAN

COMMON = {"num_in_ch": 3, "num_out_ch": 3, "num_feat": 16, "res_scale": 0.5}
OPTIONS: dict[str, dict[str, Any]] = {
    "EDSR": {**COMMON, "num_block": 4},
    "RCAN": {**COMMON, "num_group": 4, "num_block": 2, "squeeze_factor": 5},
}
THEIRS = {"EDSR": edsr_arch.EDSR, "RCAN": rcan_arch.RCAN}
OURS = {"EDSR": SparseEDSR, "RCAN": SparseRCAN}
ATTENTION = {"type": "LCoA", "every": 2, "share": 2, "num_clusters": 4, "chunk_size": 16}

networks = pytest.mark.parametrize("name", OURS)
upscales = pytest.mark.parametrize("upscale", [2, 3, 4, 8])


def _theirs(name: str, **options: float) -> nn.Module:
    """A random network of BasicSR whose weights, biases included, are far from their initial ones."""
    torch.manual_seed(len(options))
    net = THEIRS[name](**OPTIONS[name], **options)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return net


@upscales
@networks
def test_weights_load_strictly_both_ways_and_images_are_equal(name: str, upscale: int) -> None:
    for img_range in (1.0, 255.0):
        theirs = _theirs(name, upscale=upscale, img_range=img_range)
        ours = OURS[name](**OPTIONS[name], upscale=upscale, img_range=img_range, attention=None)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        again = THEIRS[name](**OPTIONS[name], upscale=upscale, img_range=img_range)
        weights = {key: value for key, value in ours.state_dict().items() if key != "options"}
        again.load_state_dict(weights, strict=True)
        image = torch.rand(2, 3, 11, 9)
        with torch.no_grad():
            expected = theirs(image)
            torch.testing.assert_close(ours(image), expected, rtol=0, atol=1e-6)
            torch.testing.assert_close(again(image), expected, rtol=0, atol=0)


@upscales
@networks
def test_new_attention_leaves_the_image_of_a_trained_network_alone(name: str, upscale: int) -> None:
    theirs = _theirs(name, upscale=upscale)
    plain = OURS[name](**OPTIONS[name], upscale=upscale, attention=None)
    plain.load_state_dict(theirs.state_dict())
    attentive = OURS[name](**OPTIONS[name], upscale=upscale, attention=ATTENTION)
    keys = attentive.load_state_dict(theirs.state_dict(), strict=False)
    assert keys.unexpected_keys == []
    assert keys.missing_keys
    assert all(key.startswith("attention.") for key in keys.missing_keys)
    image = torch.rand(1, 3, 8, 10)
    with torch.no_grad():
        assert torch.equal(attentive(image), plain(image))
        torch.testing.assert_close(attentive(image), theirs(image), rtol=0, atol=1e-6)


@networks
def test_defaults_are_basicsrs(name: str, tmp_path: Path) -> None:
    """The same option map builds the same network, so an option file needs a new `type` and nothing else."""
    torch.manual_seed(0)
    theirs = THEIRS[name](num_in_ch=3, num_out_ch=3)
    ours = OURS[name](num_in_ch=3, num_out_ch=3)
    torch.save(theirs.state_dict(), tmp_path / "net.pth")
    ours.load_state_dict(torch.load(tmp_path / "net.pth", weights_only=True), strict=True)
    image = torch.rand(1, 3, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(ours(image), theirs(image), rtol=0, atol=1e-6)


@upscales
@networks
def test_load_model_rebuilds_basicsrs_network(name: str, upscale: int, tmp_path: Path) -> None:
    """Shapes tell all but `res_scale` and `img_range`, whose defaults are BasicSR's."""
    theirs = _theirs(name, upscale=upscale)
    torch.save({"params": theirs.state_dict()}, tmp_path / "net.pth")
    image = torch.rand(1, 3, 7, 9)
    with torch.no_grad():
        ours = load_model(tmp_path / "net.pth", res_scale=0.5)
        torch.testing.assert_close(ours(image), theirs(image), rtol=0, atol=1e-6)
