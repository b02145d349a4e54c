"""A run that was stopped and resumed ends bit-equal to one that was not."""

import copy
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from basicsr.data.paired_image_dataset import PairedImageDataset
from basicsr.utils.registry import ARCH_REGISTRY, DATASET_REGISTRY
from basicsr_runs import GAN, logs, saved, train
from torch import Tensor, nn

from sparse_sr_attn import PRESETS
from sparse_sr_attn.cli.main import main
from sparse_sr_attn_basicsr import SparseEDSR
from sparse_sr_attn_basicsr.randomness import random_state, seeded

Write = Callable[..., str]

SHARING_EDSR = {
    "type": "SparseEDSR",
    "num_feat": 8,
    "num_block": 16,
    "upscale": 2,
    "img_range": 1.0,
    "attention": {"type": "LCoA", "every": 4, "share": 4, "num_clusters": 8, "chunk_size": 16},
}
ELAN = {"type": "ELAN", "num_feat": 12, "num_block": 2, "share": 2, "upscale": 2, "window_sizes": [2, 4, 8]}
LCOA = {"type": "LCoA", "every": 2, "share": 2, "num_clusters": 8, "chunk_size": 16}
GMSA = {**SHARING_EDSR, "num_block": 2, "attention": {"type": "GMSA", "every": 1, "share": 2, "window_sizes": [2, 4]}}
RRDB = {"type": "RRDBNet", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 8, "num_block": 4, "num_grow_ch": 4, "scale": 2}
LCOAN_LIGHT = {"type": "LCoAN", "upscale": 2, **PRESETS["LCoAN-light"].options}


@ARCH_REGISTRY.register()
class ForgetfulEDSR(SparseEDSR):
    """Draws random numbers in training, of PyTorch, NumPy and Python, as other people's networks do."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = nn.functional.dropout(x, 0.1) + 0.01 * (float(np.random.rand()) + random.random())  # noqa: S311
        return super().forward(x)


@DATASET_REGISTRY.register()
class NotingDataset(PairedImageDataset):
    """Notes each sample that is read."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        with Path("read.txt").open("a") as notes:
            notes.write(f"{index}\n")
        return super().__getitem__(index)


def differences(one: Any, other: Any, path: str = "") -> Iterator[str]:
    """Yield the paths at which two nests of maps, lists, tensors and plain values differ in a single bit."""
    if type(one) is not type(other):
        yield path
    elif isinstance(one, dict):
        yield from (f"{path}/{key}" for key in one.keys() ^ other.keys())
        for key in one.keys() & other.keys():
            yield from differences(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, (list, tuple)):
        if len(one) != len(other):
            yield path
        for number, (left, right) in enumerate(zip(one, other, strict=False)):
            yield from differences(left, right, f"{path}/{number}")
    elif isinstance(one, Tensor):
        if one.dtype != other.dtype or not torch.equal(one, other):
            yield path
    elif one != other:
        yield path


def iterations_logged(log: Path) -> list[int]:
    return [int(number) for number in re.findall(r"iter: +(\d+), lr", log.read_text())]


BASE = {"logger.save_checkpoint_freq": 1, "val.val_freq": 3}
SILENT = {"logger.save_checkpoint_freq": 1, "val": ...}
EVERYTHING = {
    "train.accumulate": 2,
    "train.grad_clip": 0.05,
    "train.autocast": "bf16",
    "train.optim_g": {"type": "AdamW", "lr": 1e-3, "weight_decay": 0.01},
    "train.scheduler": {"type": "CosineAnnealingRestartLR", "periods": [20], "eta_min": 1e-6},
    "train.warmup_iter": 12,
}
RATIO = "datasets.train.dataset_enlarge_ratio"
WORKERS = "datasets.train.num_worker_per_gpu"
PERSISTENT = "datasets.train.persistent_workers"
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "SparseEDSR, in the middle of an epoch": ({"network_g": SHARING_EDSR}, {WORKERS: 2}),
    "LCoAN-light": ({"network_g": LCOAN_LIGHT, "datasets.train.gt_size": 16, WORKERS: 2}, {WORKERS: 0}),
    "ELAN": ({"network_g": ELAN}, {}),
    "ELAN, in parts, computing its body again": (
        {"network_g": {**ELAN, "activation_checkpointing": True}, "train.accumulate": 2},
        {},
    ),
    "SparseEDSR with LCoA, GMSA and ELABs": (
        {
            "network_g.num_block": 2,
            "network_g.attention": [LCOA, {"type": "GMSA", "after": [0, 1], "share": 2, "window_sizes": [2, 4]}],
            "network_g.block": {"type": "ELAB", "window_sizes": [2, 4]},
        },
        {},
    ),
    "RRDBNet with LCoA": (
        {"network_g": {"type": "WithAttention", "network": RRDB, "attention": LCOA}, "datasets.train.gt_size": 16},
        {},
    ),
    "a GAN": ({**GAN, "model_type": "SparseSRGANModel"}, {}),
    "a GAN of BasicSR's other kind, with GMSA": ({**GAN, "model_type": "SparseESRGANModel", "network_g": GMSA}, {}),
    "at an epoch's end": ({RATIO: 1.66}, {WORKERS: 1, PERSISTENT: True}),
    "epochs that are no whole number of batches": ({RATIO: 1.5, WORKERS: 2}, {}),
    "a network that draws random numbers, and a process that reads ahead": (
        {"network_g.type": "ForgetfulEDSR", "network_g.attention": None},
        {"datasets.train.prefetch_mode": "cpu", "datasets.train.num_prefetch_queue": 3},
    ),
    "accumulation, clipping, AdamW, bf16, warm-up": (EVERYTHING, {}),
    "deterministic algorithms only, no EMA": ({"train.deterministic": True, "train.ema_decay": 0}, {}),
}
"""Options of a run, and how samples are read after its stop, which must change nothing."""


