"""spandrel loads our networks bit for bit, leaves those of others alone, and runs nothing that is in a file."""

import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from basicsr.archs.edsr_arch import EDSR as BASICSR_EDSR
from basicsr.archs.rcan_arch import RCAN as BASICSR_RCAN
from hostile import Payload
from safetensors.torch import save_file
from spandrel import (
    MAIN_REGISTRY,
    ImageModelDescriptor,
    ModelLoader,
    ModelTiling,
    UnsupportedDtypeError,
    UnsupportedModelError,
)
from spandrel.architectures.Compact import Compact
from spandrel.architectures.ESRGAN import ESRGAN
from spandrel.architectures.HAT import HAT
from spandrel.architectures.RCAN import RCAN as SPANDREL_RCAN
from spandrel.architectures.SwinIR import SwinIR
from torch import Tensor, nn

from sparse_sr_attn import EDSR, ELAN, RCAN, CheckpointError, LCoAN
from sparse_sr_attn.backbones.base import Network, encode_options, options_of
from sparse_sr_attn_spandrel import ARCHITECTURES, install

LCOA = {"type": "LCoA", "num_clusters": 5, "chunk_size": 7, "every": 1}
pytestmark = pytest.mark.usefixtures("spandrel_registry")


def image(channels: int = 3, height: int = 9, width: int = 10) -> Tensor:
    return torch.rand(1, channels, height, width, generator=torch.Generator().manual_seed(0))


def ids() -> list[str]:
    return [support.architecture.id for support in MAIN_REGISTRY]


def shifted(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value + 1 for key, value in state.items()}


FORMS: dict[str, tuple[str, Callable[[dict[str, Tensor]], Any]]] = {
    "torch.save": ("net.pth", lambda state: state),
    "BasicSR, averaged": ("net_g_latest.pth", lambda state: {"params": shifted(state), "params_ema": state}),
    "BasicSR": ("net_g_latest.pth", lambda state: {"params": state}),
    "Lightning": ("net.ckpt", lambda state: {"epoch": 3, "state_dict": state}),
    "several GPUs": ("net.pth", lambda state: {f"module.{key}": value for key, value in state.items()}),
    "safetensors": ("net.safetensors", lambda state: state),
}
NAMES = {LCoAN: "LCoAN", ELAN: "ELAN", EDSR: "SparseEDSR", RCAN: "SparseRCAN"}


def test_a_file_of_ours_is_loaded_bit_for_bit(trained: Network, tmp_path: Path) -> None:
    install()
    for form, (name, nest) in FORMS.items():
        save = save_file if name.endswith(".safetensors") else torch.save
        save(nest(trained.state_dict()), tmp_path / name)
        found = ModelLoader().load_from_file(tmp_path / name)
        assert isinstance(found, ImageModelDescriptor), form
        assert found.architecture.name == NAMES[type(trained)]
        assert type(found.model) is type(trained)
        assert options_of(found.model) == options_of(trained)
        for key, value in found.model.state_dict().items():
            assert torch.equal(value, trained.state_dict()[key]), f"{form}: {key}"
        assert torch.equal(found(image()), trained(image()).clamp(0, 1))
        assert not found.model.training


def test_programs_are_told_what_a_network_is(trained: Network) -> None:
    """As ComfyUI loads it: from a state dict that it has read itself."""
    install()
    found = ModelLoader().load_from_state_dict(trained.state_dict()).eval()
    assert (found.purpose, found.scale) == ("SR", trained.upscale)
    assert (found.input_channels, found.output_channels) == (3, 3)
    assert found.tiling is ModelTiling.DISCOURAGED
    assert found.size_requirements.none
    for height, width in [(1, 1), (1, 17), (11, 5)]:
        output = found(image(3, height, width))
        assert output.shape == (1, 3, found.scale * height, found.scale * width)
        assert torch.equal(output, trained(image(3, height, width)).clamp(0, 1))


