"""Broken images, full disks, read-only folders and files that are no weights: one clear error, and nothing is lost."""

import argparse
import ctypes
import itertools
import logging
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from basicsr_runs import told_at_the_end

from sparse_sr_attn.cli.main import main
from sparse_sr_attn_basicsr import preflight
from sparse_sr_attn_basicsr.commands import _record_options

Write = Callable[..., str]

# mount(2) and unshare(2)
NEW_NAMESPACE, READ_ONLY, REMOUNT, BIND, RECURSIVE, PRIVATE = 0x20000, 1, 32, 4096, 16384, 1 << 18
NOT_ALLOWED = 77


def on_a_disk_of_its_own(folder: Path, action: Callable[[], int], *, size: int | None = None) -> tuple[int, str]:
    """Run `action` where `folder` holds so many bytes, or is read-only; return its value and what it told.

    The disk is seen by a process of its own only, and goes with it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    told = folder.parent / "told.txt"
    child = os.fork()
    if child == 0:
        code = 99
        with told.open("w") as sys.stderr:
            try:
                if not mounted(str(folder).encode(), size):
                    os._exit(NOT_ALLOWED)
                logging.getLogger("sparse_sr_attn_basicsr").addHandler(logging.StreamHandler(sys.stderr))
                torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
                code = action()
            except BaseException:
                traceback.print_exc()
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == NOT_ALLOWED:
        pytest.skip("only root may mount a disk here")
    return code, told.read_text()


def mounted(folder: bytes, size: int | None) -> bool:
    libc = ctypes.CDLL(None)
    if (
        sys.platform != "linux"
        or libc.unshare(NEW_NAMESPACE)
        or libc.mount(None, b"/", None, RECURSIVE | PRIVATE, None)
    ):
        return False
    if size is not None:
        return not libc.mount(b"tmpfs", folder, b"tmpfs", 0, f"size={size}".encode())
    return not (
        libc.mount(folder, folder, None, BIND, None) or libc.mount(None, folder, None, REMOUNT | BIND | READ_ONLY, None)
    )


@pytest.fixture
def data(here: Path) -> Path:
    """A copy of the photographs, to be broken."""
    source = (here / "datasets").resolve()
    (here / "datasets").unlink()
    shutil.copytree(source, here / "datasets")
    return here / "datasets"


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Have something happen to files once they were checked: what is broken before is refused, see test_preflight."""
    check = preflight.check

    def happens(change: Callable[[], object]) -> None:
        def checked(*args: Any, **kwargs: Any) -> Any:
            result = check(*args, **kwargs)
            change()
            return result

        monkeypatch.setattr(preflight, "check", checked)

    return happens


PARTS = ["train/HR", "train/LR", "val/HR"]
BREAK: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut off": (cut_off, "cannot be read: image file is truncated"),
    "empty": (lambda file: file.write_bytes(b""), "is not an image that Pillow can read"),
    "text": (lambda file: file.write_text("not an image"), "is not an image that Pillow can read"),
}