@pytest.mark.promise("R13")
@pytest.mark.parametrize(("changes", "later"), CASES.values(), ids=CASES)
def test_stopped_at_10_of_20_and_resumed_is_bit_equal(
    changes: dict[str, Any], later: dict[str, Any], training: Write, here: Path
) -> None:
    assert train(training({**BASE, **changes}), total=20, name="whole") == 0
    for first, last, reading in ((1, 10, {}), (11, 20, later)):
        assert train(training({**BASE, **changes, **reading}), total=last) == 0
        assert iterations_logged(logs(here)[-1]) == list(range(first, last + 1))
        assert not torch.are_deterministic_algorithms_enabled()  # outside
    assert list(differences(saved(here, "tiny", 20), saved(here, "whole", 20))) == []


@pytest.mark.cuda
@pytest.mark.parametrize("autocast", [None, "bf16", "fp16"])
def test_resumed_on_a_gpu_is_bit_equal(autocast: str | None, training: Write, here: Path) -> None:
    changes = {"network_g": SHARING_EDSR, "num_gpu": 1, "train.deterministic": True, "train.autocast": autocast}
    test_stopped_at_10_of_20_and_resumed_is_bit_equal(changes, {}, training, here)


@pytest.mark.promise("R13")
def test_stopped_twice_and_resumed_twice_is_bit_equal(training: Write, here: Path) -> None:
    file = training({**BASE, RATIO: 3, WORKERS: 1})  # 9 batches an epoch
    assert train(file, total=20, name="whole") == 0
    for stop in (4, 13, 14, 20):
        assert train(file, total=stop) == 0
    assert list(differences(saved(here, "tiny", 20), saved(here, "whole", 20))) == []


def test_a_state_that_is_named_is_resumed_exactly(training: Write, here: Path) -> None:
    """Also with a seed that nobody gave: the state knows it."""
    file = training({**BASE, "manual_seed": ...})
    assert train(file, total=8) == 0
    before = saved(here, "tiny", 8)
    named = "path:resume_state=experiments/tiny/training_states/5.state"
    assert main(["train", "-opt", file, "--force_yml", named, "train:total_iter=8"]) == 0
    assert list(differences(saved(here, "tiny", 8), before)) == []


def test_validation_changes_nothing(training: Write, here: Path) -> None:
    network = {"network_g.type": "ForgetfulEDSR", "network_g.attention": None}
    assert train(training({**BASE, **network}), total=6, name="validated") == 0
    assert train(training({**SILENT, **network}), total=6) == 0
    assert list(differences(saved(here, "tiny", 6), saved(here, "validated", 6))) == []


def busiest(weights: dict[str, Any], name: str) -> Tensor:
    """Return the row of a buffer that belongs to the cluster with most tokens: an empty one may be given up."""
    lsp = {key: weights["params"][f"attention.0.lsp.{key}"] for key in (name, "pending_counts")}
    return lsp[name][int(lsp["pending_counts"].argmax())]