def test_channels_are_those_of_the_network() -> None:
    install()
    networks = {1: LCoAN(1, 1, num_feat=8, num_group=1), 4: EDSR(4, 1, num_feat=8, num_block=1, attention=LCOA)}
    for channels, network in networks.items():
        found = ModelLoader().load_from_state_dict(network.state_dict())
        assert (found.input_channels, found.output_channels) == (channels, 1)
        assert found(image(channels)).shape[1] == 1


def test_tags_are_sizes_and_layers() -> None:
    install()
    networks = {
        "8nf 3ng 1nb": LCoAN(num_feat=8, num_group=3, num_block=1),
        "8nf 2nb LCoA": EDSR(num_feat=8, num_block=2, attention=[LCOA, LCOA]),
        "10nf 2nb ELAB LCoA": EDSR(num_feat=10, num_block=2, block={"type": "ELAB"}, attention=LCOA),
    }
    for tags, network in networks.items():
        assert " ".join(ModelLoader().load_from_state_dict(network.state_dict()).tags) == tags


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, trained: Network) -> None:
    install()
    found = ModelLoader().load_from_state_dict(trained.state_dict())
    if trained.img_range > 1 and dtype is torch.float16:
        with pytest.raises(UnsupportedDtypeError):
            found.to(dtype)
        return
    output = found.to(dtype)(image().to(dtype))
    assert output.dtype == dtype
    assert (output.float() - trained(image()).clamp(0, 1)).abs().max() < 16 * torch.finfo(dtype).eps


def test_installing_again_changes_nothing() -> None:
    before = ids()
    install()
    once = ids()
    install()
    assert ids() == once
    assert once == before + [f"sparse_sr_attn.{name}" for name in [*NAMES.values(), "Attended"]]


def test_a_registry_of_your_own_leaves_the_main_one_alone() -> None:
    own, before = MAIN_REGISTRY.copy(), ids()
    install(own)
    assert ids() == before
    state = LCoAN(num_feat=8, num_group=1).state_dict()
    assert type(ModelLoader(registry=own).load_from_state_dict(state).model) is LCoAN


# ------------------------------------------------------------------------------------------- the networks of others


def test_nobody_else_claims_ours(trained: Network) -> None:
    claims = [support.architecture.id for support in MAIN_REGISTRY if support.detect(trained.state_dict())]
    assert claims == []
    with pytest.raises(UnsupportedModelError):
        ModelLoader().load_from_state_dict(trained.state_dict())
    assert [ours.name for ours in ARCHITECTURES if ours.detect(trained.state_dict())] == [NAMES[type(trained)]]