@pytest.mark.parametrize(("how", "part"), list(zip(BREAK, itertools.cycle(PARTS), strict=False)))
def test_a_broken_image_ends_training_with_its_name_and_the_state(
    part: str, how: str, training: Write, data: Path, here: Path, later: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file = training({"val.val_freq": 3})
    image = data / part / "0.png"
    if part == "train/HR":
        assert main(["train", "-opt", file, "--force_yml", "name=whole"]) == 0
    whole = image.read_bytes()
    change, message = BREAK[how]
    later(lambda: change(image))
    capsys.readouterr()
    assert main(["train", "-opt", file]) == 1
    told = told_at_the_end(capsys)
    assert told.startswith(f"datasets/{part}/0.png: {message}")
    assert ".state\nFix the cause, then resume with --auto_resume." in told
    image.write_bytes(whole)
    later(lambda: image.write_bytes(whole))
    assert main(["train", "-opt", file, "--auto_resume"]) == 0
    if part == "train/HR":
        ends = [here / f"experiments/{run}/models/net_g_4.pth" for run in ("tiny", "whole")]
        one, other = (torch.load(end, weights_only=True) for end in ends)
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("reading", [{"num_worker_per_gpu": 2}, {"num_worker_per_gpu": 1, "prefetch_mode": "cpu"}])
def test_a_broken_image_ends_training_however_it_is_read(
    reading: dict[str, Any], training: Write, data: Path, later: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    later(lambda: cut_off(data / "train/HR/0.png"))
    assert main(["train", "-opt", training({f"datasets.train.{name}": v for name, v in reading.items()})]) == 1
    assert told_at_the_end(capsys).startswith("datasets/train/HR/0.png: cannot be read: image file is truncated\n")


def test_a_broken_image_ends_testing_with_its_name(
    training: Write, testing: Write, data: Path, later: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "-opt", training({"val": ...})]) == 0
    later(lambda: cut_off(data / "val/LR/1.png"))
    assert main(["test", "-opt", testing()]) == 1
    assert told_at_the_end(capsys) == "datasets/val/LR/1.png: cannot be read: image file is truncated\n"


# --- disks


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_full_disk_keeps_what_was_saved_and_is_told_without_a_traceback(training: Write, here: Path) -> None:
    """Room for the first save, not for the second; the log has none left either."""
    file = training({"logger.save_checkpoint_freq": 1, "val": ..., "train.total_iter": 6})

    def run() -> int:
        code = main(["train", "-opt", file])
        folder = here / "experiments/tiny"
        assert not list(folder.rglob("*.tmp"))
        (state,) = folder.glob("training_states/*.state")
        for kind in (state, folder / f"models/net_g_{state.stem}.pth"):
            torch.load(kind, weights_only=True)
        return code

    code, told = on_a_disk_of_its_own(here / "experiments", run, size=300_000)
    assert "Traceback" not in told
    assert code == 1, told
    assert told.count("is incomplete ([Errno 28] No space left on device); the run continues") <= 1
    assert told.splitlines()[-1].startswith("sparse-sr: cannot save iteration 6 in ")
    code, told = on_a_disk_of_its_own(here / "experiments", lambda: main(["train", "-opt", file]), size=8192)
    assert "Traceback" not in told
    assert code == 1, told
    assert told.count("is incomplete ([Errno 28] No space left on device); the run continues") == 1


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_folder_that_cannot_be_written_is_told(training: Write, testing: Write, here: Path) -> None:
    file = training({"val": ...})
    code, told = on_a_disk_of_its_own(here / "experiments", lambda: main(["train", "-opt", file]))
    assert (code, told.partition("sparse-sr: ")[2]) == (
        1,
        f"cannot read or write: [Errno 30] Read-only file system: '{here}/experiments/tiny'\nNothing was trained.\n",
    )
    assert main(["train", "-opt", file]) == 0
    more = ["train", "-opt", file, "--auto_resume", "--force_yml", "train:total_iter=6"]
    before = {path: path.read_bytes() for path in (here / "experiments").rglob("*") if path.is_file()}
    code, told = on_a_disk_of_its_own(here / "experiments", lambda: main(more))
    assert code == 1, told
    assert "Traceback" not in told
    assert {path: path.read_bytes() for path in (here / "experiments").rglob("*") if path.is_file()} == before
    for size in (None, 8192):
        code, told = on_a_disk_of_its_own(here / "results", lambda: main(["test", "-opt", testing()]), size=size)
        assert code == 1, told
        assert "Traceback" not in told
        reason = "[Errno 28] No space left on device" if size else "[Errno 30] Read-only file system"
        assert told.rpartition("sparse-sr: ")[2].startswith(f"cannot read or write: {reason}")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_an_option_file_is_whole_when_its_copy_finds_no_room(here: Path) -> None:
    """A run that is resumed with the copy in its own folder writes over the very file it was started with."""
    arguments = argparse.Namespace(opt=str(here / "small/train.yml"), auto_resume=True, debug=False, force_yml=None)

    def record() -> int:
        file = here / "small/train.yml"
        file.write_text("name: tiny\n")
        (here / "small/rest").write_bytes(bytes(8192 - 4096))
        try:
            _record_options(file.parent, arguments)
        except OSError:
            return 1 if file.read_text() == "name: tiny\n" and not list(file.parent.glob("*.tmp")) else 2
        return 0

    assert on_a_disk_of_its_own(here / "small", record, size=8192) == (1, "")


# --- weights


@pytest.mark.parametrize("command", ["train", "test"])
def test_a_network_that_memory_cannot_hold_is_told(
    command: str, training: Write, testing: Write, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resource = pytest.importorskip("resource")
    if sys.platform != "linux":
        pytest.skip("takes a limit on memory that only Linux keeps")
    write = training if command == "train" else testing
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2**31, before[1]))
    try:
        huge = {"network_g.num_feat": 10**8, "network_g.attention": None, "path.pretrain_network_g": None}
        assert main([command, "-opt", write(huge)]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    told = told_at_the_end(capsys)
    assert told.startswith("out of memory: ")
    assert told.splitlines()[1].startswith("Reduce gt_size" if command == "train" else "Set val.tile")
