"""Whenever a process dies, what it has saved can be resumed."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from basicsr.models import build_model

from sparse_sr_attn.cli.main import main
from sparse_sr_attn.errors import CheckpointError
from sparse_sr_attn_basicsr.state import remove, write

Write = Callable[..., str]


@contextmanager
def small_disk(num_bytes: int) -> Iterator[None]:
    """No file may grow beyond so many bytes inside."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write({"a": torch.zeros(10)}, file)
    with small_disk(10_000), pytest.raises(OSError, match="File too large"):
        write({"a": torch.ones(10_000)}, file)
    assert list(tmp_path.iterdir()) == [file]
    assert torch.equal(torch.load(file)["a"], torch.zeros(10))
    write({"a": torch.ones(10)}, file)
    assert torch.equal(torch.load(file)["a"], torch.ones(10))
    remove(file)
    remove(file)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_pickled_leaves_the_old_file(tmp_path: Path) -> None:
    write(1, tmp_path / "file")
    with pytest.raises(AttributeError, match=r"[Cc]an't"):
        write(lambda: None, tmp_path / "file")
    assert torch.load(tmp_path / "file") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.fixture
def model(options: Callable[..., dict[str, Any]]) -> Any:
    return build_model(options())


def tag(model: Any, value: float) -> None:
    """Mark weights and state, so that one can see which belong together."""
    with torch.no_grad():
        model.net_g.conv_last.bias.fill_(value)
    model.optimizers[0].param_groups[0]["lr"] = value


def tags(here: Path) -> dict[int, tuple[float, float]]:
    """Return the marks of the state and of its weights, for each state that is there."""
    found = {}
    for file in (here / "training_states").glob("*.state"):
        try:
            state = torch.load(file, weights_only=True)
            weights = torch.load(here / "models" / f"net_g_{file.stem}.pth", weights_only=True)["params"]
        except (OSError, RuntimeError) as error:
            raise AssertionError(f"{file} is there and cannot be resumed") from error
        found[int(file.stem)] = (state["optimizers"][0]["param_groups"][0]["lr"], float(weights["conv_last.bias"][0]))
    return found


