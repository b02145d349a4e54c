"""A run that was stopped and resumed ends bit-equal to one that was not."""

import copy
import random
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from basicsr.data.paired_image_dataset import PairedImageDataset
from basicsr.utils.registry import ARCH_REGISTRY, DATASET_REGISTRY
from torch import Tensor, nn

from sparse_sr_attn import PRESETS
from sparse_sr_attn.cli import main
from sparse_sr_attn_basicsr import SparseEDSR
from sparse_sr_attn_basicsr.commands import _Run as Run
from sparse_sr_attn_basicsr.loading import Draw, PortableDataset, SeededSampler
from sparse_sr_attn_basicsr.options import load
from sparse_sr_attn_basicsr.randomness import random_state, seeded, set_random_state, undisturbed

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
LCOAN_LIGHT = {"type": "LCoAN", "upscale": 2, **PRESETS["LCoAN-light"].options}


@ARCH_REGISTRY.register()
class ForgetfulEDSR(SparseEDSR):
    """Draws random numbers in training, of PyTorch, NumPy and Python, as other people's networks do."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = nn.functional.dropout(x, 0.1) + 0.01 * (float(np.random.rand()) + random.random())  # noqa: S311
        output: Tensor = super().forward(x)
        return output


@DATASET_REGISTRY.register()
class NotingDataset(PairedImageDataset):
    """Notes each sample that is read."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        with Path("read.txt").open("a") as notes:
            notes.write(f"{index}\n")
        sample: dict[str, Any] = super().__getitem__(index)
        return sample


def train(file: str, *options: str, total: int, name: str = "tiny") -> int:
    return main(
        ["train", "-opt", file, "--auto_resume", "--force_yml", f"name={name}", f"train:total_iter={total}", *options]
    )


def saved(here: Path, name: str, iteration: int) -> dict[str, Any]:
    """Everything that a run has saved of an iteration: weights, EMA, buffers, optimizer, schedule, random numbers."""
    folder = here / "experiments" / name
    files = {
        "weights": folder / f"models/net_g_{iteration}.pth",
        "state": folder / f"training_states/{iteration}.state",
    }
    assert all(file.is_file() for file in files.values()), f"iteration {iteration} was not saved"
    return {key: torch.load(file, map_location="cpu", weights_only=True) for key, file in files.items()}


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


def logs(here: Path, name: str = "tiny") -> list[Path]:
    return sorted((here / "experiments" / name).glob("*.log"), key=lambda file: file.stat().st_mtime_ns)


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
CASES: dict[str, dict[str, Any]] = {
    "SparseEDSR, in the middle of an epoch": {"network_g": SHARING_EDSR},
    "two workers": {"network_g": SHARING_EDSR, WORKERS: 2},
    "LCoAN-light": {"network_g": LCOAN_LIGHT, "datasets.train.gt_size": 16},
    "LCoAN-light, two workers": {"network_g": LCOAN_LIGHT, "datasets.train.gt_size": 16, WORKERS: 2},
    "ELAN": {"network_g": ELAN},
    "ELAN, in parts, computing its body again": {
        "network_g": {**ELAN, "activation_checkpointing": True},
        "train.accumulate": 2,
    },
    "SparseEDSR with LCoA, GMSA and ELABs": {
        "network_g.num_block": 2,
        "network_g.attention": [LCOA, {"type": "GMSA", "after": [0, 1], "share": 2, "window_sizes": [2, 4]}],
        "network_g.block": {"type": "ELAB", "window_sizes": [2, 4]},
    },
    "at an epoch's end": {RATIO: 1.66},
    "at an epoch's end, two workers": {RATIO: 1.66, WORKERS: 2},
    "epochs that are no whole number of batches": {RATIO: 1.5},
    "a network that draws random numbers": {"network_g.type": "ForgetfulEDSR", "network_g.attention": None},
    "accumulation, clipping, AdamW, bf16, warm-up": EVERYTHING,
    "workers that stay": {WORKERS: 1, "datasets.train.persistent_workers": True, RATIO: 1.66},
    "a reading thread": {WORKERS: 1, "datasets.train.prefetch_mode": "cpu"},
    "no EMA": {"train.ema_decay": 0},
    "deterministic algorithms only": {"train.deterministic": True},
}


def cases(names: Iterable[str], quick: Collection[str]) -> list[Any]:
    """All cases; those that are not quick belong to the slow tests."""
    assert set(quick) <= set(names)
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


