"""`torchrun ... -m sparse_sr_attn train --launcher pytorch` on the CPU, and what happens when a process is killed."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from basicsr_runs import GAN
from torch import Tensor

from sparse_sr_attn import PRESETS
from sparse_sr_attn.cli.main import main
from sparse_sr_attn_basicsr.distributed import peer_errors

Write = Callable[..., str]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
SECONDS = 120
"""More than any of these runs takes: a run that hangs fails."""


# Plain steps on the mean gradient: so two processes make those of one on the batch of both, to rounding.
STEPS = {"train.optim_g": {"type": "SGD", "lr": 0.05}, "train.total_iter": 3, "val": ...}
HALF = {"datasets.train.batch_size_per_gpu": 1}

NOTING = """\
import os
from pathlib import Path
import torch
from sparse_sr_attn_basicsr.model import SparseSRModel

rank = os.environ["RANK"]
Path("pid" + rank).write_text(str(os.getpid()))
save = SparseSRModel.save

def noting(self, epoch, current_iter):
    torch.save(self.get_bare_model(self.net_g).state_dict(), f"rank{rank}.pth")
    save(self, epoch, current_iter)

SparseSRModel.save = noting
"""
"""Imported by both processes: notes their ids and, when the first one saves, the weights of each."""


@pytest.fixture
def noting(training: Write, here: Path) -> Write:
    """Write an option file of a run that notes."""
    (here / "noting.py").write_text(NOTING)

    def write(changes: dict[str, Any], name: str = "noting.yml") -> str:
        return training({**changes, "custom_imports": ["noting.py"]}, name)

    return write


def ended(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Return what a process printed until it ended, which it must do in time."""
    try:
        return process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        pytest.fail(f"still running after {SECONDS} seconds", pytrace=False)


