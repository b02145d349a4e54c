"""PSNR and SSIM: against BasicSR's, by hand, and what any such measure must satisfy."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sparse_sr_attn.cli.main import main
from sparse_sr_attn.data.metrics import bicubic_luma, luma, psnr, ssim
from sparse_sr_attn.errors import ShapeError


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def disturbed(picture: Tensor, amplitude: int = 20) -> Tensor:
    change = torch.randint(-amplitude, amplitude + 1, picture.shape, generator=torch.Generator().manual_seed(9))
    return (picture.int() + change).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("border", [0, 3])
@pytest.mark.parametrize("grey", [False, True])
def test_agrees_with_basicsr(border: int, grey: bool) -> None:
    """BasicSR computes luma in float32, which is what the tolerances are for."""
    from sparse_sr_attn_basicsr import shims

    shims.apply()
    from basicsr.metrics import calculate_psnr, calculate_ssim

    one = noise(40, 33) if grey else noise(40, 33, 3)
    other = disturbed(one)
    pictures = [(x[..., None].expand(-1, -1, 3) if grey else x).flip(2).numpy() for x in (one, other)]
    options = {"crop_border": border, "test_y_channel": True}
    assert psnr(luma(one), luma(other), border=border) == pytest.approx(calculate_psnr(*pictures, **options), abs=1e-5)
    assert ssim(luma(one), luma(other), border=border) == pytest.approx(calculate_ssim(*pictures, **options), abs=1e-7)


def test_luma_of_known_colours() -> None:
    colours = torch.tensor([[[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]]], dtype=torch.uint8)
    assert luma(colours)[0].tolist() == pytest.approx([16, 235, 81.481, 144.553, 40.966])
    assert luma(colours, "matlab")[0].tolist() == [16, 235, 81, 145, 41]


def test_grey_is_three_equal_channels_or_luma_already() -> None:
    grey = noise(7, 5)
    assert torch.allclose(luma(grey), luma(grey[..., None].expand(-1, -1, 3)), rtol=0, atol=1e-12)
    assert torch.equal(luma(grey, "matlab"), grey.double())


def test_psnr_by_hand() -> None:
    one = torch.zeros(4, 4, dtype=torch.float64)
    other = one.clone()
    other[0, 0] = 200  # in the border
    other[1, 1] = 10
    assert psnr(one, other, border=1) == pytest.approx(10 * math.log10(255**2 / (100 / 4)))
    assert psnr(one, one, border=1) == math.inf
    assert ssim(luma(noise(12, 12)), luma(noise(12, 12)), border=0) == 1.0


@pytest.mark.parametrize("upscale", [2, 3, 4])
def test_the_row_bicubic_rounds_luma_first_and_the_result_last(upscale: int) -> None:
    """Against BasicSR's `imresize`, which is another implementation and rounds nothing; its float32 may flip a tie."""
    from sparse_sr_attn_basicsr import shims

    shims.apply()
    from basicsr.utils.color_util import rgb2ycbcr
    from basicsr.utils.matlab_functions import imresize

    picture = noise(24, 36, 3)
    y = rgb2ycbcr(picture.numpy(), y_only=True)
    assert y.dtype == np.uint8
    small = imresize(y.astype(np.float32), 1 / upscale)
    expected = torch.from_numpy(imresize(small, upscale)).double().round().clamp(0, 255)
    truth, enlarged = bicubic_luma(picture, upscale)
    assert torch.equal(truth, torch.from_numpy(y).double())
    assert (enlarged - expected).abs().max() <= 1
    assert (enlarged != expected).double().mean() < 0.01


def test_the_row_bicubic_cuts_to_a_multiple() -> None:
    truth, enlarged = bicubic_luma(noise(13, 11, 3), 4)
    assert truth.shape == enlarged.shape == (12, 8)