QUICK = {
    "SparseEDSR, in the middle of an epoch",
    "LCoAN-light, two workers",
    "SparseEDSR with LCoA, GMSA and ELABs",
    "epochs that are no whole number of batches",
    "a network that draws random numbers",
    "accumulation, clipping, AdamW, bf16, warm-up",
    "a reading thread",
}


@pytest.mark.promise("R13", "our command")
@pytest.mark.parametrize("case", cases(CASES, QUICK))
def test_stopped_at_10_of_20_and_resumed_is_bit_equal(case: str, training: Write, here: Path) -> None:
    file = training({**BASE, **CASES[case]})
    assert train(file, total=20, name="whole") == 0
    for first, last in ((1, 10), (11, 20)):
        assert train(file, total=last) == 0
        assert iterations_logged(logs(here)[-1]) == list(range(first, last + 1))
        assert not torch.are_deterministic_algorithms_enabled()  # outside
    assert list(differences(saved(here, "tiny", 20), saved(here, "whole", 20))) == []


@pytest.mark.cuda
@pytest.mark.parametrize("autocast", [None, "bf16", "fp16"])
def test_resumed_on_a_gpu_is_bit_equal(autocast: str | None, training: Write, here: Path) -> None:
    changes = {"network_g": SHARING_EDSR, "num_gpu": 1, "train.deterministic": True, "train.autocast": autocast}
    test_stopped_at_10_of_20_and_resumed_is_bit_equal(changes, training, here)


@pytest.mark.promise("R13", "twice")
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


def test_workers_change_nothing(training: Write, here: Path) -> None:
    for workers in (0, 1, 2):
        assert train(training({**BASE, WORKERS: workers}), total=6, name=f"with{workers}") == 0
    for workers in (1, 2):
        assert list(differences(saved(here, f"with{workers}", 6), saved(here, "with0", 6))) == []


def test_validation_changes_nothing(training: Write, here: Path) -> None:
    network = {"network_g.type": "ForgetfulEDSR", "network_g.attention": None}
    assert train(training({**BASE, **network}), total=6, name="validated") == 0
    assert train(training({**SILENT, **network}), total=6) == 0
    assert list(differences(saved(here, "tiny", 6), saved(here, "validated", 6))) == []


def test_seeds_epochs_and_places_make_samples_differ(training: Write, here: Path) -> None:
    file = training({**BASE, RATIO: 1})
    for seed in (0, 1):
        assert train(file, f"manual_seed={seed}", total=1, name=f"seed{seed}") == 0
    assert list(differences(saved(here, "seed0", 1), saved(here, "seed1", 1)))


def busiest(weights: dict[str, Any], name: str) -> Tensor:
    """Return the row of a buffer that belongs to the cluster with most tokens: an empty one may be given up."""
    lsp = {key: weights["params"][f"attention.0.lsp.{key}"] for key in (name, "pending_counts")}
    row: Tensor = lsp[name][int(lsp["pending_counts"].argmax())]
    return row


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


@pytest.mark.parametrize(
    "altered", cases(ALTERED, {"an optimizer's average", "a centroid", "the place in the epoch", "the seed"})
)
def test_one_altered_value_in_the_state_changes_the_end(altered: str, training: Write, here: Path) -> None:
    changes = {"network_g.type": "ForgetfulEDSR", "network_g.attention": [LCOA, {"type": "GMSA", "after": [1]}]}
    file = training({**SILENT, **changes, "manual_seed": ...})
    assert train(file, total=6) == 0
    assert train(file, total=9) == 0
    before = saved(here, "tiny", 9)
    part, alter = ALTERED[altered]
    target = here / "experiments/tiny" / {"state": "training_states/6.state", "weights": "models/net_g_6.pth"}[part]
    content = torch.load(target, map_location="cpu", weights_only=True)
    alter(content)
    torch.save(content, target)
    named = "path:resume_state=experiments/tiny/training_states/6.state"
    assert main(["train", "-opt", file, "--force_yml", named, "train:total_iter=9"]) == 0
    assert list(differences(saved(here, "tiny", 9)["weights"], before["weights"]))


