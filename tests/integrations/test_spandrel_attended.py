"""spandrel loads its own networks with attached attention, and fails on them without this library."""

import copy
import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from basicsr.archs.rrdbnet_arch import RRDBNet
from spandrel import MAIN_REGISTRY, ArchRegistry
from torch import Tensor, nn

from sparse_sr_attn import CheckpointError, attach, detach
from sparse_sr_attn.backbones.attach import is_record
from sparse_sr_attn.backbones.base import encode_options
from sparse_sr_attn_spandrel import install


@dataclass
class Host:
    """A small network of spandrel.

    Attributes:
        architecture: the name of its module in spandrel, or in spandrel_extra_arches.
        options: options of its class, of which spandrel must be able to guess all from the weights.
        network: the name of its class.
        shape: channels, height and width of an image that it takes.
        extra: whether it is in spandrel_extra_arches.
        body: where attention goes, unless `attach` finds it.
    """

    architecture: str
    options: dict[str, Any]
    network: str | None = None
    shape: tuple[int, int, int] = (3, 16, 24)
    extra: bool = False
    body: str | None = None

    def __call__(self) -> nn.Module:
        """Build it."""
        package = "spandrel_extra_arches" if self.extra else "spandrel"
        module = importlib.import_module(f"{package}.architectures.{self.architecture}")
        return getattr(module, self.network or self.architecture)(**self.options)


