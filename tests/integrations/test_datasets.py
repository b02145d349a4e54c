"""`CachedPairedImageDataset`: BasicSR's samples, each image read once, and a teacher's images mixed in."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from basicsr.data import build_dataset
from skimage import io

from sparse_sr_attn.cli.main import main

HR, LR = "datasets/train/HR", "datasets/train/LR"
CACHED = {"datasets.train.type": "CachedPairedImageDataset"}


def options(**changes: Any) -> dict[str, Any]:
    return {
        "name": "train",
        "type": "CachedPairedImageDataset",
        "dataroot_gt": HR,
        "dataroot_lq": LR,
        "io_backend": {"type": "disk"},
        "gt_size": 32,
        "use_hflip": True,
        "use_rot": True,
        "scale": 2,
        "phase": "train",
    } | changes


def samples(dataset: Any, *, seed: int = 0) -> list[dict[str, Any]]:
    random.seed(seed)
    return [dataset[index % len(dataset)] for index in range(20)]


@pytest.mark.parametrize(
    "changes",
    [{}, {"color": "y"}, {"mean": [0.4, 0.5, 0.6], "std": [0.1, 0.2, 0.3]}, {"phase": "val"}, {"use_rot": False}],
    ids=str,
)
def test_samples_are_those_of_basicsr(here: Path, changes: dict[str, Any]) -> None:
    expected = samples(build_dataset(options(type="PairedImageDataset", **changes)))
    cached = build_dataset(options(**changes))
    for _ in range(2):  # from files, then from memory
        for ours, theirs in zip(samples(cached), expected, strict=True):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ("lq", "gt"))
            assert (ours["lq_path"], ours["gt_path"]) == (theirs["lq_path"], theirs["gt_path"])


def test_each_image_is_read_once(here: Path) -> None:
    shutil.copytree("datasets/train", "copy")
    dataset = build_dataset(options(dataroot_gt="copy/HR", dataroot_lq="copy/LR"))
    before = samples(dataset)
    shutil.rmtree("copy")
    assert all(torch.equal(a["gt"], b["gt"]) for a, b in zip(before, samples(dataset), strict=True))


@pytest.mark.parametrize("weight", [0, 0.25, 1])
def test_the_teacher_is_mixed_into_the_target(here: Path, weight: float) -> None:
    Path("teacher").mkdir()
    for file in Path(HR).glob("*.png"):
        io.imsave(Path("teacher", file.name), 255 - io.imread(file), check_contrast=False)
    taught = samples(build_dataset(options(dataroot_teacher="teacher", teacher_weight=weight)))
    for ours, plain in zip(taught, samples(build_dataset(options())), strict=True):
        torch.testing.assert_close(ours["gt"], (1 - weight) * plain["gt"] + weight * (1 - plain["gt"]))
        assert torch.equal(ours["lq"], plain["lq"])


def test_a_teacher_that_does_not_fit_is_named(here: Path) -> None:
    Path("teacher").mkdir()
    for file in Path(HR).glob("*.png"):
        io.imsave(Path("teacher", file.name), io.imread(file)[:-1], check_contrast=False)
    with pytest.raises(ValueError, match=r"teacher/\d\.png must be of shape \(64, 64, 3\), .* got \(63, 64, 3\)"):
        build_dataset(options(dataroot_teacher="teacher"))[0]
    with pytest.raises(ValueError, match=r"teacher_weight must be in \[0, 1\], got 1\.5"):
        build_dataset(options(dataroot_teacher="teacher", teacher_weight=1.5))


@pytest.mark.parametrize("workers", [0, 1])
def test_it_trains(here: Path, training: Callable[..., str], remarks: Callable[..., list[str]], workers: int) -> None:
    shutil.copytree(HR, "teacher")
    changes = {"datasets.train.dataroot_teacher": "teacher", "datasets.train.num_worker_per_gpu": workers}
    assert remarks(CACHED | changes) == []
    assert main(["train", "-opt", training(CACHED | changes)]) == 0


def test_a_missing_teacher_stops_before_training(problem: Callable[..., str]) -> None:
    assert "datasets.train.dataroot_teacher" in problem(CACHED | {"datasets.train.dataroot_teacher": "nowhere"})