def test_samples_used_before_are_not_read_again(training: Write, here: Path) -> None:
    file = training({"datasets.train.type": "NotingDataset", "val": ..., "logger.save_checkpoint_freq": 10})
    read = {}
    for name, total in (("whole", 12), ("tiny", 10), ("tiny", 12)):
        (here / "read.txt").write_text("")
        assert train(file, total=total, name=name) == 0
        read[name] = (here / "read.txt").read_text().split()
    assert len(read["whole"]) == 27  # the first sample in the check, and a batch that BasicSR asks for before it counts
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
    assert "note: training goes on, but not exactly as it would have without the stop" in caplog.text
    assert "no random numbers and no place in the epoch are in this state" in caplog.text
    assert iterations_logged(logs(here)[-1]) == [5, 6]


@pytest.mark.parametrize(
    ("alter", "note"),
    [
        (lambda exact: exact.update(manual_seed=5), "manual_seed is 0, and was 5"),
        (lambda exact: exact.update(random=exact["random"] * 2), "the number of processes is 1, and was 2"),
        (lambda exact: exact.update(place=None), "no place in the epoch is in this state"),
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
    "no map": (lambda state, _: torch.save([1], state), ".*4.state must hold a map, got a list"),
    "weights": (
        lambda state, weights: shutil.copy(weights, state),
        ".*4.state must hold a training state; iter: missing; it has no default; epoch: missing",
    ),
    "without weights": (lambda _, weights: weights.unlink(), "cannot read .*net_g_4.pth: No such file"),
    "code": (lambda state, _: torch.save({"iter": Path}, state), "cannot read .*4.state: Weights only load failed"),
}


@pytest.mark.promise("R21", "training states")
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
    "optimizers/0/param_groups/0/betas": (None, "does not fit this network and these options: "),
    "optimizers/0/state/0/exp_avg": (torch.zeros(3), "does not fit this network and these options: "),
    "optimizers/0/state/0/exp_avg ": ("abc", "does not fit this network and these options: "),
    "optimizers/0/state/0/exp_avg  ": (torch.full((8, 3, 3, 3), float("nan")), "a step of the optimizer must leave"),
    "schedulers/0": ({"get_lr": 3}, "does not fit this network and these options: "),
    "schedulers/0/last_epoch": ("abc", "does not fit this network and these options: "),
}


@pytest.mark.promise("R21", "values in training states")
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
    loaders = Run({**load(file)})  # what BasicSR is told: so many epochs it goes through, one by one
    loaders.opt, loaders.place, loaders.start_iteration = {"world_size": 1}, (0, 10**9), 4
    loader = torch.utils.data.DataLoader(range(60), batch_size=2)
    *_, last_epoch, _ = loaders.count_epochs(lambda: (loader, range(60), [], None, 8))()
    assert last_epoch == 1
    assert train(file, total=6) == 0


# --- options that were changed


def rates(log: Path) -> list[float]:
    return [float(rate) for rate in re.findall(r"lr:\((\S+),\)", log.read_text())]


