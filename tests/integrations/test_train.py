"""The whole path with the real BasicSR on photographs: train, stop, resume, test."""

import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from basicsr.archs import build_network, edsr_arch
from basicsr.data.paired_image_dataset import PairedImageDataset
from basicsr.utils import set_random_seed
from basicsr.utils.registry import DATASET_REGISTRY
from skimage import io

from sparse_sr_attn import load_model
from sparse_sr_attn.cli.main import main
from sparse_sr_attn_basicsr.option_file import load

Write = Callable[..., str]


@DATASET_REGISTRY.register()
class OneBrokenImage(PairedImageDataset):
    """Photographs, of which one has a pixel that is no number; not the first, at which the preflight looks."""

    def __init__(self, opt: dict[str, Any]) -> None:
        super().__init__(opt)
        self.paths.sort(key=lambda paths: paths["lq_path"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample: dict[str, Any] = super().__getitem__(index)
        if sample["lq_path"].endswith("3.png"):
            sample["lq"][0, 5, 5] = float("nan")
        return sample


def weights(file: Path, key: str = "params") -> dict[str, torch.Tensor]:
    return torch.load(file, map_location="cpu", weights_only=True)[key]


def updates(file: Path) -> set[int]:
    """Return how often k-means, or BatchNorm, has moved."""
    counts = ("num_updates", "num_batches_tracked")
    return {int(value) for name, value in weights(file).items() if name.endswith(counts)}


def log_of(folder: Path) -> str:
    return "".join(file.read_text() for file in sorted(folder.glob("*.log")))


def test_train_resume_and_test(training: Write, testing: Write, network: dict[str, Any], here: Path) -> None:
    benchmark = torch.backends.cudnn.benchmark
    file = training({"network_g": network})
    assert main(["train", "-opt", file]) == 0

    folder = here / "experiments" / "tiny"
    models = folder / "models"
    assert {p.name for p in models.iterdir()} == {"net_g_4.pth", "net_g_latest.pth"}
    first = log_of(folder)
    assert re.search(r"iter: +4, .*l_pix: \d", first)
    assert "Validation val" in first
    assert updates(models / "net_g_4.pth") == ({4} if network["type"] == "ELAN" else {3})  # the fourth is pending
    assert (folder / file).read_text().splitlines()[1] == f"# sparse-sr train -opt {file}"

    # Resumed with nothing left to do, it saves what it has loaded.
    assert main(["train", "-opt", file, "--auto_resume"]) == 0
    for key in ("params", "params_ema"):
        resumed, saved = (weights(models / f"net_g_{name}.pth", key) for name in ("latest", "4"))
        torch.testing.assert_close(resumed, saved, rtol=0, atol=0)

    assert main(["train", "-opt", file, "--auto_resume", "--force_yml", "train:total_iter=8"]) == 0
    assert (folder / "training_states" / "8.state").is_file()
    assert [p.name for p in (here / "experiments").iterdir()] == ["tiny"]  # gone on, not begun again
    assert re.search(r"Resuming training from epoch: 0, iter: 4", log_of(folder))
    assert (folder / file).read_text().splitlines()[1].endswith("--auto_resume --force_yml train:total_iter=8")
    assert updates(models / "net_g_8.pth") == ({8} if network["type"] == "ELAN" else {7})

    assert main(["test", "-opt", testing({"network_g": network})]) == 0
    results = here / "results" / "tiny_test"
    pictures = sorted((results / "visualization" / "val").iterdir())
    assert [p.name for p in pictures] == [f"{i}_tiny_test.png" for i in range(3)]
    assert io.imread(pictures[0]).shape == (64, 64, 3)
    trained = re.findall(r"# psnr: (\d+\.\d+)", log_of(folder))[-1]
    assert re.findall(r"# psnr: (\d+\.\d+)", log_of(results)) == [trained]

    assert torch.backends.cudnn.benchmark == benchmark
    assert sorted(p.name for p in here.iterdir()) == ["datasets", "experiments", "results", "test.yml", "train.yml"]


HOSTS = ("basicsr", "sys", "logging", "signal", "torch", "torch.hub", "torch.utils.data", "torchvision.models._api")


def callables() -> dict[str, Any]:
    """Return every function and class of BasicSR and of what it stands on, with the methods of the classes."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name in HOSTS or name.startswith("basicsr."):
            values = {f"{name}.{key}": value for key, value in vars(module).items() if callable(value)}
            classes = {key: value for key, value in values.items() if isinstance(value, type)}
            methods = {f"{key}.{k}": v for key, value in classes.items() for k, v in vars(value).items() if callable(v)}
            found |= values | methods
    return found


@DATASET_REGISTRY.register()
class LookingDataset(PairedImageDataset):
    """Looks at what is replaced while a run reads its samples."""

    before: ClassVar[dict[str, Any]] = {}
    replaced: ClassVar[set[str]] = set()

    def __getitem__(self, index: int) -> dict[str, Any]:
        now = callables()
        self.replaced.update(name for name, value in self.before.items() if now.get(name) is not value)
        return super().__getitem__(index)


def test_nothing_of_basicsr_or_torch_is_replaced(training: Write, testing: Write) -> None:
    """Not by the check of the options, which reads a sample, nor in training, validation and testing."""
    looking = {"type": "LookingDataset"}
    changes = {f"datasets.{part}.{name}": value for part in ("train", "val") for name, value in looking.items()}
    importlib.import_module("sparse_sr_attn_basicsr.train")
    LookingDataset.before = callables()
    assert main(["train", "-opt", training(changes)]) == 0
    assert main(["test", "-opt", testing({"datasets.test_1.type": "LookingDataset"})]) == 0
    assert LookingDataset.replaced == set()


def test_the_first_weights_follow_from_the_seed_alone(training: Write, here: Path) -> None:
    """They are those of `build_network` right after seeding, as in BasicSR, whatever reads the data."""
    still = {"train.optim_g": {"type": "SGD", "lr": 1e-30}, "train.total_iter": 1, "val": ..., "manual_seed": 3}
    file = training({**still, "datasets.train.num_worker_per_gpu": 1})
    set_random_seed(3)
    expected = dict(build_network(load(file)["network_g"]).named_parameters())
    assert main(["train", "-opt", file]) == 0
    saved = weights(here / "experiments/tiny/models/net_g_latest.pth")
    for name, value in expected.items():
        torch.testing.assert_close(saved[name], value.data, rtol=0, atol=1e-20)


def test_a_line_comes_after_the_first_iteration_and_when_it_is_slow(
    training: Write, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = training({"logger.print_freq": 100, "val": ...})
    for silence, expected in ((15.0, ["1"]), (0.0, ["1", "2", "3", "4"])):
        monkeypatch.setattr("sparse_sr_attn_basicsr.train._LONGEST_SILENCE", silence)
        assert main(["train", "-opt", file]) == 0
        assert re.findall(r"iter: +(\d+), .*eta: .*l_pix: \d", log_of(here / "experiments" / "tiny")) == expected


def test_a_new_run_keeps_the_old_one(training: Write, here: Path) -> None:
    file = training()
    assert main(["train", "-opt", file]) == 0
    kept = weights(here / "experiments/tiny/models/net_g_4.pth")
    assert main(["train", "-opt", file, "--force_yml", "manual_seed=1"]) == 0
    archived = next((here / "experiments").glob("tiny_archived_*"))
    torch.testing.assert_close(weights(archived / "models/net_g_4.pth"), kept, rtol=0, atol=0)


def test_the_copy_of_the_options_can_be_resumed_from(training: Write, here: Path) -> None:
    assert main(["train", "-opt", training()]) == 0
    assert main(["train", "-opt", "experiments/tiny/train.yml", "--auto_resume"]) == 0
    copied = load(here / "experiments" / "tiny" / "train.yml")
    assert copied == load(here / "train.yml")


def test_a_broken_image_stops_training_and_loses_nothing(
    training: Write, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = training({"datasets.train.type": "OneBrokenImage", "train.total_iter": 50, "val": ...})
    assert main(["train", "-opt", file]) == 1
    captured = capsys.readouterr().err
    assert "Traceback" not in captured
    found = re.search(r"sparse-sr: after iteration (\d+): pixels must be finite", captured)
    assert found is not None, captured
    iteration = int(found[1])
    assert "datasets/train/LR/3.png" in captured
    folder = here / "experiments" / "tiny"
    assert (
        f"The state after iteration {iteration} is saved: {folder / 'training_states' / f'{iteration}.state'}"
        in captured
    )
    saved = weights(folder / "models" / f"net_g_{iteration}.pth")
    assert all(value.isfinite().all() for value in saved.values())

    again = training({"train.total_iter": iteration + 2, "val": ...})
    assert main(["train", "-opt", again, "--auto_resume"]) == 0
    assert f"iter: {iteration}." in log_of(folder)


def test_a_broken_image_in_the_first_batch(training: Write, here: Path) -> None:
    changes = {
        "datasets.train.type": "OneBrokenImage",
        "datasets.train.batch_size_per_gpu": 6,
        "datasets.train.dataset_enlarge_ratio": 1,
        "val": ...,
    }
    assert main(["train", "-opt", training(changes)]) == 1
    assert (here / "experiments" / "tiny" / "training_states" / "0.state").is_file()
    assert main(["train", "-opt", training(), "--auto_resume"]) == 0


def test_a_broken_image_in_a_test_is_named(training: Write, testing: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "-opt", training()]) == 0
    changes = {"datasets.test_1.type": "OneBrokenImage", "datasets.test_1.dataroot_gt": "datasets/train/HR"}
    changes["datasets.test_1.dataroot_lq"] = "datasets/train/LR"
    assert main(["test", "-opt", testing(changes)]) == 1
    error = capsys.readouterr().err
    assert (
        "sparse-sr: pixels must be finite, but NaN or infinity is in these images:\n  datasets/train/LR/3.png" in error
    )


def test_a_learning_rate_far_too_high_stops_with_finite_weights(
    training: Write, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "-opt", training({"train.optim_g.lr": 1e12, "train.total_iter": 30, "val": ...})]) == 1
    assert re.search(r"iteration \d+: the (loss|gradient) must be finite", capsys.readouterr().err)
    for file in (here / "experiments" / "tiny" / "models").iterdir():
        assert all(value.isfinite().all() for value in weights(file).values())


def test_a_run_can_be_interrupted_and_resumed(training: Write, here: Path) -> None:
    file = training({"train.total_iter": 100_000, "logger.save_checkpoint_freq": 5, "val": ...})
    command = [sys.executable, "-m", "sparse_sr_attn", "train", "-opt", file]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell that starts us in the background has us ignore it, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    ) as process:
        state = here / "experiments" / "tiny" / "training_states" / "5.state"
        deadline = time.monotonic() + 120
        try:
            while not state.exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            output = process.communicate(timeout=60)[0]
        finally:
            process.kill()
    assert process.returncode == 130, output
    assert "sparse-sr: interrupted; `--auto_resume` resumes from the last saved state, or starts over" in output
    assert "Traceback" not in output
    states = [int(path.stem) for path in state.parent.iterdir()]
    assert main(["train", "-opt", file, "--auto_resume", "--force_yml", f"train:total_iter={max(states) + 1}"]) == 0
    assert os.path.getsize(state) > 0


def test_an_edsr_of_another_range_gives_the_same_image(training: Write, here: Path) -> None:
    """BasicSR's EDSR at 255 goes on at 1: scaled biases make up for it, in both networks, and once only."""
    size = {"num_in_ch": 3, "num_out_ch": 3, "num_feat": 8, "num_block": 4, "upscale": 2}
    torch.manual_seed(3)
    theirs = edsr_arch.EDSR(**size, img_range=255.0).eval()
    torch.save({"params": theirs.state_dict()}, here / "theirs.pth")
    path = {"pretrain_network_g": "theirs.pth", "strict_load_g": False}
    still = {
        "path": path,
        "train.pretrain_img_range": 255.0,
        "train.optim_g.lr": 1e-12,
        "train.total_iter": 2,
        "logger.save_checkpoint_freq": 1,
    }
    assert main(["train", "-opt", training(still)]) == 0
    assert main(["train", "-opt", training({**still, "train.total_iter": 3}), "--auto_resume"]) == 0
    x = torch.rand(1, 3, 6, 7)
    for key in ("params", "params_ema"):
        saved = torch.load(here / "experiments/tiny/models/net_g_3.pth", weights_only=True)[key]
        ours = load_model(saved).eval()
        assert ours.img_range == 1.0
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("train", [None, {"pretrain_img_range": 255.0}])
def test_testing_leaves_trained_weights_alone(train: object, training: Write, testing: Write, here: Path) -> None:
    """Whatever the option file of the test says of training: same validation figures, same weights."""
    assert main(["train", "-opt", training()]) == 0
    assert main(["test", "-opt", testing({"train": train})]) == 0
    last = {
        part: re.findall(r"# psnr: (\S+)", log_of(here / part))[-1]
        for part in ("experiments/tiny", "results/tiny_test")
    }
    assert len(set(last.values())) == 1, last


def psnr_reported(here: Path) -> str:
    (log,) = (here / "results/tiny_test").glob("*.log")
    (value,) = re.findall(r"# psnr: (\S+)", log.read_text())
    shutil.rmtree(here / "results")
    return str(value)


@pytest.mark.parametrize("model", ["SparseSRModel", "SRModel"])
def test_validation_test_and_upscale_take_the_averaged_weights(
    model: str,
    training: Write,
    testing: Write,
    here: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Unless `param_key_g` says otherwise; each says which it takes."""
    plain = {"model_type": model, "network_g.attention": None}
    assert main(["train", "-opt", training({**plain, "train.optim_g.lr": 1e-2})]) == 0
    validated = re.findall(r"# psnr: (\S+)", log_of(here / "experiments/tiny"))[-1]
    file = here / "experiments/tiny/models/net_g_latest.pth"
    content = torch.load(file, weights_only=True)

    def run(**path: object) -> tuple[str, str]:
        caplog.clear()
        told = {"pretrain_network_g": str(file), **path}
        assert main(["test", "-opt", testing({**plain, "path": told})]) == 0
        return psnr_reported(here), caplog.text

    value, said = run()
    assert value == validated
    assert f"testing the averaged weights (params_ema), as validation does, in {file}" in said
    raw, said = run(param_key_g="params")
    assert raw != validated
    assert "testing params in" in said
    assert "`sparse-sr upscale` take the averaged weights, params_ema" in said
    torch.save({"params": content["params"]}, file)
    assert run()[0] == raw
    assert "which has no params_ema" in run(param_key_g="params_ema")[1]
    torch.save(content["params_ema"], file)
    assert run()[0] == validated

    torch.save(content, file)
    capsys.readouterr()
    picture = "datasets/val/LR/0.png"
    assert main(["upscale", picture, "-w", str(file), "-o", "both.png", "--set", "img_range=1"]) == 0
    assert "using the averaged weights (params_ema, not params)" in capsys.readouterr().err
    torch.save(content["params_ema"], file)
    assert main(["upscale", picture, "-w", str(file), "-o", "one.png", "--set", "img_range=1"]) == 0
    assert "averaged" not in capsys.readouterr().err
    assert (here / "both.png").read_bytes() == (here / "one.png").read_bytes()
