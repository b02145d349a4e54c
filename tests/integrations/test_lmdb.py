"""Images in an LMDB: they train, and what is wrong with an entry is said of that entry."""

import itertools
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import pytest
import torch
from basicsr.data import build_dataset

from sparse_sr_attn.cli.main import main
from sparse_sr_attn_basicsr.data import PortableDataset, SampleError

Change = Callable[[dict[str, bytes]], Any]


def write(folder: Path, entries: dict[str, bytes], names: list[str]) -> None:
    """Write an LMDB as BasicSR's scripts do."""
    with lmdb.open(str(folder), map_size=2**24) as database, database.begin(write=True) as transaction:
        for key, value in entries.items():
            transaction.put(key.encode(), value)
    (folder / "meta_info.txt").write_text("".join(f"{name}.png (64,64,3) 1\n" for name in names))


@pytest.fixture
def databases(here: Path) -> Callable[..., dict[str, Any]]:
    """Write the photographs into databases, with changes to the entries; return the options of a data set."""

    def make(part: str = "train", high: Change = id, low: Change = id) -> dict[str, Any]:
        for quality, change in (("HR", high), ("LR", low)):
            files = sorted((here / "datasets" / part / quality).glob("*.png"))
            entries = {file.stem: file.read_bytes() for file in files}
            change(entries)
            write(here / f"{part}_{quality}.lmdb", entries, [file.stem for file in files])
        return {
            f"datasets.{part}.dataroot_gt": f"{part}_HR.lmdb",
            f"datasets.{part}.dataroot_lq": f"{part}_LR.lmdb",
            f"datasets.{part}.io_backend": {"type": "lmdb"},
        }

    return make


@pytest.mark.parametrize("workers", [0, 1])
def test_it_trains_and_validates(
    databases: Callable[..., Any], training: Callable[..., str], remarks: Callable[..., list[str]], workers: int
) -> None:
    changes = {**databases("train"), **databases("val"), "datasets.train.num_worker_per_gpu": workers}
    assert remarks(changes) == []
    assert main(["train", "-opt", training(changes)]) == 0  # the database can be opened again


BROKEN: dict[str, tuple[Change, str]] = {
    "missing": (lambda entries: entries.pop("2"), "has no such entry, although meta_info.txt beside it lists it"),
    "empty": (lambda entries: entries.update({"2": b""}), "holds 0 bytes that are not an image, or a damaged one"),
    "text": (lambda entries: entries.update({"2": b"hello"}), "holds 5 bytes that are not an image, or a damaged one"),
    "half": (
        lambda entries: entries.update({"2": entries["2"][:40]}),
        "holds 40 bytes that are not an image, or a damaged",
    ),
}


@pytest.mark.parametrize(("how", "quality"), list(zip(BROKEN, itertools.cycle(["HR", "LR"]), strict=False)))
def test_an_entry_that_is_broken_ends_the_run_with_its_name(
    databases: Callable[..., Any],
    training: Callable[..., str],
    how: str,
    quality: str,
    capsys: pytest.CaptureFixture[str],
    here: Path,
) -> None:
    change, message = BROKEN[how]
    file = training(databases("train", **{"high" if quality == "HR" else "low": change}))
    assert main(["train", "-opt", file]) == 1  # key 2 is not the first, so the preflight does not meet it
    told = capsys.readouterr().err.rpartition("sparse-sr: ")[2]
    assert told.startswith(f"train_{quality}.lmdb, key '2': {message}")
    assert "No such file" not in told
    assert "Fix the cause, then resume with --auto_resume" in told


def test_the_first_entry_is_looked_at_before_the_start(
    databases: Callable[..., Any], training: Callable[..., str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = databases("train", low=lambda entries: entries.update({"0": b"hello"}))
    assert main(["train", "-opt", training(changes)]) == 2
    errors = capsys.readouterr().err
    message = BROKEN["text"][1]
    assert f"datasets.train: the first sample cannot be read: train_LR.lmdb, key '0': {message}" in errors
    assert "1 problem in" in errors
    assert not (here / "experiments").exists()


def small(entries: dict[str, bytes], folder: Path, side: int = 10) -> None:
    from skimage import io

    image = io.imread(folder / "2.png")
    io.imsave(folder.parents[2] / "small.png", image[:side, :side], check_contrast=False)
    entries["2"] = (folder.parents[2] / "small.png").read_bytes()


def test_an_error_that_is_not_of_the_file_is_told_as_it_is(
    databases: Callable[..., Any], training: Callable[..., str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images that can be read, and are smaller than a patch."""
    source = (here / "datasets").resolve()
    (here / "datasets").unlink()
    shutil.copytree(source, here / "datasets")
    file = training(
        databases(
            "train",
            high=lambda entries: small(entries, here / "datasets/train/HR", 20),
            low=lambda entries: small(entries, here / "datasets/train/LR", 10),
        )
    )
    assert main(["train", "-opt", file]) == 1
    told = capsys.readouterr().err.rpartition("sparse-sr: ")[2]
    assert told.startswith(
        "train_LR.lmdb, key '2' and train_HR.lmdb, key '2': ValueError: LQ (10, 10) is smaller than patch"
    )
    assert "No such file" not in told


def test_a_database_of_single_images(databases: Callable[..., Any], here: Path) -> None:
    databases("val", low=lambda entries: entries.update({"1": b"hello"}))
    options = {
        "name": "v",
        "type": "SingleImageDataset",
        "dataroot_lq": "val_LR.lmdb",
        "io_backend": {"type": "lmdb"},
        "phase": "val",
    }
    dataset = PortableDataset(build_dataset(options))
    assert isinstance(dataset[0]["lq"], torch.Tensor)
    with pytest.raises(SampleError, match=r"^val_LR\.lmdb, key '1': holds 5 bytes that are not an image"):
        dataset[1]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "data.mdb").unlink(), r"the first sample cannot be read: .*(Error|lmdb)"),
        (lambda root: (root / "meta_info.txt").unlink(), r"datasets\.train: .*No such file or directory"),
        (lambda root: (root / "meta_info.txt").write_text(""), r"datasets\.train: .*Keys in lq_folder and gt_folder"),
        (lambda root: (root / "data.mdb").write_bytes(b"junk"), r"the first sample cannot be read: .*(Error|lmdb)"),
    ],
)
def test_a_database_that_is_none_is_refused_before_the_start(
    databases: Callable[..., Any], problem: Callable[..., str], here: Path, spoil: Any, message: str
) -> None:
    changes = databases("train")
    spoil(here / "train_LR.lmdb")
    assert re.fullmatch(f".*{message}.*", problem(changes))  # in a line
