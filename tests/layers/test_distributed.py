"""Two processes: what learns in a forward is the same on both, and that of one process on the joined batch."""

import datetime
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tolerances import assert_bit_equal
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparse_sr_attn import ELAB, LSP, ProcessError, one_kmeans_update
from sparse_sr_attn.layers.batch_norm import BatchNorm2d
from sparse_sr_attn.layers.category import CategoryAttention

STEPS = 6
CHANNELS = 8
KMEANS: dict[str, Any] = {"num_clusters": 7, "chunk_size": 9, "reduction": 2, "ema_decay": 0.6, "reseed_threshold": 0.5}

ONE_UPDATE = "LSP, one update of two forwards"
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "LSP": lambda: LSP(CHANNELS, **KMEANS),
    "LSP, two rounds": lambda: LSP(CHANNELS, num_rounds=2, **KMEANS),
    ONE_UPDATE: lambda: LSP(CHANNELS, **KMEANS),
    "CategoryAttention": lambda: CategoryAttention(CHANNELS, categories="kmeans", **KMEANS),
    "BatchNorm2d": lambda: BatchNorm2d(CHANNELS),
}
PARTS = {"4 and 6 pictures": (4, 6), "2 and 8 pictures": (2, 8)}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return LAYERS[name]().train()


def batch(step: int, size: tuple[int, int] = (4, 6)) -> Tensor:
    return torch.randn(10, CHANNELS, *size, generator=torch.Generator().manual_seed(step))


def joined(rank: int, folder: str, seconds: float = 60) -> None:
    """Join the other process, which has so many seconds to come to each meeting."""
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=seconds)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=timeout)


def left() -> None:
    """Leave together: nobody goes while another still receives."""
    dist.barrier()
    dist.destroy_process_group()


def train(rank: int, folder: str) -> None:
    joined(rank, folder)
    for name in LAYERS:
        for parts, numbers in PARTS.items():
            layer = made(name)
            for step in range(STEPS):
                if name == ONE_UPDATE:
                    with one_kmeans_update(layer):
                        for half in batch(step).split(numbers)[rank].tensor_split(2):
                            layer(half)
                else:
                    layer(batch(step).split(numbers)[rank])
            torch.save(layer.state_dict(), f"{folder}/{name} {parts} {rank}.pth")
    # One value per channel has no variance of its own.
    layer = made("BatchNorm2d")
    for step in range(STEPS):
        x = batch(step, (1, 1)).split((1, 9))[rank].requires_grad_()
        layer(x).sum().backward()
    torch.save(layer.state_dict(), f"{folder}/one value {rank}.pth")
    left()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    mp.spawn(train, args=(str(folder),), nprocs=2)
    return folder


def saved(folder: Path, name: str) -> list[dict[str, Tensor]]:
    return [torch.load(folder / f"{name} {rank}.pth", weights_only=True) for rank in (0, 1)]


@pytest.mark.promise("R16")
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("name", LAYERS)
def test_two_processes_are_one(trained: Path, name: str, parts: str) -> None:
    first, second = saved(trained, f"{name} {parts}")
    alone = made(name)
    before = {key: value.clone() for key, value in alone.named_buffers()}
    for step in range(STEPS):
        alone(batch(step))
    for key, value in alone.state_dict().items():
        assert_bit_equal(first[key], second[key])
        torch.testing.assert_close(first[key], value, rtol=1e-6, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
    for key in ("centroids", "running_mean", "running_var"):
        if key in before:
            assert (first[key] - before[key]).abs().max() > 1e-2, key


def test_one_value_in_one_process_counts_with_those_of_the_other(trained: Path) -> None:
    first, second = saved(trained, "one value")
    alone = made("BatchNorm2d")
    for step in range(STEPS):
        alone(batch(step, (1, 1)))
    for key, value in alone.state_dict().items():
        assert_bit_equal(first[key], second[key])
        torch.testing.assert_close(first[key], value, rtol=1e-6, atol=1e-6)
    assert first["num_batches_tracked"] == STEPS


# --- one runs out of batches ------------------------------------------------------------------------------------------

SECONDS = 10.0
"""What the process group allows, where a test has to wait for it."""


class Weighing(nn.Module):
    """An LSP whose weights reach the output."""

    def __init__(self) -> None:
        super().__init__()
        self.lsp = LSP(CHANNELS, **KMEANS)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = x * self.lsp(x).weights.square().sum()
        return output


def step_through(model: nn.Module, rank: int) -> None:
    """Go through the batches: the second process has one, the first three."""
    for step in range(1 if rank else 3):
        model(batch(step)).sum().backward()


def leaves(network: nn.Module, rank: int) -> None:
    """The other one ends; the first would wait for ten minutes."""
    step_through(network, rank)


def waits(network: nn.Module, rank: int) -> None:
    """The other one waits elsewhere."""
    step_through(network, rank)
    if rank:
        dist.barrier()


def asks(network: nn.Module, rank: int) -> None:
    """Both ask before each step whether the other has one."""
    model = DistributedDataParallel(network)
    with model.join(throw_on_early_termination=True):
        step_through(model, rank)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, int], None]]] = {
    "k-means, both ask": (Weighing, asks),
    "k-means, the other waits": (Weighing, waits),
    "batch normalisation, the other waits": (lambda: ELAB(CHANNELS, window_sizes=(2, 4)), waits),
    "k-means, the other leaves": (Weighing, leaves),  # at last: its process ends
}


def out_of_batches(rank: int, folder: str) -> None:
    """Note how each case ends, and after how many seconds."""
    for name, (network, end) in CASES.items():
        case = f"{folder}/{name}"
        Path(case).mkdir(exist_ok=True)
        joined(rank, case, SECONDS if end is waits else 600)
        start, message = time.monotonic(), "no error"
        try:
            end(network().train(), rank)
        except (ProcessError, RuntimeError) as error:
            message = f"{type(error).__name__}: {error}"
        if end is not leaves:
            dist.destroy_process_group()
        Path(f"{case}/{rank}.txt").write_text(f"{time.monotonic() - start}\n{message}")


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each process ended with. After a timeout, gloo aborts a process now and then: then once more."""
    for again in (True, False):
        folder = tmp_path_factory.mktemp("ended")
        try:
            mp.spawn(out_of_batches, args=(str(folder),), nprocs=2)
            break
        except mp.ProcessExitedException:
            if not again:
                raise
    return folder


@pytest.mark.promise("R16")
@pytest.mark.parametrize("name", CASES)
def test_uneven_numbers_of_batches_end_in_an_error(ended: Path, name: str) -> None:
    """On the process that goes on, and in bounded time; with `join`, on all at once."""
    (seconds, first), (_, second) = ((ended / name / f"{rank}.txt").read_text().split("\n", 1) for rank in (0, 1))
    assert float(seconds) < SECONDS + 100
    if name.endswith("both ask"):
        assert first.startswith("RuntimeError: Detected at least one rank that exhausted inputs.")
        assert second.startswith("RuntimeError: Rank 1 exhausted all inputs.")
    else:
        what = name.partition(",")[0]
        assert first.startswith(f"ProcessError: process 0 of 2: {what} joins the statistics of all processes")
        assert "must run the same number of them" in first
        assert "model.join(throw_on_early_termination=True)" in first