ALTERED = {
    "an optimizer's average": ("state", lambda s: s["optimizers"][0]["state"][3]["exp_avg"].view(-1)[0].add_(1e-3)),
    "an optimizer's step": ("state", lambda s: s["optimizers"][0]["state"][3]["step"].add_(1)),
    "a weight": ("weights", lambda w: w["params"]["conv_last.bias"][0].add_(1e-4)),
    "an averaged weight": ("weights", lambda w: w["params_ema"]["conv_last.bias"][0].add_(1e-4)),
    "a centroid": ("weights", lambda w: busiest(w, "centroids")[0].add_(0.1)),
    "a running variance": ("weights", lambda w: w["params"]["attention.1.query.norm.running_var"][0].mul_(2)),
    "a sum not applied yet": ("weights", lambda w: busiest(w, "pending_sums")[0].add_(1.0)),
    "the schedule": ("state", lambda s: s["schedulers"][0].update(last_epoch=98)),
    "the place in the epoch": ("state", lambda s: s["exact"].update(place=[0, 14])),
    "the seed": ("state", lambda s: s["exact"].update(manual_seed=7)),
    "PyTorch's random numbers": ("state", lambda s: s["exact"]["random"][0].update(torch=_other()["torch"])),
    "NumPy's random numbers": ("state", lambda s: s["exact"]["random"][0].update(numpy=_other()["numpy"])),
    "Python's random numbers": ("state", lambda s: s["exact"]["random"][0].update(python=_other()["python"])),
}


def _other() -> dict[str, Any]:
    with seeded([1, 2, 3]):
        return random_state()