@contextmanager
def launched(*arguments: str, command: str = "train") -> Iterator[subprocess.Popen[str]]:
    """Start two processes as a user would; end with them all dead."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    line += ["-m", "sparse_sr_attn", command, "-opt", *arguments, "--launcher", "pytorch"]
    process = subprocess.Popen(
        line,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=60)


def run(*arguments: str, command: str = "train") -> str:
    """Run two processes to their end; return what they wrote."""
    with launched(*arguments, command=command) as process:
        output, errors = ended(process)
    assert process.returncode == 0, errors
    return output + errors


def loaded(file: Path) -> Any:
    return torch.load(file, map_location="cpu", weights_only=True)


def assert_alike(here: Path) -> dict[str, Tensor]:
    """Hold the two processes to the same bits, and return these."""
    first, second = (loaded(here / f"rank{rank}.pth") for rank in (0, 1))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    return first


LCOAN = {"type": "LCoAN", "num_feat": 8, "num_group": 2, "num_block": 1, "num_clusters": 8, "chunk_size": 16}
ELAN = {"type": "ELAN", "num_feat": 12, "num_block": 2, "share": 2, "window_sizes": [2, 4, 8]}
LIGHT = {name: {"type": name.removesuffix("-light"), **PRESETS[name].options} for name in ("LCoAN-light", "ELAN-light")}


@pytest.mark.promise("R16")
@pytest.mark.parametrize(
    "network",
    [
        pytest.param(LCOAN, id="LCoAN"),
        pytest.param(ELAN, id="ELAN", marks=pytest.mark.slow),
        *(pytest.param(options, id=name, marks=pytest.mark.slow) for name, options in LIGHT.items()),
    ],
)
def test_two_processes_train_as_one_does_on_the_batch_of_both(
    network: dict[str, Any], noting: Write, training: Write, here: Path
) -> None:
    """Except that BatchNorm normalises the batch of each process by itself."""
    network = {**network, "upscale": 2}
    run(noting({**STEPS, **HALF, "network_g": network}))
    both = assert_alike(here)
    assert main(["train", "-opt", training({**STEPS, "network_g": network, "name": "alone"})]) == 0
    alone = loaded(here / "experiments/alone/models/net_g_latest.pth")["params"]
    counters = [name for name in both if name.endswith(("num_updates", "num_batches_tracked"))]
    assert counters
    for name in counters:
        assert torch.equal(both[name], alone[name]), name
    if not any("running_mean" in name for name in both):
        for name, value in alone.items():
            close = 1e-5 if "pending" in name else 1e-6  # sums over hundreds of tokens
            torch.testing.assert_close(both[name], value, rtol=close, atol=close, msg=lambda t, n=name: f"{n}: {t}")
    short = {**STEPS, "network_g": network, "name": "less", "train.total_iter": 1}
    assert main(["train", "-opt", training(short)]) == 0
    less = loaded(here / "experiments/less/models/net_g_latest.pth")["params"]
    learnt = [name for name in both if name.endswith(("conv_first.weight", "centroids", "running_mean"))]
    assert all((both[name] - less[name]).abs().max() > 1e-5 for name in learnt), "the runs show no difference"


@pytest.mark.slow
def test_two_processes_train_a_gan_as_one_does(noting: Write, training: Write, here: Path) -> None:
    changes = {**STEPS, **GAN, "model_type": "SparseSRGANModel", "network_g": {**LCOAN, "upscale": 2}}
    changes |= {"train.optim_d": {"type": "SGD", "lr": 0.05}, "train.gan_opt.loss_weight": 0.1}
    run(noting({**changes, **HALF}))
    both = assert_alike(here)
    assert main(["train", "-opt", training({**changes, "name": "alone"})]) == 0
    models = here / "experiments"
    for net in ("net_g", "net_d"):
        two, one = (loaded(models / name / f"models/{net}_latest.pth")["params"] for name in ("tiny", "alone"))
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=lambda t, n=name: f"{n}: {t}")
    averaged = loaded(models / "tiny/models/net_g_latest.pth")["params_ema"]
    assert torch.equal(averaged["conv_first.weight"], both["conv_first.weight"]) is False
    centroids = next(name for name in both if name.endswith("centroids"))
    assert torch.equal(averaged[centroids], both[centroids])


@pytest.mark.slow
def test_validation_and_testing_go_through_a_launcher_too(training: Write, testing: Write, here: Path) -> None:
    """On the first process; the other one waits. The file asks for nccl, as ours do, and gets gloo."""
    changes = {"train.total_iter": 2, "train.ema_decay": 0, "val.val_freq": 1}
    file = training({**changes, "dist_params": {"backend": "nccl", "port": 29500}})
    assert run(file).count("# psnr") == 3  # after each iteration, and at the end
    assert run(testing({"path.param_key_g": "params"}), command="test").count("# psnr") == 1


KILLED = {**HALF, "train.total_iter": 12, "logger.save_checkpoint_freq": 2, "val": ..., "path.resume_state": None}
"""Adam, EMA and augmentation: all that a state has to hold."""


def states(here: Path) -> list[int]:
    return sorted(int(file.stem) for file in here.glob("experiments/tiny/training_states/*.state"))


def test_after_a_run_the_signal_means_what_it_did() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with peer_errors("pytorch"):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.promise("R16")
@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 0])
def test_a_killed_process_ends_the_run_which_can_be_resumed_exactly(noting: Write, here: Path, victim: int) -> None:
    file = noting(KILLED)
    with launched(file, "--force_yml", "train:total_iter=1000000") as process:
        deadline = time.monotonic() + SECONDS
        while not states(here):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "no state was saved"
            time.sleep(0.05)
        os.kill(int((here / f"pid{victim}").read_text()), signal.SIGKILL)
        _, errors = ended(process)
    assert process.returncode != 0
    told = re.search(rf"sparse-sr: process {1 - victim} of 2: .*\n(.*)", errors)
    assert told is not None, errors
    assert "Traceback" not in errors[: told.end()]
    newest = states(here)[-1]
    assert told[1] == (
        f"The newest state is {here}/experiments/tiny/training_states/{newest}.state; "
        "resume from it with --auto_resume."
    )

    total = newest + 3
    run(file, "--auto_resume", "--force_yml", f"train:total_iter={total}")
    resumed = assert_alike(here)
    run(file, "--force_yml", "name=whole", f"train:total_iter={total}")
    for name, value in assert_alike(here).items():
        assert torch.equal(value, resumed[name]), name


TRAINER = """
import torch
import torch.distributed as dist
from sparse_sr_attn.errors import TrainingError
from sparse_sr_attn_basicsr import preflight, register
from sparse_sr_attn_basicsr.option_file import load

register()
from sparse_sr_attn_basicsr.model import SparseSRModel

dist.init_process_group("gloo")
rank = dist.get_rank()
def build(network=None, **train):
    options = load("train.yml")
    opt, _ = preflight.check({**options, "network_g": network or options["network_g"]}, training=True)
    opt["train"] |= train
    opt["path"] |= {"models": ".", "training_states": "."}
    return SparseSRModel({**opt, "is_train": True, "dist": True, "rank": rank, "world_size": 2})
model = build()