SWIN: dict[str, Any] = {"embed_dim": 12, "depths": [2, 2], "num_heads": [2, 2], "window_size": 8, "upscale": 2}
LIGHT = {**SWIN, "upsampler": "pixelshuffledirect"}
UNET = {"width": 8, "middle_blk_num": 2, "enc_blk_nums": [1, 1], "dec_blk_nums": [1, 1]}
QUICK: dict[str, Callable[[], nn.Module]] = {
    "ESRGAN, new layout": lambda: RRDBNet(3, 3, num_feat=8, num_block=4),
    "ESRGAN, old layout": Host("ESRGAN", {"num_filters": 8, "num_blocks": 4}),
    "Compact": Host("Compact", {"num_feat": 8, "num_conv": 4}),
    "HAT": Host("HAT", {**SWIN, "embed_dim": 24, "squeeze_factor": 6, "compress_ratio": 3}),
    "MoSR": Host("MoSR", {"dim": 16, "n_block": 4}),
    "OmniSR": Host("OmniSR", {"num_feat": 16, "res_num": 4}),
    "PLKSR": Host("PLKSR", {"dim": 16, "n_blocks": 4}),
    "SPAN": Host("SPAN", {"num_in_ch": 3, "num_out_ch": 3, "feature_channels": 16}),
    "SwinIR": Host("SwinIR", LIGHT),
}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "ATD": Host("ATD", {**LIGHT, "category_size": 256, "num_tokens": 8}),
    "AuraSR": Host(
        "AuraSR",
        {"dim": 8, "image_size": 256, "input_image_size": 64, "skip_connect_scale": 0.4}
        | {"style_network": {"dim_in": 16, "dim_out": 64, "depth": 2}},
        shape=(3, 64, 64),
    ),
    "CRAFT": Host("CRAFT", {"embed_dim": 24, "depths": [2, 2], "num_heads": [6, 6]}),
    "DAT": Host("DAT", {"embed_dim": 24, "depth": [2, 2], "num_heads": [2, 2], "split_size": [2, 4]}),
    "DCTLSA": Host("DCTLSA", {"nf": 20}),
    "DITN": Host("DITN", {"dim": 12, "ITL_blocks": 2, "SAL_blocks": 2}),
    "DRCT": Host("DRCT", {**SWIN, "gc": 8, "upsampler": "pixelshuffle"}),
    "DRUNet": Host("DRUNet", {"in_nc": 4, "out_nc": 3, "nc": [8, 16, 16, 16], "nb": 2}, shape=(4, 16, 24)),
    "DnCNN": Host("DnCNN", {"in_nc": 3, "out_nc": 3, "nc": 8, "nb": 9}),
    "FDnCNN": Host(
        "DnCNN", {"in_nc": 4, "out_nc": 3, "nc": 8, "nb": 9, "act_mode": "R", "mode": "FDnCNN"}, None, (4, 16, 24)
    ),
    "ESRGAN, pixel-unshuffle": Host(
        "ESRGAN", {"in_nc": 12, "num_filters": 8, "num_blocks": 4, "scale": 2, "shuffle_factor": 2}
    ),
    "ESRGAN+": Host("ESRGAN", {"num_filters": 8, "num_blocks": 4, "plus": True}),
    "FBCNN": Host("FBCNN", {"nc": [8, 8, 8, 512], "nb": 2}),
    "FDAT": Host("FDAT", {"embed_dim": 16, "num_groups": 2, "num_heads": 2}),
    "FFTformer": Host("FFTformer", {"dim": 8, "num_blocks": [1, 1, 2], "num_refinement_blocks": 2}, shape=(3, 32, 32)),
    "GRL": Host(
        "GRL",
        {"embed_dim": 16, "depths": [2, 2], "num_heads_window": [2, 2], "num_heads_stripe": [2, 2]}
        | {"stripe_shift": True, "anchor_window_down_factor": 4},
        shape=(3, 16, 16),
    ),
    "HVICIDNet": Host("HVICIDNet", {"channels": [8, 8, 16, 32]}),
    "IPT": Host("IPT", {"n_feats": 8, "num_layers": 2, "scale": [2]}, shape=(3, 48, 48)),
    "KBNet": Host("KBNet", UNET, "KBNet_s", (3, 32, 32)),
    "MMRealSR": Host(
        "MMRealSR", {"num_in_ch": 3, "num_out_ch": 3, "num_feat": 8, "num_block": 4, "num_grow_ch": 4}, body="body"
    ),
    "MixDehazeNet": Host("MixDehazeNet", {"embed_dims": [8, 16, 32, 16, 8]}, shape=(3, 64, 64)),
    "MoESR": Host("MoESR", {"dim": 16, "n_blocks": 4, "n_block": 2}),
    "NAFNet": Host("NAFNet", UNET),
    "RCAN": Host("RCAN", {"n_resgroups": 4, "n_resblocks": 2, "n_feats": 16, "reduction": 4, "scale": 2}),
    "RGT": Host("RGT", {"embed_dim": 24, "depth": [2, 2], "num_heads": [2, 2]}),
    "RealCUGAN x2": Host("RealCUGAN", {}, "UpCunet2x", (3, 48, 48)),
    "RealCUGAN x3": Host("RealCUGAN", {}, "UpCunet3x", (3, 48, 48)),
    "RealCUGAN x4": Host("RealCUGAN", {}, "UpCunet4x", (3, 48, 48)),
    "RealPLKSR": Host("PLKSR", {"dim": 16, "n_blocks": 4}, "RealPLKSR"),
    "RetinexFormer": Host("RetinexFormer", {"n_feat": 8, "stage": 2}),
    "SAFMN": Host("SAFMN", {"dim": 16}),
    "SAFMNBCIE": Host("SAFMNBCIE", {"dim": 16}, shape=(3, 32, 32)),
    "SCUNet": Host("SCUNet", {"dim": 64, "config": [1] * 7}, shape=(3, 64, 64)),
    "SeemoRe": Host("SeemoRe", {"embedding_dim": 16, "num_layers": 4, "num_experts": 3}),
    "SwiftSRGAN": Host("SwiftSRGAN", {"num_channels": 8, "num_blocks": 4}),
    "Swin2SR": Host("Swin2SR", LIGHT),
    "SwinIR, nearest": Host("SwinIR", {**SWIN, "upscale": 4, "upsampler": "nearest+conv"}),
    "Uformer": Host("Uformer", {"embed_dim": 8, "num_heads": [1, 2, 4, 8, 8, 8, 4, 2, 1]}, shape=(3, 128, 128)),
    "AdaCode": Host("AdaCode", {}, shape=(3, 64, 64), extra=True),
    "FeMaSR": Host("FeMaSR", {"codebook_params": [[32, 64, 16]]}, shape=(3, 64, 64), extra=True),
    "M3SNet": Host(
        "M3SNet", {"width": 8, "enc_blk_nums": [1, 1, 1, 2], "dec_blk_nums": [1] * 4}, shape=(3, 32, 32), extra=True
    ),
    "MIRNet2": Host("MIRNet2", {"n_feat": 16}, shape=(3, 32, 32), extra=True),
    "MPRNet": Host(
        "MPRNet",
        {"n_feat": 8, "scale_unetfeats": 4, "scale_orsnetfeats": 4, "num_cab": 2},
        shape=(3, 32, 32),
        extra=True,
    ),
    "Restormer": Host("Restormer", {"dim": 8, "num_blocks": [1, 2, 2, 2]}, shape=(3, 32, 32), extra=True),
    "SRFormer": Host("SRFormer", LIGHT, extra=True),
}
HOSTS: dict[str, Callable[[], nn.Module]] = {**QUICK, **OTHERS}
NOT_TRIED = {"GFPGAN", "RestoreFormer", "LaMa"}  # two work on faces of 512 pixels only, one takes a mask besides
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.meshgrid"),
    pytest.mark.filterwarnings("ignore:attached to"),
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors"),  # of DAT, RGT and CRAFT
]
hosts = pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])


