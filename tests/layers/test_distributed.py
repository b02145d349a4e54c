"""k-means over two processes: the same on both, and that of one process on the joined batch."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sparse_sr_attn import LSP

STEPS = 6


def make_lsp() -> LSP:
    torch.manual_seed(0)
    return LSP(8, num_clusters=7, chunk_size=9, reduction=2, ema_decay=0.6, reseed_threshold=0.5).train()


def batch(step: int) -> torch.Tensor:
    return torch.randn(5, 8, 4, 6, generator=torch.Generator().manual_seed(step))


def train(rank: int, world_size: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    lsp = make_lsp()
    for step in range(STEPS):
        lsp(batch(step)[:2] if rank == 0 else batch(step)[2:])  # uneven: 2 and 3 pictures
    torch.save(lsp.state_dict(), f"{folder}/{rank}.pth")
    dist.barrier()  # nobody leaves while another still receives
    dist.destroy_process_group()


def test_two_processes_are_one(tmp_path: Path) -> None:
    mp.spawn(train, args=(2, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in (0, 1))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name

    alone = make_lsp()
    initial = alone.centroids.clone()
    for step in range(STEPS):
        alone(batch(step))
    assert (alone.centroids - initial).abs().max() > 0.1
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(
            first[name], value, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