ONE = torch.zeros(20, 20)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: luma(noise(4, 4, 3).float()), TypeError, "the picture must be uint8.*got torch.float32"),
        (lambda: luma(noise(4, 4, 2)), ShapeError, r"must be grey \(h, w\) or RGB \(h, w, 3\), got \(4, 4, 2\)"),
        (lambda: luma(noise(4, 4), "pal"), ValueError, "protocol must be one of basicsr, matlab, got 'pal'"),
        (lambda: psnr(ONE, ONE[1:], border=0), ShapeError, r"the same size, got \(20, 20\) and \(19, 20\)"),
        (lambda: psnr(ONE, ONE, border=-1), ValueError, "border must be >= 0, got -1"),
        (lambda: psnr(ONE, ONE, border=10), ShapeError, "sides must be >= 21 with a border of 10, got 20x20"),
        (lambda: ssim(ONE, ONE, border=5), ShapeError, "sides must be >= 21 with a border of 5, got 20x20"),
        (lambda: bicubic_luma(noise(3, 9, 3), 4), ShapeError, "both sides must be >= 4"),
    ],
)
def test_errors(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Results and true pictures, called differently; one is grey, and one is a little larger than its result."""
    results, truths = tmp_path / "results", tmp_path / "truths"
    for folder in (results, truths):
        folder.mkdir()
    for index, label in enumerate(("bird", "bridge")):
        truth = noise(31, 40, 3, seed=index)
        if label == "bridge":
            truth = truth[..., :1].expand(-1, -1, 3)
        Image.fromarray(truth.contiguous().numpy()).save(truths / f"{label}_HR.png")
        Image.fromarray(disturbed(truth[:30])[..., :1].expand(-1, -1, 3).contiguous().numpy()).save(
            results / f"{label}_ours.png"
        )
    (results / "notes.txt").write_text("no picture")
    return results, truths


def lines(text: str) -> dict[str, list[float]]:
    rows = [line.split() for line in text.splitlines()]
    return {row[0]: [float(row[1]), float(row[3])] for row in rows}


def test_results_are_found_by_name_and_true_pictures_cut(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    results, truths = folders
    command = ["evaluate", str(results), str(truths), "--scale", "2", "--names", "{}_ours", "{}_HR"]
    assert main(command) == 0
    found = lines(capsys.readouterr().out)
    assert list(found) == ["bird", "bridge", "mean"]
    for index, label in enumerate(("bird", "bridge")):
        truth = noise(31, 40, 3, seed=index)[:30]
        if label == "bridge":
            truth = truth[..., :1].expand(-1, -1, 3)
        result = disturbed(truth)[..., :1].expand(-1, -1, 3)
        assert found[label] == pytest.approx(
            [psnr(luma(result), luma(truth), border=2), ssim(luma(result), luma(truth), border=2)], abs=6e-4
        )
    assert found["mean"][0] == pytest.approx((found["bird"][0] + found["bridge"][0]) / 2, abs=1e-3)
    assert main([*command, "--border", "0"]) == 0
    assert lines(capsys.readouterr().out)["bird"] != found["bird"]


def test_grey_and_protocol(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    results, truths = folders
    command = ["evaluate", str(results), str(truths), "--scale", "2", "--names", "{}_ours", "{}_HR"]
    assert main([*command, "--protocol", "matlab"]) == 0
    as_rgb = lines(capsys.readouterr().out)
    assert main([*command, "--protocol", "matlab", "--grey", "bridge"]) == 0
    as_grey = lines(capsys.readouterr().out)
    assert as_grey["bird"] == as_rgb["bird"]
    assert as_rgb["bridge"][0] - as_grey["bridge"][0] == pytest.approx(1.322, abs=0.1)  # luma is rounded, too


def test_grey_files_meet_rgb_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Who saves grey as grey, and who as RGB, must not matter."""
    grey = noise(30, 30)
    forms = {"one": grey, "three": grey[..., None].expand(-1, -1, 3).contiguous()}
    for form, picture in forms.items():
        (tmp_path / form).mkdir()
        Image.fromarray(picture.numpy()).save(tmp_path / form / "a.png")
    for result, truth in (("one", "three"), ("three", "one")):
        for protocol in ("basicsr", "matlab"):
            command = ["evaluate", str(tmp_path / result), str(tmp_path / truth), "--scale", "2"]
            assert main([*command, "--protocol", protocol]) == 0
            assert lines(capsys.readouterr().out)["a"] == [math.inf, 1.0]


def test_colours_of_a_grey_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Networks give grey pictures a little colour: BasicSR's way takes its luma, MATLAB's has no word for it."""
    grey = noise(30, 30)
    coloured = disturbed(grey[..., None].expand(-1, -1, 3).contiguous(), 3)
    for folder, picture in (("result", coloured), ("truth", grey)):
        (tmp_path / folder).mkdir()
        Image.fromarray(picture.numpy()).save(tmp_path / folder / "a.png")
    command = ["evaluate", str(tmp_path / "result"), str(tmp_path / "truth"), "--scale", "2"]
    assert main(command) == 0
    assert lines(capsys.readouterr().out)["a"][0] == pytest.approx(psnr(luma(coloured), luma(grey), border=2), abs=6e-4)
    assert main([*command, "--protocol", "matlab"]) == 1
    assert "a.png: must be grey, like the ground truth or as --grey says, but has colours" in capsys.readouterr().err


def test_bicubic(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", "--bicubic", str(folders[1]), "--scale", "3", "--names", "{}", "{}_HR", "--grey", "bridge"]
    assert main(command) == 0
    found = lines(capsys.readouterr().out)
    truth, enlarged = bicubic_luma(noise(31, 40, 3), 3)
    assert found["bird"][0] == pytest.approx(psnr(truth, enlarged, border=3), abs=6e-4)
    truth, enlarged = bicubic_luma(noise(31, 40, 3, seed=1)[..., 0], 3)
    assert found["bridge"][0] == pytest.approx(psnr(truth, enlarged, border=3), abs=6e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["results", "--scale", "2"], "two folders must be given, results and ground truth; got 1"),
        (["truths", "--bicubic", "--scale", "2", "--protocol", "basicsr"], "--bicubic needs --protocol matlab"),
        (["results", "truths", "--scale", "0"], "--scale must be >= 1, got 0"),
        (["results", "truths", "--scale", "2", "--border", "-1"], "--border must be >= 0, got -1"),
        (["results", "truths", "--scale", "2", "--names", "a", "{}"], "--names must each have one {}, got a"),
        (
            ["results", "truths", "--scale", "2"],
            "no result for bird_HR, bridge_HR in .*like bird_ours.png, bird_HR.png",
        ),
        (
            ["results", "truths", "--scale", "2", "--names", "{}", "{}_HR"],
            "no result for bird, bridge in .*; try --names {}_ours {}_HR",
        ),
        (["results", "absent", "--scale", "2"], "absent: no such image or folder"),
        (["results", "truths", "--scale", "2", "--names", "{}", "{}x"], "named like {}x, but contains none"),
        (
            ["results", "truths", "--scale", "2", "--names", "{}_ours", "{}_HR", "--grey", "man"],
            r"--grey must name images, got man \(known: bird, bridge\)",
        ),
    ],
)
def test_a_wrong_command_line_does_nothing(
    folders: tuple[Path, Path], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    places = [str(folders[0].parent / word) if word in ("results", "truths", "absent") else word for word in arguments]
    assert main(["evaluate", *places]) == 2
    captured = capsys.readouterr()
    assert re.search(message.replace("{}", r"\{\}"), captured.err)
    assert captured.out == ""


def test_pictures_that_do_not_fit(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    results, truths = folders
    command = ["evaluate", str(results), str(truths), "--names", "{}_ours", "{}_HR"]
    assert main([*command, "--scale", "4"]) == 1  # 31 lines are cut to 28, and the result has 30
    assert "bird_ours.png: pictures must have the same size, got (30, 40) and (28, 40)" in capsys.readouterr().err
    assert main([*command, "--scale", "2", "--grey", "bird"]) == 1
    assert (
        "bird_HR.png: must be grey, like the ground truth or as --grey says, but has colours" in capsys.readouterr().err
    )
    Image.fromarray(np.zeros((30, 40), np.uint16)).save(results / "bird_ours.png")
    assert main([*command, "--scale", "2"]) == 1
    assert "bird_ours.png: must have 8 bits per channel, got 16" in capsys.readouterr().err
    (results / "bird_ours.png").write_bytes(b"nothing")
    assert main([*command, "--scale", "2"]) == 1
    assert "bird_ours.png: is not an image that Pillow can read" in capsys.readouterr().err