PLAIN: dict[str, Callable[[], nn.Module]] = {
    "BasicSR's EDSR": lambda: BASICSR_EDSR(3, 3, num_feat=8, num_block=2, upscale=2),
    "BasicSR's RCAN": lambda: BASICSR_RCAN(3, 3, num_feat=8, num_group=1, num_block=1, squeeze_factor=2, upscale=2),
    "our EDSR without attention": lambda: EDSR(num_feat=8, num_block=2),
    "our RCAN without attention": lambda: RCAN(num_feat=8, num_group=1, num_block=1, squeeze_factor=2),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_networks_stay_unknown(name: str) -> None:
    """Nobody can tell the range of their images, so a guess would be worse."""
    install()
    with pytest.raises(UnsupportedModelError):
        ModelLoader().load_from_state_dict(PLAIN[name]().state_dict())


THEIRS: dict[str, Callable[[], nn.Module]] = {
    "RCAN": lambda: SPANDREL_RCAN(scale=2, n_resgroups=1, n_resblocks=1, n_feats=16, reduction=4),
    "ESRGAN": lambda: ESRGAN(num_filters=8, num_blocks=1),
    "SwinIR": lambda: SwinIR(
        embed_dim=12, depths=[2], num_heads=[2], window_size=8, upscale=2, upsampler="pixelshuffle"
    ),
    "HAT": lambda: HAT(embed_dim=96, depths=(2,), num_heads=(2,), window_size=8, upscale=2, upsampler="pixelshuffle"),
    "Compact": lambda: Compact(num_feat=8, num_conv=2),
}


@pytest.mark.filterwarnings("ignore:torch.meshgrid")
@pytest.mark.parametrize("name", THEIRS)
def test_networks_of_others_stay_theirs(name: str) -> None:
    torch.manual_seed(0)
    state = THEIRS[name]().state_dict()
    before = ModelLoader().load_from_state_dict(state)
    install()
    after = ModelLoader().load_from_state_dict(state)
    assert before.architecture.id == after.architecture.id == name
    for options in (torch.zeros(3), encode_options({"type": "HAT"}), encode_options({"lr": 0.1}), {"type": "EDSR"}):
        assert [ours.name for ours in ARCHITECTURES if ours.detect({**state, "options": options})] == []


# --------------------------------------------------------------------------------------------------- hostile files


@pytest.mark.promise("R21")
@pytest.mark.filterwarnings("ignore:.*torch.jit.load.* is deprecated")  # spandrel calls it
@pytest.mark.parametrize("name", ["net.pth", "net.ckpt", "net.pt"])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_does_not_run(name: str, zipped: bool, tmp_path: Path) -> None:
    install()
    state = LCoAN(num_feat=8, num_group=1).state_dict()
    hostile = {**state, "extra": Payload(tmp_path / "ran")}
    torch.save(hostile, tmp_path / name, _use_new_zipfile_serialization=zipped)
    with pytest.raises(RuntimeError if name == "net.pt" else pickle.UnpicklingError):
        ModelLoader().load_from_file(tmp_path / name)
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / name, weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have run elsewhere


def test_options_that_ask_for_a_giant_are_refused() -> None:
    install()
    model = LCoAN(num_feat=8, num_group=1)
    options = {**(options_of(model) or {}), "num_block": 10**9}
    with pytest.raises(CheckpointError, match="the options say num_block 1000000000, but the weights have 4"):
        ModelLoader().load_from_state_dict({**model.state_dict(), "options": encode_options(options)})


# ------------------------------------------------------------------------------------------------- as docs say it


DOCS = (Path(__file__).parents[2] / "docs" / "hosts.md").read_text(encoding="utf-8")

PROGRAM = """
import site, sys
site.addsitedir(sys.argv[1])  # as Python does at its start
import torch
from spandrel import ModelLoader
print(ModelLoader().load_from_file(sys.argv[2]).architecture.name)
"""


def test_a_program_without_plugins_knows_ours_by_a_line_in_its_python(tmp_path: Path) -> None:
    (line,) = re.findall(r"^import sparse_sr_attn_spandrel; .*$", DOCS, flags=re.MULTILINE)
    repair = "import sparse_sr_attn_basicsr; sparse_sr_attn_basicsr.apply()"  # a torchvision for CUDA without CUDA
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sparse_sr_attn.pth").write_text(f"{repair}\n{line}\n")
    torch.save(LCoAN(num_feat=8, num_group=1).state_dict(), tmp_path / "net.pth")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "site"), str(tmp_path / "net.pth")],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "LCoAN\n", done.stderr[-2000:]


def test_a_custom_node_knows_ours(tmp_path: Path) -> None:
    (node,) = re.findall(r'^```python title="custom_nodes/.*?"\n(.*?)^```', DOCS, flags=re.M | re.S)
    scope: dict[str, Any] = {}
    exec(compile(node, "docs/hosts.md", "exec"), scope)  # noqa: S102  (the documentation is ours)
    assert scope["NODE_CLASS_MAPPINGS"] == {}
    assert ids()[-len(ARCHITECTURES) - 1 :] == [f"sparse_sr_attn.{name}" for name in [*NAMES.values(), "Attended"]]