def die_at(moment: int, folder: Path) -> None:
    """Have this process killed just before it opens, renames or removes a file in `folder` for the nth time."""
    passed = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal passed
        if event in ("open", "os.rename", "os.remove") and str(arguments[0]).startswith(str(folder)):
            passed += 1
            if passed == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def die_after(num_bytes: int) -> None:
    """Have this process killed when it has written so many bytes of some file."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def in_a_process_of_its_own(function: Callable[[], Any]) -> int:
    """Return the status with which it ends."""
    child = os.fork()
    if child == 0:
        function()
        os._exit(0)
    return os.waitpid(child, 0)[1]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_in_the_middle_of_a_file_state_and_weights_belong_together(model: Any, here: Path) -> None:
    model.feed_data({"lq": torch.rand(1, 3, 8, 8), "gt": torch.rand(1, 3, 16, 16)})
    model.optimize_parameters(1)
    for iteration in (1, 2):
        tag(model, iteration)
        model.save(0, iteration)
    weights, state = (path.stat().st_size for path in (here / "models/net_g_1.pth", here / "training_states/1.state"))
    assert 1.1 * weights < state  # whose length varies a little: Python writes small numbers in fewer bytes
    tag(model, 22.0)
    for num_bytes in (0, 1, weights // 2, weights - 1, weights, (weights + state) // 2):

        def save(most: int = num_bytes) -> None:
            die_after(most)
            model.save(0, 2)

        assert os.WTERMSIG(in_a_process_of_its_own(save)) == signal.SIGXFSZ, f"alive after {num_bytes} bytes"
        assert tags(here) == {1: (1.0, 1.0)}


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_before_any_file_operation_state_and_weights_belong_together(model: Any, here: Path) -> None:
    """Iteration 2 is saved over another one of an earlier run; a torn pair would join the two."""
    moments = 0
    done = False
    while not done:
        moments += 1
        for iteration in (1, 2):
            tag(model, iteration)
            model.save(0, iteration)
        tag(model, 22.0)

        def save(moment: int = moments) -> None:
            die_at(moment, here)
            model.save(0, 2)

        done = os.WIFEXITED(in_a_process_of_its_own(save))
        found = tags(here)
        assert found[1] == (1.0, 1.0)
        assert found.get(2, (2.0, 2.0)) in [(2.0, 2.0), (22.0, 22.0)]
    assert found[2] == (22.0, 22.0)
    # The old state goes; weights and state are opened, renamed and brought to the disk with their folder.
    assert moments > 8


def test_a_full_disk_is_logged_and_training_goes_on(capsys: pytest.CaptureFixture[str], model: Any, here: Path) -> None:
    tag(model, 1.0)
    model.save(0, 1)
    with small_disk(1000):
        model.save(0, 2)
    assert "cannot save iteration 0 in" in capsys.readouterr().err
    assert model.saved_iteration == 1
    assert tags(here) == {1: (1.0, 1.0)}
    with small_disk(1000), pytest.raises(CheckpointError, match="cannot save iteration 0 in .*File too large"):
        model.save(-1, -1)
    model.opt["dist"] = True
    with small_disk(1000), pytest.raises(CheckpointError, match="cannot save"):
        model.save(0, 2)


def newest(here: Path) -> int:
    return max((int(file.stem) for file in here.glob("experiments/tiny/training_states/*.state")), default=0)


def kill_and_go_on(file: str, here: Path, seed: int) -> bool:
    """Train in a process of its own, with --auto_resume, and kill it; return whether a file was being written.

    With an odd seed that is as soon as a file is being written after something has been saved, with an even one at a
    random moment after that. Every fourth is killed at a random moment of its first seconds instead, saved or not.
    """
    rng = random.Random(seed)  # noqa: S311
    command = [sys.executable, "-m", "sparse_sr_attn", "train", "-opt", file, "--auto_resume"]
    before = newest(here)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        if seed % 4 == 2:
            time.sleep(rng.uniform(0, 6))
        else:
            while newest(here) == before and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            if seed % 2:
                while not half_written(here) and process.poll() is None and time.monotonic() < deadline:
                    pass
            else:
                time.sleep(rng.uniform(0, 0.2))
    finally:
        process.kill()
    error = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, error
    assert newest(here) > before or seed % 4 == 2, error
    return bool(half_written(here))


def half_written(here: Path) -> list[Path]:
    return list(here.glob("experiments/tiny/*/*.tmp"))


@pytest.mark.promise("R13")
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_while_saving_and_resumed_is_bit_equal(kills: int, training: Write, here: Path) -> None:
    # Most of its time goes into saving, so that is where it is hit.
    file = training({"train.total_iter": 100_000, "logger.save_checkpoint_freq": 1, "val": ...})
    torn = sum(kill_and_go_on(file, here, seed) for seed in range(kills))
    assert torn >= kills // 4, f"only {torn} of {kills} kills came while a file was being written"
    last = newest(here) + 3
    for name, resume in (("tiny", ["--auto_resume"]), ("whole", [])):
        options = [f"name={name}", f"train:total_iter={last}", f"logger:save_checkpoint_freq={1 if resume else last}"]
        assert main(["train", "-opt", file, *resume, "--force_yml", *options]) == 0
    for kind, name in (("models", f"net_g_{last}.pth"), ("training_states", f"{last}.state")):
        resumed, whole = (
            torch.load(here / "experiments" / run / kind / name, weights_only=True) for run in ("tiny", "whole")
        )
        torch.testing.assert_close(_tensors(resumed), _tensors(whole), rtol=0, atol=0)
        assert str(resumed) == str(whole)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in _tensors(item)]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors(item)]
    return [value] if isinstance(value, torch.Tensor) else []
