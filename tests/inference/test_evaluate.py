"""Networks measured on folders: the figures are those of images that were upscaled and compared by hand."""

from pathlib import Path

import pytest
from PIL import Image
from skimage import data

from sparse_sr_attn.cli.main import main

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
        output(["upscale", low, "-o", f"{tmp_path / folder.name}_large/"], capsys)
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
    ],
)
def test_what_does_not_fit_is_refused(
    sets: list[Path], capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["evaluate", str(sets[0]), *words]) == 2
    assert message in capsys.readouterr().err