def batch(seed):
    rng = torch.Generator().manual_seed(seed)
    images = [torch.rand(1, 3, size, size, generator=rng) for size in (16, 32)]
    return {"lq": images[0], "gt": images[1], "lq_path": [f"rank{rank}.png"]}

for iteration in (1, 2):
    model.feed_data(batch(10 * iteration + rank))
    model.optimize_parameters(iteration)
buffers = dict(model.net_g.module.named_buffers())
print("centroids", float(next(b for n, b in buffers.items() if n.endswith("centroids")).double().sum()))

# Every process gets its own random numbers back.
torch.manual_seed(rank)
model.save(0, 2)
drawn = float(torch.rand(1))
dist.barrier()
state = torch.load("2.state", weights_only=True)
torch.manual_seed(99)
build().resume_training(state)
print("drawn", drawn)
print("again", float(torch.rand(1)))

# A batch in two parts makes the same step, the same on both processes. (Frozen centroids: those move twice.)
both = {key: torch.cat([batch(50 + rank)[key], batch(60 + rank)[key]]) for key in ("lq", "gt")}
for parts in (1, 2):
    parted = build(accumulate=parts, optim_g={"type": "SGD", "lr": 1.0}, ema_decay=0)
    for module in parted.net_g.modules():
        module.ema_decay = 1.0
    with torch.no_grad():
        for number, p in enumerate(parted.net_g.parameters()):
            p.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number)))
    parted.feed_data(both)
    parted.optimize_parameters(1)
    print(f"parts{parts}", float(sum(p.double().square().sum() for p in parted.net_g.parameters())))

# BatchNorm: the running statistics are those of both batches, and the EMA network has them.
elan = build({"type": "ELAN", "num_feat": 6, "num_block": 1, "upscale": 2, "window_sizes": [2, 4]})
norm = next(m for n, m in elan.net_g.module.named_modules() if n.endswith("query.norm"))
begun = []
norm.register_forward_pre_hook(lambda module, _: begun.append(float(module.running_mean.double().sum())))
for iteration in (1, 2):
    elan.feed_data(batch(70 * iteration + rank))
    elan.optimize_parameters(iteration)
    if iteration == 1:
        print("ended", float(norm.running_mean.double().sum()))
print("begun", begun[1])
averaged = dict(elan.net_g_ema.named_buffers())
print("copied", all(torch.equal(b, averaged[n]) for n, b in elan.net_g.module.named_buffers()))

for fault in ("image", "loss"):
    bad = batch(30 + rank)
    if fault == "loss":  # Weights so large that 3e38 overflows in each product, whatever they were drawn as.
        with torch.no_grad():
            next(iter(model.net_g.parameters())).mul_(1e4)
    if rank == 1:
        bad["lq"][:] = float("nan") if fault == "image" else 3e38
    try:
        model.feed_data(bad)
        model.optimize_parameters(3)
    except TrainingError as error:
        print(fault, str(error).partition("\\n")[0])
    print("healthy", model.is_healthy(), model.iteration)
# Validation runs on the first process only, and must not wait for the others.
if rank == 0:
    model._validating = True
    model.feed_data(batch(40))
"""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.promise("R16")
def test_all_trainers_stop_together(training: Callable[..., str]) -> None:
    training()
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TRAINER],
            env={**os.environ, **shared, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    lines = [dict(line.split(" ", 1) for line in output.splitlines() if " " in line) for output, _ in outputs]
    assert lines[0]["centroids"] == lines[1]["centroids"]
    assert [line["drawn"] for line in lines] == [line["again"] for line in lines]
    assert lines[0]["drawn"] != lines[1]["drawn"]
    assert lines[0]["parts1"] == lines[1]["parts1"]
    assert lines[0]["parts2"] == lines[1]["parts2"]
    assert float(lines[0]["parts1"]) == pytest.approx(float(lines[0]["parts2"]), rel=1e-9)
    assert lines[0]["ended"] == lines[1]["ended"]
    assert [line["begun"] for line in lines] == [lines[0]["ended"]] * 2
    assert [line["copied"] for line in lines] == ["True", "True"]
    assert [line["healthy"] for line in lines] == ["True 2", "True 2"]
    assert lines[0]["image"].endswith("NaN or infinity is in images of another process")
    assert "is in these images" in lines[1]["image"]
    # The gradients were averaged over both before they were looked at.
    assert "iteration 3: the gradient must be finite" in lines[0]["loss"]
    assert "iteration 3: the loss must be finite" in lines[1]["loss"]