def attended(name: str) -> Any:
    torch.manual_seed(0)
    options: dict[str, Any] = {"every": 2, "share": 2} if name in QUICK else {}
    model = attach(HOSTS[name](), getattr(HOSTS[name], "body", None), **options, num_clusters=4, chunk_size=16).eval()
    for key, parameter in model.named_parameters():
        if "sparse_sr_attn" in key:
            nn.init.normal_(parameter, std=0.1)
    return model


def registry() -> ArchRegistry:
    own = known_to_spandrel()
    install(own)
    return own


def known_to_spandrel() -> ArchRegistry:
    own = MAIN_REGISTRY.copy()
    if importlib.util.find_spec("spandrel_extra_arches"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it imports
            extra = importlib.import_module("spandrel_extra_arches")
        own.add(*extra.EXTRA_REGISTRY, ignore_duplicates=True)
    return own


def called(model: nn.Module, name: str) -> Tensor:
    """Return the first output for an image; some models draw noise, and some change the image."""
    shape = getattr(HOSTS[name], "shape", (3, 16, 24))
    image = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    with torch.no_grad():
        output = model.eval()(image)
    return output if isinstance(output, Tensor) else output[0]


@functools.cache
def trained(name: str) -> tuple[dict[str, Tensor], Tensor]:
    """Return the weights of an attended host and its output, which is not that without attention."""
    if getattr(HOSTS[name], "extra", False):
        if importlib.util.find_spec("spandrel_extra_arches") is None:
            pytest.skip("needs spandrel_extra_arches")
        known_to_spandrel()  # imports it
    model = attended(name)
    state = copy.deepcopy(model.state_dict())  # some models fuse their weights when they are called
    output = called(model, name)
    assert not torch.allclose(called(detach(model), name), output)
    return state, output


@hosts
def test_an_attended_file_gives_the_attended_image(name: str) -> None:
    state, output = trained(name)
    nested = {f"module.{key}": value for key, value in state.items()}
    for weights in (state, nested) if name in QUICK else (state,):
        found = registry().load({"params": copy.deepcopy(weights)})
        assert found.architecture.id == "sparse_sr_attn.Attended"
        assert "LCoA" in found.tags
        torch.testing.assert_close(called(found.model, name), output, rtol=1e-5, atol=1e-5)


@hosts
def test_without_this_library_spandrel_fails_and_names_it(name: str) -> None:
    state, _ = trained(name)
    with pytest.raises(Exception, match="sparse_sr_attn"):
        known_to_spandrel().load(copy.deepcopy(state))


def test_every_architecture_of_spandrel_is_tried() -> None:
    ours = {host.architecture for host in HOSTS.values() if isinstance(host, Host) and not host.extra}
    known = {support.architecture.id for support in MAIN_REGISTRY if "sparse_sr_attn" not in support.architecture.id}
    assert known - NOT_TRIED == ours


def test_a_network_that_takes_a_mask_is_refused() -> None:
    image, mask = torch.rand(1, 3, 16, 16), torch.zeros(1, 1, 16, 16)
    model = attach(Host("LaMa", {"in_nc": 4})(), example=(image, mask), num_clusters=4, chunk_size=16)
    with pytest.raises(CheckpointError, match="must be of a network that takes one image"):
        registry().load(model.state_dict())


def test_a_network_that_spandrel_does_not_know_is_named() -> None:
    body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1))
    model = attach(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), body, nn.Conv2d(8, 3, 3, padding=1)), "1", every=1)
    with pytest.raises(
        CheckpointError, match=r"a network that spandrel does not know \(.*Sequential\); .*model=\.\.\."
    ):
        registry().load(model.state_dict())


def test_a_broken_record_is_an_error() -> None:
    state = attended("Compact").state_dict()
    (key,) = filter(is_record, state)
    with pytest.raises(CheckpointError, match="must hold a record of attention"):
        registry().load({**state, key: encode_options({"attention": None, "key": "x"})})
