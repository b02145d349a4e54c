"""The demo: its data, and (slow) the way from there to the report on tiny settings."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from sparse_sr_attn import EDSR, PRESETS, LCoAN
from sparse_sr_attn.data.imresize import matlab_bicubic

DEMO = Path(__file__).resolve().parent.parent / "demo"


def run(*arguments: object, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """A command of the demo, standing somewhere else, with one thread."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What prepare.py writes."""
    folder = tmp_path_factory.mktemp("demo")
    done = run(DEMO / "prepare.py", "--out", "data", cwd=folder)
    assert "val  : 5 pairs" in done.stdout
    return folder / "data"


def picture(file: Path) -> torch.Tensor:
    with Image.open(file) as opened:
        pixels = np.array(opened)
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    return torch.from_numpy(pixels[..., :3])


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def photographs(folder: Path) -> set[str]:
    """The photographs that the files were cut from."""
    return {name.removesuffix(".png").partition("_y")[0] for name in names(folder)}


def test_no_photograph_is_on_both_sides(data: Path) -> None:
    train, val = photographs(data / "train/HR"), photographs(data / "val/HR")
    assert len(train) >= 8
    assert len(val) >= 5
    assert not train & val
    sides = [{"motorcycle_left", "motorcycle_right"} & side for side in (train, val)]
    assert sorted(map(len, sides)) == [0, 2]


def test_no_training_tile_shows_a_held_out_photograph(data: Path) -> None:
    """By content, not by name: no 16x16 patch of a held-out photograph occurs at the corner of a tile."""
    held_out = [picture(file) for file in sorted((data / "val/HR").iterdir())]
    corners = {picture(file)[:16, :16].numpy().tobytes() for file in (data / "train/HR").iterdir()}
    for photograph in held_out:
        windows = photograph.unfold(0, 16, 8).unfold(1, 16, 8).permute(0, 1, 3, 4, 2).reshape(-1, 16 * 16 * 3)
        assert not corners & {window.contiguous().numpy().tobytes() for window in windows}


@pytest.mark.promise("R26")
def test_low_resolution_is_what_matlab_would_make(data: Path) -> None:
    for file in (data / "val/HR").iterdir():
        assert torch.equal(picture(data / "val/LR_x2" / file.name), matlab_bicubic(picture(file), 2))
    for file in sorted((data / "train/HR").iterdir())[::10]:
        # The photograph was shrunk as a whole: at the borders of a tile the kernel saw beyond them.
        expected = matlab_bicubic(picture(file), 2)[2:-2, 2:-2]
        assert torch.equal(picture(data / "train/LR_x2" / file.name)[2:-2, 2:-2], expected)


@pytest.mark.parametrize(("file", "name"), [("train.yml", "LCoAN"), ("train_ELAN.yml", "ELAN")])
def test_option_file_is_the_preset_and_fits_the_data(file: str, name: str, data: Path) -> None:
    options = yaml.safe_load((DEMO / file).read_text())
    network = dict(options["network_g"])
    assert network.pop("type") == name
    assert network.pop("upscale") == options["scale"] == 2
    assert network == PRESETS[f"{name}-light"].options
    crop = options["datasets"]["train"]["gt_size"]
    assert min(min(picture(tile).shape[:2]) for tile in (data / "train/HR").iterdir()) >= crop


def test_the_option_file_of_elan_differs_where_it_must() -> None:
    """Data, model and what is logged are those of the demo."""
    lcoan, elan = (yaml.safe_load((DEMO / file).read_text()) for file in ("train.yml", "train_ELAN.yml"))
    for options in (lcoan, elan):
        del options["name"], options["network_g"], options["datasets"]["train"]["gt_size"]
        del options["train"]["optim_g"]["lr"], options["train"]["scheduler"]["periods"]
        del options["train"]["ema_decay"], options["train"]["total_iter"]
        del options["val"]["val_freq"], options["logger"]["save_checkpoint_freq"]
    assert elan == lcoan


def test_the_network_without_attention_gets_the_same_training() -> None:
    lcoan, plain = (yaml.safe_load((DEMO / file).read_text()) for file in ("train.yml", "train_plain.yml"))
    sizes = [
        sum(parameter.numel() for parameter in build(**network).parameters())
        for build, network in ((LCoAN, lcoan.pop("network_g")), (EDSR, plain.pop("network_g")))
        if network.pop("type")
    ]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)
    assert {**plain, "name": lcoan["name"]} == lcoan


def test_report_says_what_to_run_first(tmp_path: Path) -> None:
    done = run(DEMO / "report.py", "--root", tmp_path, "--out", tmp_path, cwd=tmp_path, check=False)
    assert done.returncode != 0
    assert "net_g_latest.pth is missing; train first" in done.stderr
    assert "Traceback" not in done.stderr
    assert names(tmp_path) == []


@pytest.mark.slow
def test_from_photographs_to_the_report(data: Path, tmp_path: Path) -> None:
    """Train twice for a moment: the report is whole, refuses the small gain, and the first run is kept."""
    for part in ("train", "val"):
        for folder in ("HR", "LR_x2"):
            (tmp_path / "data" / part / folder).mkdir(parents=True)
            for file in sorted((data / part / folder).iterdir())[:4]:
                shutil.copy(file, tmp_path / "data" / part / folder)
    options = yaml.safe_load((DEMO / "train.yml").read_text())
    options["network_g"] |= {"num_feat": 8, "num_group": 2, "num_block": 1, "num_clusters": 8}
    options["train"] |= {"total_iter": 6}
    options["train"]["scheduler"]["periods"] = [6]
    options["val"]["val_freq"] = 3
    options["logger"] |= {"print_freq": 2, "save_checkpoint_freq": 3}
    (tmp_path / "tiny.yml").write_text(yaml.safe_dump(options))
    plain = {
        **options,
        "name": "EDSR",
        "network_g": {"type": "SparseEDSR", "num_feat": 8, "num_block": 2, "upscale": 2},
    }
    (tmp_path / "plain.yml").write_text(yaml.safe_dump(plain))
    for file in ("tiny.yml", "tiny.yml", "plain.yml"):
        run("-m", "sparse_sr_attn", "train", "-opt", file, cwd=tmp_path)
    experiments = names(tmp_path / "experiments")
    assert experiments[:2] == ["EDSR", options["name"]]
    assert len(experiments) == 3

    command = [DEMO / "report.py", "--opt", "tiny.yml", "--plain", "plain.yml", "--root", tmp_path, "--out", tmp_path]
    done = run(*command, cwd=tmp_path, check=False)
    assert done.returncode != 0
    assert "the gain over bicubic must be >= 0.5 dB, got -" in done.stderr
    assert "Traceback" not in done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report) == {
        *("psnr_bicubic", "psnr", "ssim_bicubic", "ssim", "psnr_without_attention", "psnr_plain", "seconds")
    }
    assert 30 < report["psnr_bicubic"] < 36
    assert report["psnr"] < report["psnr_bicubic"]
    assert 0 <= report["seconds"] < 300
    assert "mean" in done.stdout
    height, width = picture(tmp_path / "demo.png").shape[:2]
    assert width >= 1000
    assert height >= 800
