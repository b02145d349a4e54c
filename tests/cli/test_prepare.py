"""`sparse-sr prepare`, as it is typed."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sparse_sr_attn.cli.main import main
from sparse_sr_attn.data.imresize import matlab_bicubic


@pytest.fixture
def here(here: Path) -> Path:
    """A folder with a colour, a grey and a small photograph, a hidden file and a text."""
    dice = np.random.default_rng(0)
    folder = here / "photos"
    folder.mkdir()
    Image.fromarray(dice.integers(0, 256, (41, 50, 3), dtype=np.uint8)).save(folder / "colour.png")
    Image.fromarray(dice.integers(0, 256, (40, 40), dtype=np.uint8)).save(folder / "grey.png")
    Image.fromarray(dice.integers(0, 256, (9, 60, 3), dtype=np.uint8)).save(folder / "small.png")
    (folder / ".hidden.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("no image")
    return here


def pixels(file: Path) -> torch.Tensor:
    with Image.open(file) as image:
        return torch.from_numpy(np.array(image))


def test_whole_images(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "photos", "--scale", "2", "-o", "out"]) == 0
    assert capsys.readouterr().out == "3 pairs from 3 images -> out\n"
    colour = pixels(here / "photos/colour.png")
    assert torch.equal(pixels(here / "out/HR/colour.png"), colour[:40])
    assert torch.equal(pixels(here / "out/LR_x2/colour.png"), matlab_bicubic(colour, 2))
    grey = pixels(here / "photos/grey.png")
    assert torch.equal(pixels(here / "out/HR/grey.png"), grey[..., None].expand(-1, -1, 3))


def test_tiles_leave_out_what_is_smaller_than_a_crop(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["prepare", "photos", "--scale", "2", "--tile", "32", "--crop", "16", "-o", "out"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert "from 2 images" in out
    assert "note: 1 of 3 images skipped, with a side shorter than 16: " in err
    assert "photos/small.png" in err
    files = sorted((here / "out/HR").iterdir())
    assert [file.name for file in files] == sorted(file.name for file in (here / "out/LR_x2").iterdir())
    assert {tuple(pixels(file).shape) for file in files} == {(32, 32, 3)}
    assert main(command) == 2
    assert "already exists; use --overwrite" in capsys.readouterr().err
    assert main(["prepare", "nowhere", *command[1:]]) == 2
    assert "nowhere: no such image or folder" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0


def test_whole_images_smaller_than_a_crop_are_left_out(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "photos", "--scale", "2", "--crop", "16", "-o", "out"]) == 0
    assert capsys.readouterr().out == "2 pairs from 2 images -> out\n"
    assert torch.equal(pixels(here / "out/HR/colour.png"), pixels(here / "photos/colour.png")[:40])


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--scale", "0"], 2, "--scale must be >= 1, got 0"),
        (["--scale", "2", "--tile", "33"], 2, "--tile must be a multiple of the scale, 2, got 33"),
        (["--scale", "2", "--tile", "32", "--crop", "32"], 2, "smaller than --tile, 32, got 32"),
        (["--scale", "2", "--crop", "15"], 2, "--crop must be a multiple of the scale, 2, got 15"),
        (["nowhere", "--scale", "2"], 2, "nowhere: no such image or folder"),
        (["photos/notes.txt", "--scale", "2"], 1, "photos/notes.txt: is not an image"),
        (["deeper/photos", "--scale", "2"], 2, "photos/grey.png and deeper/photos/grey.png would get the same name"),
    ],
)
def test_what_cannot_be_is_said_and_nothing_is_written(
    arguments: list[str], status: int, message: str, here: Path, refused: Callable[..., None]
) -> None:
    (here / "deeper" / "photos").mkdir(parents=True)
    shutil.copy(here / "photos" / "grey.png", here / "deeper" / "photos")
    refused(["prepare", "photos", *arguments, "-o", "out"], message, status)


def test_results_next_to_their_originals_are_left_out(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "in").mkdir()
    for file in ("a.png", "a_x2.png", "b.jpg"):
        Image.new("RGB", (8, 8)).save(here / "in" / file)
    assert main(["prepare", "in", "--scale", "2", "-o", "out"]) == 0
    assert sorted(os.listdir("out/HR")) == ["a.png", "b.png"]
    assert "1 of 3 images are results next to their originals and are skipped: in/a_x2.png" in capsys.readouterr().err


def test_names_are_told_apart(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the suffix where the stem is the same, by the folder where the name is; the same file twice is one."""
    (here / "more").mkdir()
    shutil.copy(here / "photos" / "colour.png", here / "more")
    with Image.open(here / "photos" / "grey.png") as grey:
        grey.convert("RGB").save(here / "photos" / "GREY.JPG")
    command = ["prepare", "photos", "photos/grey.png", "./photos", "more", "--scale", "2", "-o", "out"]
    assert main(command) == 0
    assert capsys.readouterr().out == "5 pairs from 5 images -> out\n"
    names = ["GREY.JPG.png", "grey.png.png", "more_colour.png.png", "photos_colour.png.png", "small.png"]
    for part in ("HR", "LR_x2"):
        assert sorted(file.name for file in (here / "out" / part).iterdir()) == names
    assert torch.equal(pixels(here / "out/HR/more_colour.png.png"), pixels(here / "more/colour.png")[:40])
    assert np.ptp(pixels(here / "out/HR/grey.png.png").numpy(), axis=2).max() == 0


@pytest.mark.parametrize("channels", [3, 4])
def test_sixteen_bit_colours_are_refused(channels: int, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pillow would read half of their bits without a word."""
    cv2 = pytest.importorskip("cv2")
    cv2.imwrite("deep.png", np.full((16, 16, channels), 40000, dtype=np.uint16))
    assert main(["prepare", "deep.png", "--scale", "2", "-o", "out"]) == 1
    assert "deep.png: must have 8 bits per channel, got more; save it with 8 bits" in capsys.readouterr().err
