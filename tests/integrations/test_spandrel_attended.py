"""spandrel loads its own networks with attached attention, and fails on them without this library."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from basicsr.archs.rrdbnet_arch import RRDBNet
from spandrel import MAIN_REGISTRY, ArchRegistry
from spandrel.architectures.Compact import Compact
from spandrel.architectures.ESRGAN import ESRGAN
from spandrel.architectures.HAT import HAT
from spandrel.architectures.MoSR import MoSR
from spandrel.architectures.OmniSR import OmniSR
from spandrel.architectures.PLKSR import PLKSR
from spandrel.architectures.SPAN import SPAN
from spandrel.architectures.SwinIR import SwinIR
from torch import nn

from sparse_sr_attn import CheckpointError, attach
from sparse_sr_attn.backbones.attach import is_record
from sparse_sr_attn.backbones.base import encode_options
from sparse_sr_attn_spandrel import install

SWIN: dict[str, Any] = {"embed_dim": 12, "depths": [2, 2], "num_heads": [2, 2], "window_size": 8, "upscale": 2}
HOSTS: dict[str, Callable[[], nn.Module]] = {
    "ESRGAN, new layout": lambda: RRDBNet(3, 3, num_feat=8, num_block=4),
    "ESRGAN, old layout": lambda: ESRGAN(num_filters=8, num_blocks=4),
    "Compact": lambda: Compact(num_feat=8, num_conv=4),
    "HAT": lambda: HAT(**{**SWIN, "embed_dim": 24, "squeeze_factor": 6, "compress_ratio": 3}),
    "MoSR": lambda: MoSR(dim=16, n_block=4),
    "OmniSR": lambda: OmniSR(num_feat=16, res_num=4),
    "PLKSR": lambda: PLKSR(dim=16, n_blocks=4),
    "SPAN": lambda: SPAN(num_in_ch=3, num_out_ch=3, feature_channels=16),
    "SwinIR": lambda: SwinIR(**SWIN, upsampler="pixelshuffledirect"),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.meshgrid"),
    pytest.mark.filterwarnings("ignore:attached to"),
]
hosts = pytest.mark.parametrize("name", HOSTS)


def attended(name: str) -> Any:
    torch.manual_seed(0)
    model = attach(HOSTS[name](), every=2, share=2, num_clusters=4, chunk_size=16).eval()
    for key, parameter in model.named_parameters():
        if "sparse_sr_attn" in key:
            nn.init.normal_(parameter, std=0.1)
    return model


def registry() -> ArchRegistry:
    own = MAIN_REGISTRY.copy()
    install(own)
    return own


@hosts
def test_an_attended_file_gives_the_attended_image(name: str) -> None:
    model = attended(name)
    image = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    for state in (model.state_dict(), {f"module.{key}": value for key, value in model.state_dict().items()}):
        found = registry().load({"params": state})
        assert found.architecture.id == "sparse_sr_attn.Attended"
        assert "LCoA" in found.tags
        with torch.no_grad():
            torch.testing.assert_close(found.model.eval()(image), model(image), rtol=0, atol=1e-5)


@hosts
def test_without_this_library_spandrel_fails_and_names_it(name: str) -> None:
    with pytest.raises(Exception, match="sparse_sr_attn"):
        MAIN_REGISTRY.copy().load(attended(name).state_dict())


def test_a_network_that_spandrel_does_not_know_is_named() -> None:
    body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1))
    model = attach(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), body, nn.Conv2d(8, 3, 3, padding=1)), "1", every=1)
    with pytest.raises(CheckpointError, match=r"a network that spandrel does not know: .*Sequential"):
        registry().load(model.state_dict())


def test_a_broken_record_is_an_error() -> None:
    state = attended("Compact").state_dict()
    (key,) = filter(is_record, state)
    with pytest.raises(CheckpointError, match="must hold a record of attention"):
        registry().load({**state, key: encode_options({"attention": None, "key": "x"})})
