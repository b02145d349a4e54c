"""Several processes: loaders that are spawned, trainers that stop together."""

import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from basicsr.data.paired_image_dataset import PairedImageDataset

from sparse_sr_attn_basicsr.loading import PortableDataset

TRAINER = """
import torch
import torch.distributed as dist
from sparse_sr_attn.errors import TrainingError
from sparse_sr_attn_basicsr import preflight, register
from sparse_sr_attn_basicsr.options import load

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
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.promise("R16", "trainers stop together")
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
        outputs = [process.communicate(timeout=100) for process in processes]
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


def test_a_data_set_sent_to_a_new_process_finds_basicsr(photographs: Path, tmp_path: Path) -> None:
    options = {
        **{"dataroot_gt": str(photographs / "datasets/val/HR"), "dataroot_lq": str(photographs / "datasets/val/LR")},
        **{"name": "val", "io_backend": {"type": "disk"}, "scale": 2, "phase": "val"},
    }
    dataset = PortableDataset(PairedImageDataset(options))
    (tmp_path / "sent").write_bytes(pickle.dumps(dataset))
    code = (
        "import pickle, sys, pathlib; data = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())\n"
        "assert len(data) == 3 and data.opt['name'] == 'val' and data[0]['lq'].shape == (3, 32, 32)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "sent")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_loaders_that_are_spawned_find_basicsr(training: Callable[..., str], here: Path) -> None:
    file = training({"datasets.train.num_worker_per_gpu": 1, "train.total_iter": 1, "val": ...})
    code = (
        "import multiprocessing, sys; multiprocessing.set_start_method('spawn')\n"
        f"from sparse_sr_attn.cli import main; sys.exit(main(['train', '-opt', {file!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (here / "experiments" / "tiny" / "models" / "net_g_latest.pth").is_file()