def noted(here: Path, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the lines on changed options, of our model or of the command, since `caplog` was cleared."""
    lines = [*logs(here)[-1].read_text().splitlines(), *(record.message for record in caplog.records)]
    return [line.partition("note: ")[2] for line in lines if "what the option file says counts" in line]


COSINE = {"type": "CosineAnnealingRestartLR", "periods": [12], "eta_min": 1e-6}
MULTISTEP = {"type": "MultiStepLR", "milestones": [3, 7, 9], "gamma": 0.5}
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "the learning rate": ({}, {"train.optim_g.lr": 5e-4}, ["train.optim_g.lr is 0.0005, and was 0.001"]),
    "the learning rate of a cosine": (
        {"train.scheduler": COSINE},
        {"train.optim_g.lr": 5e-4},
        ["train.optim_g.lr is 0.0005, and was 0.001"],
    ),
    "milestones, one of them passed": (
        {},
        {"train.scheduler.milestones": [2, 8]},
        ["train.scheduler.milestones is [2, 8], and was [3, 7, 9]"],
    ),
    "gamma": ({}, {"train.scheduler.gamma": 0.1}, ["train.scheduler.gamma is 0.1, and was 0.5"]),
    "a longer cosine": (
        {"train.scheduler": {**COSINE, "periods": [5]}, "train.total_iter": 5},
        {"train.scheduler": COSINE},
        ["train.scheduler.periods is [12], and was [5]"],
    ),
    "more periods": (
        {"train.scheduler": {**COSINE, "periods": [5]}, "train.total_iter": 5},
        {"train.scheduler": {**COSINE, "periods": [4, 8], "restart_weights": [1, 0.5]}},
        ["train.scheduler.periods is [4, 8], and was [5]", "train.scheduler.restart_weights is [1, 0.5], and was [1]"],
    ),
    "a cosine in place of steps": (
        {},
        {"train.scheduler": COSINE},
        ["train.scheduler.type: there was a schedule with gamma, milestones, restart_weights, restarts, now eta_min"],
    ),
    "steps in place of a cosine": (
        {"train.scheduler": COSINE},
        {"train.scheduler": MULTISTEP},
        ["train.scheduler.type: there was a schedule with eta_min, periods, restart_weights, now gamma"],
    ),
    "warm-up": ({"train.warmup_iter": 8}, {"train.warmup_iter": 6}, ["train.warmup_iter is 6, and was 8"]),
    "no more warm-up": ({"train.warmup_iter": 8}, {"train.warmup_iter": -1}, ["train.warmup_iter is -1, and was 8"]),
}


@pytest.mark.parametrize("model", ["SparseSRModel", "SRModel"])
@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_schedule_goes_on_where_it_would_be(
    what: str, model: str, training: Write, here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The learning rates are those of a run that had it from the beginning, and a line tells each change."""
    first, then, told = CHANGES[what]
    if model == "SRModel" and "warm-up" in what:
        pytest.skip("its states do not tell the warm-up")
    base = {"val": ..., "model_type": model, "network_g.attention": None, "train.scheduler": MULTISTEP}
    base |= {"logger.save_checkpoint_freq": 5, "train.ema_decay": 0}
    assert train(training({**base, **first}), total=5) == 0
    after = {**base, **{key: value for key, value in first.items() if key != "train.total_iter"}, **then}
    caplog.clear()
    assert train(training(after), total=10) == 0
    notes = noted(here, caplog)
    assert len(notes) == len(told), notes
    for note, message in zip(notes, told, strict=True):
        assert message in note
    assert train(training(after), total=10, name="whole") == 0
    assert rates(logs(here)[-1]) == rates(logs(here, "whole")[-1])[5:]
    caplog.clear()
    assert train(training(after), total=11) == 0  # taken up as it is now: nothing has changed
    assert noted(here, caplog) == []


@pytest.mark.parametrize(
    ("optimizer", "option", "value"),
    [
        ("Adam", "weight_decay", 0.1),
        ("Adam", "betas", [0.5, 0.9]),
        ("AdamW", "eps", 1e-3),
        ("SGD", "momentum", 0.9),
        ("RMSprop", "alpha", 0.5),
    ],
)
def test_a_changed_option_of_the_optimizer_counts_and_is_told(
    optimizer: str, option: str, value: object, training: Write, here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = {"val": ..., "train.optim_g": {"type": optimizer, "lr": 1e-3}}
    assert train(training(base), total=4) == 0
    assert train(training({**base, "train.optim_g": {"type": optimizer, "lr": 1e-3, option: value}}), total=8) == 0
    (note,) = noted(here, caplog)
    assert note.startswith(f"train.optim_g.{option} is ")
    (group,) = saved(here, "tiny", 8)["state"]["optimizers"][0]["param_groups"]
    assert (list(group[option]) if isinstance(value, list) else group[option]) == value


def test_both_optimizers_of_a_gan_are_looked_at(training: Write, here: Path, caplog: pytest.LogCaptureFixture) -> None:
    gan = {
        "model_type": "SRGANModel",
        "network_d": {"type": "UNetDiscriminatorSN", "num_in_ch": 3, "num_feat": 4},
        "network_g.attention": None,
        "train.ema_decay": 0,
        "train.optim_d": {"type": "Adam", "lr": 1e-3},
        "train.gan_opt": {
            "type": "GANLoss",
            "gan_type": "vanilla",
            "real_label_val": 1.0,
            "fake_label_val": 0.0,
            "loss_weight": 0.1,
        },
        "val": ...,
    }
    assert train(training(gan), total=4) == 0
    assert train(training({**gan, "train.optim_d.lr": 1e-4, "train.optim_g.weight_decay": 0.1}), total=5) == 0
    notes = noted(here, caplog)
    assert [note.split(";")[0] for note in notes] == [
        "train.optim_g.weight_decay is 0.1, and was 0",
        "train.optim_d.lr is 0.0001, and was 0.001",
    ]


def test_another_optimizer_is_refused(training: Write, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(training({"val": ...}), total=4) == 0
    assert train(training({"val": ..., "train.optim_g.type": "AdamW"}), total=5) == 1
    assert (
        "sparse-sr: the state of iteration 4: train.optim_g.type must be Adam, with which it was saved, got AdamW"
        in capsys.readouterr().err
    )


def test_a_network_of_another_size_is_refused(training: Write, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(training({"val": ...}), total=4) == 0
    assert train(training({"val": ..., "network_g.num_block": 6}), total=5) == 1
    assert "net_g_4.pth: does not fit the network." in capsys.readouterr().err


def test_a_state_without_its_optimizer_is_refused(
    training: Write, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(training({"val": ...}), total=4) == 0
    target = here / "experiments/tiny/training_states/4.state"
    torch.save({**torch.load(target, weights_only=True), "optimizers": []}, target)
    assert train(training({"val": ...}), total=5) == 1
    message = capsys.readouterr().err
    assert "the state of iteration 4: does not fit this network and these options: Wrong lengths of opt" in message


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


# --- the pieces


def draws(epoch: int, rank: int = 0, processes: int = 1, used: int = 0) -> list[Draw]:
    from basicsr.data.data_sampler import EnlargedSampler

    sampler = SeededSampler(EnlargedSampler(range(5), processes, rank, 2), seed=3, resumed_epoch=1, used=used)
    assert list(sampler) == []  # before an epoch begins
    sampler.set_epoch(epoch)
    return list(sampler)


def test_the_order_is_basicsrs_and_every_draw_has_its_own_seed() -> None:
    from basicsr.data.data_sampler import EnlargedSampler

    theirs = EnlargedSampler(range(5), 1, 0, 2)
    theirs.set_epoch(4)
    ours = draws(4)
    assert [draw.number for draw in ours] == list(theirs)
    assert [draw.used for draw in ours] == list(range(1, 11))
    assert len({draw.entropy for draw in [*ours, *draws(5)]}) == 20


def test_processes_share_an_epoch() -> None:
    together = [draw.entropy for draw in draws(1)]
    apart = [[draw.entropy for draw in draws(1, rank, processes=2)] for rank in range(2)]
    assert [*apart[0], *apart[1]] == [*together[0::2], *together[1::2]]
    assert [draw.used for draw in draws(1, 1, processes=2)] == [2, 4, 6, 8, 10]


@pytest.mark.parametrize("used", [0, 1, 4, 10, 12])
def test_only_the_interrupted_epoch_is_cut(used: int) -> None:
    assert draws(1, used=used) == draws(1)[used:]
    assert draws(2, used=used) == draws(2)
    assert draws(1, 1, processes=2, used=used) == draws(1, 1, processes=2)[used // 2 :]


class Dice:
    """Samples that show what they drew."""

    def __getitems__(self, indices: list[int]) -> None:
        raise AssertionError("samples are read one by one")

    def __getitem__(self, index: int) -> dict[str, float]:
        return {"python": random.random(), "numpy": float(np.random.rand()), "torch": float(torch.rand(()))}  # noqa: S311


def test_a_sample_draws_what_its_seed_says_and_leaves_others_alone() -> None:
    dataset = PortableDataset(Dice())
    before = random_state()
    once, again, other = (dataset[Draw(0, 0, 1, (0, 0, last))] for last in (5, 5, 6))
    assert list(differences(random_state(), before)) == []
    assert once.pop("place_in_epoch").tolist() == [0, 1]
    assert all(again[key] == value and other[key] != value for key, value in once.items())
    batch = next(iter(torch.utils.data.DataLoader(dataset, sampler=[Draw(0, 0, 1, (0, 0, 5))])))
    assert float(batch["torch"]) == pytest.approx(once["torch"])
    plain = dataset[0]  # of a validation: no seed, no place
    assert plain.keys() == {"python", "numpy", "torch"}
    assert plain != dataset[0]


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    def draw() -> list[float]:
        return [
            random.random(),  # noqa: S311
            float(np.random.rand()),
            float(np.random.randn()),
            float(torch.rand(())),
            random.gauss(),
        ]

    draw()
    torch.save(random_state(), tmp_path / "state")
    expected = draw()
    with undisturbed():
        draw()
    with seeded([1]):
        one = draw()
    later = draw()
    with seeded([1]):
        assert draw() == one
    set_random_state(torch.load(tmp_path / "state", weights_only=True))
    assert draw() == expected
    assert draw() == later
