"""Networks measured on folders: the figures are those of images that were upscaled and compared by hand."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from torch import nn

from sparse_sr_attn import EDSR, CoA, load_model
from sparse_sr_attn.cli.main import main
from sparse_sr_attn.inference.evaluate import attention_off, evaluate
from sparse_sr_attn.layers.base import AttentionLayer

NETWORK = "LCoAN-light_x2"


@pytest.fixture
def sets(tmp_path: Path) -> list[Path]:
    """Two test sets; the second has a grey image and one whose sides are odd."""
    cat = data.chelsea()
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder, crops in zip(
        folders, ((cat[:40, :44], cat[60:96, 80:120]), (cat[:37, :51, 0], cat[9:60, 70:101])), strict=True
    ):
        folder.mkdir()
        for index, crop in enumerate(crops):
            Image.fromarray(crop.copy()).save(folder / f"{index}.png")
    return folders


def output(command: list[str | Path], capsys: pytest.CaptureFixture[str]) -> str:
    assert main([str(word) for word in command]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("protocol", ["basicsr", "matlab"])
def test_figures_are_those_of_upscaled_files(
    sets: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], protocol: str
) -> None:
    """Low resolution by `prepare`, through `upscale`, compared by `evaluate`; for the colour images."""
    (sets[1] / "0.png").unlink()  # it is grey
    for folder in sets:
        output(["prepare", folder, "--scale", "2", "-o", tmp_path / "pairs" / folder.name], capsys)
        low = tmp_path / "pairs" / folder.name / "LR_x2"
        output(["upscale", low, "-o", f"{tmp_path / folder.name}_large/", "--weights", NETWORK], capsys)
        large = tmp_path / f"{folder.name}_large"
        by_hand = output(
            ["evaluate", large, folder, "--scale", "2", "--names", "{}_x2", "{}", "--protocol", protocol], capsys
        )
        assert output(["evaluate", folder, "--weights", NETWORK, "--protocol", protocol], capsys) == by_hand


def test_a_table_holds_the_means(sets: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    table = output(["evaluate", *sets, "--weights", NETWORK, "--bicubic"], capsys)
    rows = {cells[1].strip(): cells[2:4] for cells in (line.split("|") for line in table.splitlines())}
    assert list(rows) == ["×2", "---", "bicubic", NETWORK]
    for column, folder in enumerate(sets):
        for label, asked in (("bicubic", ["--bicubic", "--scale", "2"]), (NETWORK, ["--weights", NETWORK])):
            mean = output(["evaluate", folder, *asked], capsys).splitlines()[-1].split()
            assert mean[0] == "mean"
            psnr, ssim = rows[label][column].split("/")
            assert float(psnr) == pytest.approx(float(mean[1]), abs=0.006)
            assert float(ssim) == pytest.approx(float(mean[3]), abs=0.00006)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "two folders must be given, results and ground truth; got 1"),
        (["--bicubic"], "--scale must be given"),
        (["--weights", NETWORK, "--scale", "4"], "which --scale repeats; LCoAN-light_x2 has 2, not 4"),
        (
            ["--weights", NETWORK, "--weights", "LCoAN-light_x4"],
            "all weights must have the same scale, which --scale repeats; LCoAN-light_x4 has 4, not 2",
        ),
        (["--weights", NETWORK, "--grey", "none"], "--grey must name images"),
        (["--without-attention", "--bicubic", "--scale", "2"], "--without-attention needs --weights"),
    ],
)
def test_what_does_not_fit_is_refused(
    sets: list[Path], words: list[str], message: str, refused: Callable[..., None]
) -> None:
    refused(["evaluate", str(sets[0]), *words], message)


@pytest.mark.parametrize("weights", [["--weights", NETWORK], []], ids=["networks", "results"])
def test_results_next_to_the_truth_are_not_measured(
    sets: list[Path], weights: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    output(["upscale", *sets[0].glob("*.png"), "--weights", NETWORK], capsys)
    command = ["evaluate", *([sets[0]] if weights else [sets[0], sets[0], "--names", "{}", "{}", "--scale", "2"])]
    assert main([str(word) for word in [*command, *weights]]) == 0
    printed = capsys.readouterr()
    assert [line.split()[0] for line in printed.out.splitlines()] == ["0", "1", "mean"]
    assert printed.err.count("2 of 4 images are results next to their originals and are skipped") == 1


def test_all_is_checked_before_the_first_measurement(sets: list[Path], refused: Callable[..., None]) -> None:
    (sets[0] / "0.png").write_text("no image")  # measuring it would fail
    for words, message in (
        ([str(sets[1].parent / "none")], "no such image or folder"),
        ([str(sets[1]), "--grey", "none"], "--grey must name images"),
    ):
        refused(["evaluate", str(sets[0]), *words, "--weights", NETWORK], message)


@pytest.mark.parametrize("layer", ["LCoA", "GMSA", "NLSA", "ENLA", "HSPA", "CategoryAttention", "NLA"])
def test_a_network_with_attention_off_is_the_same_network_without(layer: str) -> None:
    options = {"num_feat": 8, "num_block": 4, "img_range": 1.0}
    model = EDSR(**options, attention={"type": layer, "every": 2, "share": 2 if layer in ("LCoA", "GMSA") else 1})
    plain = EDSR(**options)
    plain.load_state_dict(model.state_dict(), strict=False)
    image = torch.rand(1, 3, 12, 12)
    for module in model.modules():
        if isinstance(module, AttentionLayer):
            for p in module.parameters():
                nn.init.normal_(p, std=0.1)
    model.eval(), plain.eval()
    with torch.no_grad():
        on = model(image)
        assert not torch.allclose(on, plain(image), atol=1e-4)
        with attention_off(model):
            assert torch.allclose(model(image), plain(image), atol=1e-6)
        assert torch.equal(model(image), on)
        with pytest.raises(ZeroDivisionError), attention_off(model):
            1 / 0  # noqa: B018
        assert torch.equal(model(image), on)


def test_attention_off_needs_attention_that_it_can_switch_off() -> None:
    with pytest.raises(ValueError, match="but EDSR has none"), attention_off(EDSR(num_feat=8, num_block=2)):
        pass

    class Fixed(AttentionLayer):
        """A layer of somebody else, without the option."""

    with pytest.raises(ValueError, match="must have res_scale to be switched off, but Fixed has none"):
        attention_off(nn.Sequential(Fixed())).__enter__()


def test_a_row_with_attention_off(sets: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = tmp_path / "plain.pth"
    torch.save(EDSR(num_feat=8, num_block=2, upscale=2, img_range=1.0).state_dict(), plain)
    assert main(["evaluate", str(sets[0]), "--weights", str(plain), "--without-attention"]) == 2
    assert "none of these networks has attention" in capsys.readouterr().err
    table = output(["evaluate", sets[0], "--weights", NETWORK, "--without-attention"], capsys)
    rows = {cells[1].strip(): cells[2].strip() for cells in (line.split("|") for line in table.splitlines()[2:])}
    assert list(rows) == [NETWORK, f"{NETWORK}, attention off"]
    both = output(["evaluate", sets[0], "--weights", NETWORK, "--weights", plain, "--without-attention"], capsys)
    assert f"{NETWORK}, attention off" in both
    assert f"{plain}, attention off" not in both
    model = load_model(NETWORK)
    pictures = [torch.from_numpy(np.array(Image.open(file))) for file in sorted(sets[0].iterdir())]
    for row, factor in zip(rows.values(), (None, 0.0), strict=True):
        for module in model.modules():
            if isinstance(module, CoA) and factor is not None:
                module.res_scale = factor
        psnr = np.mean([score.psnr for score in evaluate(model, pictures)])
        assert row.split(" / ")[0] == f"{psnr:.2f}"
    assert len(set(rows.values())) == 2
