"""Weights go to other names and files and come back; nothing is lost that is not said to be."""

import copy
import re
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from edsr_pytorch import Theirs
from safetensors.torch import load_file
from torch import Tensor, nn

from sparse_sr_attn import EDSR, ELAN, RCAN, CheckpointError, LCoAN, load_model
from sparse_sr_attn.backbones.base import Network
from sparse_sr_attn.checkpoints.convert import at_img_range, convert_weights, unsaid_options
from sparse_sr_attn.cli.main import main

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("lcoan_*.safetensors"))
GOLDEN_ELAN = sorted((Path(__file__).parents[1] / "golden").glob("elan_*x2*.safetensors"))
LCOA = {"type": "LCoA", "every": 1, "num_clusters": 3, "chunk_size": 7, "zero_init": False}


def image(channels: int = 3) -> Tensor:
    return torch.rand(1, channels, 9, 8, generator=torch.Generator().manual_seed(0))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "EDSR x2": (lambda: EDSR(num_feat=8, num_block=11, upscale=2), lambda: Theirs(2, blocks=11)),
    "EDSR x4": (lambda: EDSR(num_feat=8, num_block=1, upscale=4), lambda: Theirs(4, blocks=1)),
    "RCAN x3": (
        lambda: RCAN(num_feat=8, num_group=3, num_block=2, squeeze_factor=4, upscale=3),
        lambda: Theirs(3, groups=3, blocks=2),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_their_code_loads_it_strictly_and_gives_the_same_image(name: str) -> None:
    torch.manual_seed(0)
    ours, theirs = (build().eval() for build in CASES[name])
    theirs.load_state_dict(convert_weights(ours, "released"), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(theirs(image() * 255) / 255, ours(image()), rtol=1e-5, atol=1e-5)
    assert unsaid_options(ours, convert_weights(ours, "released")) == []


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_released_lcoan_goes_and_comes_back(path: Path) -> None:
    """All keys that its code has, with the shapes it has them in; what it never uses may be other numbers."""
    released = {key[6:]: value for key, value in load_file(path).items() if key.startswith("state.")}
    model = load_model(released, chunk_size=5, count_keys_once=True)
    again = convert_weights(model, "released")
    assert {key: value.shape for key, value in again.items()} == {key: value.shape for key, value in released.items()}
    dead = re.compile(r"a|body\.[1-9]\d*\.attention\.0\.(conv_match|kmeans).*|.*initted")
    for key, value in released.items():
        assert again[key].dtype == value.dtype
        assert dead.fullmatch(key) or torch.equal(again[key], value), key
    assert {"chunk_size=5", "count_keys_once=true"} <= set(unsaid_options(model, again))
    assert unsaid_options(load_model(released), again) == []


@pytest.mark.parametrize("path", GOLDEN_ELAN, ids=lambda path: path.stem)
def test_released_elan_goes_and_comes_back(path: Path) -> None:
    """Every weight that its code expects, fixed kernels and mean too, to the bit (the mean to its rounding)."""
    released = {key.removeprefix("sd."): value for key, value in load_file(path).items() if key.startswith("sd.")}
    again = convert_weights(load_model(released), "released")
    assert again.keys() == released.keys()
    for key, value in released.items():
        tolerance = 1e-6 if "mean.bias" in key else 0
        torch.testing.assert_close(again[key], value, rtol=tolerance, atol=tolerance, msg=key)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: EDSR(num_feat=8, num_block=2, attention=LCOA), "no name for attention.0"),
        (lambda: LCoAN(num_feat=8, num_group=4, num_block=1, share=2, num_clusters=3), "no name for body.2.attention"),
        (lambda: LCoAN(num_feat=8, num_group=2, num_block=1, num_rounds=2, num_clusters=3), "no name for .*further"),
        (lambda: ELAN(num_feat=12, num_block=1, window_sizes=(2, 3)), "no name for .*query.*would be lost"),
        (lambda: ELAN(3, 1, num_feat=12, num_block=1), "images of 3 channels, and the network has others"),
        (lambda: EDSR(1, 1, num_feat=8, num_block=2), "a mean of 3 channels, and the network has 1"),
    ],
)
def test_what_has_no_place_is_refused(model: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        convert_weights(model().eval(), "released")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"img_range": 1.0, "rgb_mean": (0.0, 0.0, 0.0)}, "img_range=1.0, rgb_mean=[0.0, 0.0, 0.0]"),
        ({"res_scale": 0.2}, "res_scale=0.2"),
    ],
)
def test_what_weights_do_not_tell_is_said(
    options: dict[str, object], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    torch.save(EDSR(num_feat=8, num_block=2, upscale=2, **options).state_dict(), tmp_path / "edsr.pth")
    told = [f"{key}={str(list(value)) if isinstance(value, tuple) else value}" for key, value in options.items()]
    status = main(
        ["convert", f"{tmp_path}/edsr.pth", "-o", f"{tmp_path}/out.pt", "--names", "released", "--set", *told]
    )
    assert status == 0
    note = f"sparse-sr: note: the file does not record {said}; pass it when you load the file\n"
    assert capsys.readouterr().err == note


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_files_come_back(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = LCoAN(num_feat=8, num_group=2, num_block=1, num_clusters=3, chunk_size=9, res_scale=0.6).eval()
    source, target = tmp_path / "net.pth", tmp_path / f"net_out{suffix}"
    torch.save({"params": OrderedDict(model.state_dict())}, source)
    assert main(["convert", str(source), "-o", str(target)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out == f"{source} -> {target}: LCoAN, {len(model.state_dict())} keys\n"
    again = load_model(target)
    assert torch.equal(again(image()), model(image()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.pth", target.name]
    if suffix != ".safetensors":
        assert set(torch.load(target)) == {"params"}


def test_a_file_that_is_there_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "net.pth", tmp_path / "out.safetensors"
    torch.save(EDSR(num_feat=8, num_block=1).state_dict(), source)
    target.write_bytes(b"mine")
    assert main(["convert", str(source), "-o", str(target)]) == 2
    assert "already exists; use --overwrite" in capsys.readouterr().err
    assert target.read_bytes() == b"mine"
    assert main(["convert", str(source), "-o", str(target), "--overwrite"]) == 0
    assert load_file(target)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["no.pth", "-o", "out.pth"], 2, "no.pth: there is no such file"),
        (["net.pth", "-o", "out.onnx"], 2, "--output must end in .safetensors, .pth, .pt, got out.onnx"),
        (["net.pth", "-o", "out.pth", "--set", "imgrange=1"], 2, "imgrange: unknown; did you mean 'img_range'?"),
        (["net.pth", "-o", "out.pth", "--set", "img_range"], 2, "--set needs NAME=VALUE, got 'img_range'"),
        (["net.pth", "-o", "net.pth", "--img-range", "0"], 2, "--img-range must be > 0 and finite, got 0"),
        (["net.pth", "-o", "net.pth", "--set", "imgrange=1"], 2, "imgrange: unknown; did you mean 'img_range'?"),
        (["net.pth", "-o", "nowhere/out.pth"], 1, "cannot be written: No such file or directory"),
    ],
)
def test_one_line_errors(arguments: list[str], status: int, message: str, refused: Callable[..., None]) -> None:
    torch.save(EDSR(num_feat=8, num_block=1).state_dict(), "net.pth")
    refused(["convert", *arguments], message, status)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    source, target = tmp_path / "net.pth", tmp_path / "out.pth"
    torch.save(EDSR(num_feat=32, num_block=1).state_dict(), source)
    target.write_bytes(b"mine")
    for suffix in (".pth", ".safetensors"):
        code = (
            "import resource, sys; from sparse_sr_attn.cli.main import main\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
            f"sys.exit(main(['convert', {str(source)!r}, '-o', {str(target.with_suffix(suffix))!r}, '--overwrite']))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stderr.endswith("cannot be written: File too large\n"), done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert target.read_bytes() == b"mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.pth", "out.pth"]


class TheirMDSR(nn.Module):
    """The layout of EDSR-PyTorch's MDSR, up to what comes after the blocks."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.ModuleDict({"body": nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))})
        self.pre_process = nn.ModuleList(nn.Sequential(copy.deepcopy(block), copy.deepcopy(block)) for _ in range(3))
        self.head = nn.Sequential(nn.Conv2d(3, 8, 3))
        self.body = nn.Sequential(copy.deepcopy(block), nn.Conv2d(8, 8, 3))
        self.upsample = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 32, 3)) for _ in range(3))
        self.tail = nn.Sequential(nn.Conv2d(8, 3, 3))


def test_mdsr_is_not_taken_for_an_edsr() -> None:
    with pytest.raises(CheckpointError, match="these are weights of MDSR, one network for several factors"):
        load_model(TheirMDSR().state_dict())


@pytest.mark.parametrize("names", ["ours", "released"])
def test_an_edsr_at_another_range_gives_the_same_image(names: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = EDSR(num_feat=8, num_block=3, upscale=2, res_scale=0.5, img_range=255.0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    torch.save(model.state_dict(), tmp_path / "net.pth")
    command = ["convert", str(tmp_path / "net.pth"), "-o", str(tmp_path / "one.pth"), "--img-range", "1"]
    assert main([*command, "--names", names, "--set", "res_scale=0.5", "img_range=255.0"]) == 0
    again = load_model(tmp_path / "one.pth", res_scale=0.5, img_range=1.0)
    x = torch.rand(1, 3, 8, 9)
    torch.testing.assert_close(again(x), model(x), rtol=1e-4, atol=1e-4)
    if names == "released":
        mean = torch.load(tmp_path / "one.pth", weights_only=True)["add_mean.bias"]
        torch.testing.assert_close(mean, model.mean.flatten())


@pytest.mark.parametrize(
    "model",
    [RCAN(num_feat=8, num_group=1, num_block=1, squeeze_factor=2), EDSR(num_feat=8, num_block=4, attention="LCoA")],
)
def test_other_networks_have_no_other_range(model: Network) -> None:
    with pytest.raises(CheckpointError, match="only for an EDSR without attention, got an? (RCAN|EDSR with attention)"):
        at_img_range(model, 1.0)


def test_a_wrong_range_is_a_wrong_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "gone.pth", "-o", str(tmp_path / "net.pth"), "--img-range", "0"]) == 2
    assert capsys.readouterr().err == "sparse-sr: --img-range must be > 0 and finite, got 0\n"


def test_a_refused_pickle_is_told_without_colours(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1), "code": nn.Conv2d(1, 1, 1)}, tmp_path / "net.pth")
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path / "net.pth")
    assert "\x1b" not in str(caught.value)
    assert "Weights only load failed" in str(caught.value)
