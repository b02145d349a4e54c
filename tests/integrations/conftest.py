"""Small real data, option files and a clean BasicSR for every test."""

import copy
import functools
import importlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from skimage import data, io

from sparse_sr_attn import ConfigError
from sparse_sr_attn_basicsr import preflight, register
from sparse_sr_attn_basicsr.option_file import load

register()  # before any test module imports basicsr

EDSR = {
    "type": "SparseEDSR",
    "num_feat": 8,
    "num_block": 4,
    "upscale": 2,
    "img_range": 1.0,
    "attention": {"type": "LCoA", "every": 2, "share": 2, "num_clusters": 8, "chunk_size": 16},
}
LCOAN = {
    "type": "LCoAN",
    "num_feat": 8,
    "num_group": 2,
    "num_block": 1,
    "upscale": 2,
    "num_clusters": 8,
    "chunk_size": 16,
    "reduction": 2,
}
ELAN = {"type": "ELAN", "num_feat": 12, "num_block": 2, "share": 2, "upscale": 2, "window_sizes": [2, 4, 8]}
PSNR = {"type": "calculate_psnr", "crop_border": 2, "test_y_channel": True}


def dataset(part: str) -> dict[str, Any]:
    return {
        "name": part,
        "type": "PairedImageDataset",
        "dataroot_gt": f"datasets/{part}/HR",
        "dataroot_lq": f"datasets/{part}/LR",
        "io_backend": {"type": "disk"},
    }


TRAINING: dict[str, Any] = {
    "name": "tiny",
    "model_type": "SparseSRModel",
    "scale": 2,
    "num_gpu": 0,
    "manual_seed": 0,
    "datasets": {
        "train": {
            **dataset("train"),
            "gt_size": 32,
            "use_hflip": True,
            "use_rot": True,
            "num_worker_per_gpu": 0,
            "batch_size_per_gpu": 2,
            "dataset_enlarge_ratio": 10,
        },
        "val": dataset("val"),
    },
    "network_g": EDSR,
    "path": {"pretrain_network_g": None},
    "train": {
        "ema_decay": 0.9,
        "optim_g": {"type": "Adam", "lr": 1e-3},
        "scheduler": {"type": "MultiStepLR", "milestones": [100], "gamma": 0.5},
        "total_iter": 4,
        "pixel_opt": {"type": "L1Loss"},
    },
    "val": {"val_freq": 4, "metrics": {"psnr": PSNR}},
    "logger": {"print_freq": 1, "save_checkpoint_freq": 4},
}

TESTING: dict[str, Any] = {
    **{key: TRAINING[key] for key in ("model_type", "scale", "num_gpu", "manual_seed", "network_g")},
    "name": "tiny_test",
    "datasets": {"test_1": dataset("val")},
    "path": {"pretrain_network_g": "experiments/tiny/models/net_g_latest.pth", "param_key_g": "params_ema"},
    "val": {"save_img": True, "metrics": {"psnr": PSNR}},
}


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `datasets/train` and `datasets/val`: crops of photographs, 64x64, and their halves."""
    root = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for part, images in {"train": [data.astronaut(), data.coffee()], "val": [data.chelsea()]}.items():
        for quality in ("HR", "LR"):
            (root / "datasets" / part / quality).mkdir(parents=True)
        for number in range(3 * len(images)):
            image = images[number % len(images)]
            top, left = (int(rng.integers(0, size - 64)) for size in image.shape[:2])
            crop = image[top : top + 64, left : left + 64]
            half = crop.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3)).round().astype(np.uint8)
            io.imsave(root / "datasets" / part / "HR" / f"{number}.png", crop, check_contrast=False)
            io.imsave(root / "datasets" / part / "LR" / f"{number}.png", half, check_contrast=False)
    return root


@pytest.fixture
def here(photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a new folder that sees the photographs."""
    (tmp_path / "datasets").symlink_to(photographs / "datasets", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def changed(options: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return the options with `{"train.total_iter": 8}` put in; a value of `...` takes the option away."""
    options = copy.deepcopy(options)
    for path, value in changes.items():
        *outer, last = path.split(".")
        target = options
        for name in outer:
            target = target[name]
        if value is ...:
            del target[last]
        else:
            target[last] = copy.deepcopy(value)
    return options


@pytest.fixture(scope="session")
def write_training() -> Callable[..., str]:
    """Write a training option file, with changes, into a folder; return its name."""

    def write(folder: Path, changes: dict[str, Any] | None = None, name: str = "train.yml") -> str:
        (folder / name).write_text(yaml.safe_dump(changed(TRAINING, changes or {}), sort_keys=False))
        return name

    return write


@pytest.fixture
def training(here: Path, write_training: Callable[..., str]) -> Callable[..., str]:
    """Write a training option file, with changes, into the working directory; return its name."""
    return functools.partial(write_training, here)


@pytest.fixture
def options(training: Callable[..., str], here: Path) -> Callable[..., dict[str, Any]]:
    """Options of a training file, with changes, as BasicSR hands them to a model."""

    def make(changes: dict[str, Any] | None = None) -> dict[str, Any]:
        opt, _ = preflight.check(load(training(changes)), training=True)
        folders = {name: str(here / name) for name in ("models", "training_states")}
        for folder in folders.values():
            Path(folder).mkdir(exist_ok=True)
        return {**opt, "path": {**opt["path"], **folders}, "is_train": True, "dist": False}

    return make


@pytest.fixture
def remarks(training: Callable[..., str]) -> Callable[..., list[str]]:
    """The remarks on a training file that is right, with changes."""
    return lambda changes: preflight.check(load(training(changes)), training=True)[1]


@pytest.fixture
def problem(training: Callable[..., str]) -> Callable[..., str]:
    """The one problem of a training file, with changes."""

    def find(changes: dict[str, Any]) -> str:
        with pytest.raises(ConfigError) as caught:
            preflight.check(load(training(changes)), training=True)
        assert len(caught.value.problems) == 1
        return str(caught.value)

    return find


@pytest.fixture
def testing(here: Path) -> Callable[..., str]:
    """Write a test option file, with changes, into the working directory; return its name."""

    def write(changes: dict[str, Any] | None = None, name: str = "test.yml") -> str:
        (here / name).write_text(yaml.safe_dump(changed(TESTING, changes or {}), sort_keys=False))
        return name

    return write


@pytest.fixture(autouse=True)
def clean_log() -> None:
    """Have BasicSR open its log anew: pytest replaces the stream that it writes to."""
    logger = logging.getLogger("basicsr")
    logger.handlers.clear()
    logger.propagate = False  # as BasicSR sets it later; so caplog captures it in a first test too
    importlib.import_module("basicsr.utils.logger").initialized_logger.clear()


@pytest.fixture(params=[EDSR, LCOAN, ELAN], ids=["SparseEDSR", "LCoAN", "ELAN"])
def network(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The options of each of our networks, tiny."""
    return copy.deepcopy(request.param)


@pytest.fixture
def elan() -> dict[str, Any]:
    """The options of a tiny ELAN."""
    return copy.deepcopy(ELAN)