@pytest.fixture(scope="module")
def stopped_at_6(photographs: Path, write_training: Write, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a run was stopped at iteration 6 and resumed to 9, saving each iteration."""
    here = tmp_path_factory.mktemp("stopped")
    (here / "datasets").symlink_to(photographs / "datasets", target_is_directory=True)
    changes = {"network_g.type": "ForgetfulEDSR", "network_g.attention": [LCOA, {"type": "GMSA", "after": [1]}]}
    write_training(here, {**SILENT, **changes, "manual_seed": ...})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        for total in (6, 9):
            assert train("train.yml", total=total) == 0
    return here


@pytest.mark.parametrize("altered", ALTERED)
def test_one_altered_value_in_the_state_changes_the_end(altered: str, stopped_at_6: Path, here: Path) -> None:
    shutil.copytree(stopped_at_6 / "experiments", here / "experiments")
    before = saved(here, "tiny", 9)
    part, alter = ALTERED[altered]
    target = here / "experiments/tiny" / {"state": "training_states/6.state", "weights": "models/net_g_6.pth"}[part]
    content = torch.load(target, map_location="cpu", weights_only=True)
    alter(content)
    torch.save(content, target)
    named = ["path:resume_state=experiments/tiny/training_states/6.state", "train:total_iter=9"]
    assert main(["train", "-opt", str(stopped_at_6 / "train.yml"), "--force_yml", *named]) == 0
    assert list(differences(saved(here, "tiny", 9)["weights"], before["weights"]))


def test_samples_used_before_are_not_read_again(training: Write, here: Path) -> None:
    file = training({"datasets.train.type": "NotingDataset", "val": ..., "logger.save_checkpoint_freq": 10})
    read = {}
    for name, total in (("whole", 12), ("tiny", 10), ("tiny", 12)):
        (here / "read.txt").write_text("")
        assert train(file, total=total, name=name) == 0
        read[name] = (here / "read.txt").read_text().split()
    assert len(read["whole"]) == 25  # the first sample in the check
    assert read["tiny"][1:] == read["whole"][21:]


@pytest.mark.parametrize(("ratio", "per_epoch"), [(0.5, 1), (1.5, 4), (1.66, 5)])
def test_training_reaches_its_last_iteration(ratio: float, per_epoch: int, training: Write, here: Path) -> None:
    """BasicSR counts a batch that is not full, and so stops too early."""
    assert train(training({RATIO: ratio, "val": ...}), total=12) == 0
    assert iterations_logged(logs(here)[0]) == list(range(1, 13))
    epochs = [int(epoch) for epoch in re.findall(r"epoch: +(\d+), iter: +\d+, lr", logs(here)[0].read_text())]
    assert epochs == [iteration // per_epoch for iteration in range(12)]


def test_an_epoch_without_a_batch_is_refused(training: Write, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the preflight does not count the images, because the data set would read them all."""
    changes = {"datasets.train.type": "NotingDataset", "datasets.train.batch_size_per_gpu": 64}
    assert train(training(changes), total=1) == 2
    message = "datasets.train.dataset_enlarge_ratio: must be at least 11, got 10: an epoch of 6 images must fill a"
    assert message in capsys.readouterr().err
    assert train(training({**changes, "datasets.train.cache_data": True}), total=1) == 2
    message = "datasets.train.dataset_enlarge_ratio: an epoch of 60 samples must fill a batch of 64; enlarge it"
    assert message in capsys.readouterr().err


def test_a_state_of_basicsr_itself_is_resumed_with_a_note(
    training: Write, here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["train", "-opt", training({"model_type": "SRModel", "network_g.attention": None})]) == 0
    assert train(training({"network_g.attention": None}), total=6) == 0
    assert "note: training resumes, but not exactly as if it had not been stopped" in caplog.text
    assert "has no random states and no position in the epoch" in caplog.text
    assert iterations_logged(logs(here)[-1]) == [5, 6]


@pytest.mark.parametrize(
    ("alter", "note"),
    [
        (lambda exact: exact.update(manual_seed=5), "manual_seed is 0, and was 5"),
        (lambda exact: exact.update(random=exact["random"] * 2), "the number of processes is 1, and was 2"),
        (lambda exact: exact.update(place=None), "has no position in the epoch"),
    ],
)
def test_what_keeps_a_resume_from_being_exact_is_said(
    alter: Callable[[Any], None], note: str, training: Write, here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = training({"val": ...})
    assert train(file, total=4) == 0
    assert "not exactly" not in caplog.text
    target = here / "experiments/tiny/training_states/4.state"
    state = torch.load(target, weights_only=True)
    alter(state["exact"])
    torch.save(state, target)
    assert train(file, total=5) == 0
    assert note in caplog.text


def test_another_batch_size_goes_on_behind_the_samples_that_were_used(training: Write, here: Path) -> None:
    file = training({"datasets.train.type": "NotingDataset", "val": ..., "logger.save_checkpoint_freq": 1, RATIO: 4})
    assert train(file, total=3) == 0
    assert train(file, "datasets:train:batch_size_per_gpu=3", total=10) == 0
    assert saved(here, "tiny", 9)["state"]["exact"]["place"] == [0, 24]
    assert saved(here, "tiny", 10)["state"]["exact"]["place"] == [1, 3]


UNREADABLE: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "cut off": (lambda state, _: state.write_bytes(state.read_bytes()[:500]), "cannot read .*4.state: "),
    "no map": (lambda state, _: torch.save([1], state), ".*4.state must hold a mapping, got a list"),
    "weights": (
        lambda state, weights: shutil.copy(weights, state),
        ".*4.state must hold a training state; iter: missing; it has no default; epoch: missing",
    ),
    "without weights": (lambda _, weights: weights.unlink(), "cannot read .*net_g_4.pth: No such file"),
    "code": (lambda state, _: torch.save({"iter": Path}, state), "cannot read .*4.state: Weights only load failed"),
}


@pytest.mark.promise("R21")
@pytest.mark.parametrize("what", UNREADABLE)
def test_a_named_state_that_is_none_is_refused(
    what: str, training: Write, here: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    file = training(SILENT)
    assert train(file, total=4) == 0
    folder = here / "experiments/tiny"
    damage, message = UNREADABLE[what]
    damage(folder / "training_states/4.state", folder / "models/net_g_4.pth")
    named = "path:resume_state=experiments/tiny/training_states/4.state"
    assert main(["train", "-opt", file, "--force_yml", named]) == 1
    assert re.search(f"sparse-sr: path.resume_state: {message}", capsys.readouterr().err)
    assert train(file, total=4) == 0  # with --auto_resume the one before serves
    assert re.search(f"note: .*4.state cannot be resumed \\({message}.*; trying the one before", caplog.text)
    assert iterations_logged(logs(here)[-1]) == [4]


HOSTILE: dict[str, tuple[object, str]] = {
    "iter": ("../../4", "iter: must be an integer in [0, 2**62], got '../../4'"),
    "iter ": (-4, "iter: must be in [0, 2**62], got -4"),
    "iter  ": (float("nan"), "iter: must be an integer in [0, 2**62], got nan"),
    "iter   ": (torch.ones(1000), "iter: must be an integer in [0, 2**62], got tensor([1., "),
    "epoch": (2**70, f"epoch: must be an integer of 64 bits in [0, 2**62], got {2**70}"),
    "optimizers": ("Adam", "optimizers: must be a list, got 'Adam'"),
    "schedulers": ([None], "schedulers: must be a mapping, got [None]"),
    "exact": (5, "exact: must be a mapping or ~ (nothing), got 5"),
    "exact ": ({"place": [0, 1]}, "exact.optimizer: missing"),
    "exact/manual_seed": (-1, "exact.manual_seed: must be in [0, 2**32) or ~ (nothing), got -1"),
    "exact/manual_seed ": (2**40, "exact.manual_seed: must be in [0, 2**32)"),
    "exact/place": ([1, 2, 3], "exact.place: must be of two numbers"),
    "exact/place ": ([0, -8], "exact.place: must be in [0, 2**62]"),
    "exact/random": ("abc", "exact.random: must be a list, got 'abc'"),
    "exact/random/0/torch": (torch.zeros(3), "does not fit this network and these options: "),
    "optimizers/0/param_groups/0/lr": (float("nan"), "a step of the optimizer must leave finite weights"),
    "optimizers/0/param_groups/0/lr ": ("fast", "does not fit this network and these options: "),
    "optimizers/0/state/0/exp_avg": (torch.zeros(3), "does not fit this network and these options: "),
    "optimizers/0/state/0/exp_avg ": ("abc", "does not fit this network and these options: "),
    "optimizers/0/state/0/exp_avg  ": (torch.full((8, 3, 3, 3), float("nan")), "a step of the optimizer must leave"),
    "schedulers/0": ({"get_lr": 3}, "does not fit this network and these options: "),
    "schedulers/0/last_epoch": ("abc", "does not fit this network and these options: "),
}


@pytest.mark.promise("R21")
def test_a_state_with_a_hostile_value_is_refused_before_anything_is_trained(
    training: Write, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each value stands in a file that PyTorch reads as data; none may be taken up, or end in a traceback."""
    file = training({"val": ...})
    assert train(file, total=4) == 0
    good = saved(here, "tiny", 4)
    wrong = {}
    for place, (value, message) in HOSTILE.items():
        state = copy.deepcopy(good["state"])
        *outer, last = (int(name) if name.isdecimal() else name for name in place.strip().split("/"))
        target: Any = state
        for name in outer:
            target = target[name]
        target[last] = value
        torch.save(state, here / "hostile.state")
        code = main(["train", "-opt", file, "--force_yml", "path:resume_state=hostile.state", "train:total_iter=6"])
        *_, told = capsys.readouterr().err.partition("sparse-sr: ")
        if code != 1 or message not in told or len(told) > 1000:
            wrong[place] = (code, told)
    assert wrong == {}
    assert list(differences(saved(here, "tiny", 4), good)) == []


def test_fewer_images_than_the_state_has_seen_are_no_endless_run(training: Write, here: Path) -> None:
    file = training({"val": ..., "train.total_iter": 4})
    assert train(file, total=4) == 0
    target = here / "experiments/tiny/training_states/4.state"
    state = torch.load(target, weights_only=True)
    state["exact"]["place"] = [0, 10**9]
    torch.save(state, target)
    assert train(file, total=6) == 0
    assert saved(here, "tiny", 4)["state"]["exact"]["place"] == [0, 10**9]
    (last,) = logs(here)[-1:]
    assert re.findall(r"epoch: +(\d+), iter: +\d+, lr", last.read_text()) == ["1", "1"]


# --- options that were changed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train.optim_g.type": "AdamW"},
            "the state of iteration 4: train.optim_g.type must be Adam, with which it was saved, got AdamW",
        ),
        ({"network_g.num_block": 6}, "net_g_4.pth: does not fit the network."),
        ({}, "the state of iteration 4: does not fit this network and these options: Wrong lengths of opt"),
    ],
    ids=["another optimizer", "a network of another size", "a state without its optimizer"],
)
def test_what_does_not_fit_the_state_is_refused(
    changes: dict[str, Any], message: str, training: Write, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(training({"val": ...}), total=4) == 0
    if not changes:
        target = here / "experiments/tiny/training_states/4.state"
        torch.save({**torch.load(target, weights_only=True), "optimizers": []}, target)
    assert train(training({"val": ..., **changes}), total=5) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("key", ["params", None])
def test_resuming_a_fine_tuned_run_is_not_led_astray_by_how_it_began(
    key: str | None, training: Write, here: Path
) -> None:
    """`param_key_g` and `strict_load_g` were said of the pretrained file, and not of the run's own."""
    assert train(training({"val": ...}), total=1, name="first") == 0
    pretrained = torch.load(here / "experiments/first/models/net_g_latest.pth", weights_only=True)
    torch.save(pretrained["params"] if key is None else {"params": pretrained["params"]}, here / "pretrained.pth")
    path = {"pretrain_network_g": "pretrained.pth", "param_key_g": key, "strict_load_g": False}
    file = training({**BASE, "path": path, "train.ema_decay": 0})
    assert train(file, total=6, name="whole") == 0
    assert train(file, total=3) == 0
    assert train(file, total=6) == 0
    assert list(differences(saved(here, "tiny", 6), saved(here, "whole", 6))) == []
