"""Samples follow from the seed and their place, and one that cannot be read is named."""

import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from basicsr.data.paired_image_dataset import PairedImageDataset
from skimage import io as images

from sparse_sr_attn_basicsr.data import Draw, PortableDataset, RunSampler, SampleError
from sparse_sr_attn_basicsr.randomness import random_state


def draws(epoch: int, rank: int = 0, processes: int = 1, used: int = 0) -> list[Draw]:
    """Return what is drawn in an epoch of 10 samples, of a run that starts in epoch 1."""
    from basicsr.data.data_sampler import EnlargedSampler

    epochs = EnlargedSampler(range(5), processes, rank, 2)
    sampler = RunSampler(epochs, 3, batch_size=1, num_batches=60, start=(1, used))
    drawn = list(sampler)
    assert len(drawn) == len(sampler) == 60
    return [draw for draw in drawn if draw.epoch == epoch]


def test_the_order_is_basicsrs_and_every_draw_has_its_own_seed() -> None:
    from basicsr.data.data_sampler import EnlargedSampler

    theirs = EnlargedSampler(range(5), 1, 0, 2)
    theirs.set_epoch(4)
    ours = draws(4)
    assert [draw.number for draw in ours] == list(theirs)
    assert [draw.used for draw in ours] == list(range(1, 11))
    assert len({draw.entropy for draw in [*ours, *draws(5)]}) == 20


@pytest.mark.parametrize("used", [0, 3, 7])
def test_a_run_is_full_batches_of_one_epoch_each(used: int) -> None:
    """What fills no batch at the end of an epoch is left out."""
    from basicsr.data.data_sampler import EnlargedSampler

    sampler = RunSampler(EnlargedSampler(range(5), 1, 0, 2), 3, batch_size=3, num_batches=9, start=(4, used))
    drawn = list(sampler)
    batches = [drawn[i : i + 3] for i in range(0, len(drawn), 3)]
    assert len(batches) == 9
    assert all(len({draw.epoch for draw in batch}) == 1 for batch in batches)
    assert [draw.used for draw in drawn if draw.epoch == 4] == list(range(used + 1, 10 - (10 - used) % 3 + 1))
    assert [draw.used for draw in drawn if draw.epoch == 5] == list(range(1, 10))


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
    assert repr(random_state()) == repr(before)
    assert torch.equal(random_state()["torch"], before["torch"])
    assert once.pop("place_in_epoch").tolist() == [0, 1]
    assert all(again[key] == value and other[key] != value for key, value in once.items())
    batch = next(iter(torch.utils.data.DataLoader(dataset, sampler=[Draw(0, 0, 1, (0, 0, 5))])))
    assert float(batch["torch"]) == pytest.approx(once["torch"])
    plain = dataset[0]  # of a validation: no seed, no place
    assert plain.keys() == {"python", "numpy", "torch"}
    assert plain != dataset[0]


class Broken(torch.utils.data.Dataset[Any]):
    """A data set whose file is fine and whose code is not."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        raise KeyError("what\nelse")


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_data_set_raises_is_one_line_that_names_sample_and_place(workers: int, tmp_path: Path) -> None:
    images.imsave(tmp_path / "fine.png", np.zeros((4, 4, 3), np.uint8), check_contrast=False)
    for paths, name in (([], "sample 0"), ([str(tmp_path / "fine.png")], f"{tmp_path}/fine.png")):
        loader = torch.utils.data.DataLoader(PortableDataset(Broken(paths)), num_workers=workers)
        with pytest.raises(SampleError) as caught:
            next(iter(loader))
        beginning, _, line = str(caught.value).partition(", line ")
        assert beginning == f"{name}: KeyError: 'what\\nelse' (test_data.py"
        assert line.removesuffix(")").isdecimal()


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
