"""In the folder of a project with a BasicSR of its own, the commands run that one."""

import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import basicsr
import pytest

Write = Callable[..., str]

SCRIPT = Path(sysconfig.get_path("scripts")) / "sparse-sr"  # Python does not look for modules in the working directory
OF_THE_FORK = """
from torch import nn
from basicsr.utils.registry import ARCH_REGISTRY

@ARCH_REGISTRY.register()
class OfTheFork(nn.Module):
    def __init__(self, upscale=2):
        super().__init__()
        self.conv_first = nn.Conv2d(3, 3 * upscale**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(upscale)

    def forward(self, x):
        return self.shuffle(self.conv_first(x))
"""


@pytest.fixture
def fork(here: Path) -> Path:
    """A folder with a BasicSR that has one network more."""
    shutil.copytree(Path(basicsr.__file__).parent, here / "basicsr", ignore=shutil.ignore_patterns("__pycache__"))
    (here / "basicsr/archs/fork_arch.py").write_text(OF_THE_FORK)
    return here


def run(*command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_train_and_test_run_the_basicsr_of_the_fork(training: Write, testing: Write, fork: Path) -> None:
    """By the command and as a module, with loader processes, and without the fork's own training script."""
    for script in ("train", "test"):
        (fork / f"basicsr/{script}.py").write_text("")
    changes = {"network_g": {"type": "OfTheFork"}, "datasets.train.num_worker_per_gpu": 1}
    for command in ([str(SCRIPT)], [sys.executable, "-m", "sparse_sr_attn"]):
        trained = run(*command, "train", "-opt", training(changes))
        assert trained.returncode == 0, trained.stderr
        assert f"sparse-sr: note: using the BasicSR of this folder, {fork / 'basicsr'}" in trained.stderr
        assert "Network [OfTheFork] is created" in trained.stdout + trained.stderr
    tested = run(str(SCRIPT), "test", "-opt", testing({"network_g": {"type": "OfTheFork"}}))
    assert tested.returncode == 0, tested.stderr


@pytest.mark.slow
def test_a_fork_that_lacks_parts_is_told_apart(training: Write, fork: Path) -> None:
    file = training({"network_g": {"type": "OfTheFork"}})
    part = fork / "basicsr/data/data_sampler.py"
    part.write_text(part.read_text().replace("EnlargedSampler", "OtherSampler"))
    (fork / "basicsr/train.py").write_text("")  # which imports it too
    lacking = run(str(SCRIPT), "train", "-opt", file)
    assert lacking.returncode == 1
    assert lacking.stderr.splitlines()[-1].startswith(
        "sparse-sr: this BasicSR lacks a part of BasicSR 1.4.2: cannot import name 'EnlargedSampler' from "
    )
    (fork / "basicsr/__init__.py").unlink()
    bare = run(str(SCRIPT), "train", "-opt", file)
    assert bare.returncode == 2
    assert "basicsr must have an __init__.py" in bare.stderr
    assert not (fork / "experiments").exists()


def test_another_basicsr_that_is_imported_already_is_not_taken_for_it(
    training: Write, fork: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sparse_sr_attn.cli.main import main

    assert main(["train", "-opt", training()]) == 2
    assert "the BasicSR of this folder cannot be used, because " in capsys.readouterr().err
    assert not (fork / "experiments").exists()
