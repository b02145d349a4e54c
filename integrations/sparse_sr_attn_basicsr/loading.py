"""Data of which every sample follows from the seed, the epoch and its place in the epoch, and from nothing else.

BasicSR's augmentation draws from global random numbers, so what a sample looks like depends on how many workers there
are and on all that was drawn before. Here a sample brings its own seed along, and a resumed run passes over the samples
that were used before, unread.
"""

import functools
import importlib
import queue
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset, Sampler

from sparse_sr_attn.errors import ImageError
from sparse_sr_attn.images import read_image
from sparse_sr_attn_basicsr.randomness import seeded
from sparse_sr_attn_basicsr.registration import register

PLACE = "place_in_epoch"
"""Key of a training sample: (epoch, samples of the epoch used by all processes once this one is), as a tensor."""


class SampleError(ImageError):
    """A sample of a data set cannot be read."""

    def __init__(self, text: str) -> None:
        # PyTorch raises an error of a loader process again with a whole traceback as its text, and ours at the end.
        super().__init__(text.rpartition(f"{type(self).__name__}: ")[2].strip())


class Draw(NamedTuple):
    """What `SeededSampler` hands to `PortableDataset` in place of an index.

    Attributes:
        number: of the sample in the data set.
        epoch: in which it is drawn.
        used: samples of this epoch that all processes have used, once they have used this one.
        entropy: what its augmentation is seeded with.
    """

    number: int
    epoch: int
    used: int
    entropy: tuple[int, int, int]


class SeededSampler(Sampler[Draw]):
    """The samples of another sampler, in its order, each with a seed; those used before a resume are left out.

    Args:
        sampler: BasicSR's; knows `num_replicas`, `rank` and `set_epoch`.
        seed: of the run, >= 0; the same in all processes.
        resumed_epoch: the epoch in which the run was stopped.
        used: samples of that epoch used before, by all processes together.
    """

    def __init__(self, sampler: Any, seed: int, resumed_epoch: int = 0, used: int = 0) -> None:
        self.sampler = sampler
        self.seed = seed
        self.resumed_epoch = resumed_epoch
        self.used = used
        self.epoch: int | None = None

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch."""
        self.epoch = epoch
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Draw]:
        # BasicSR's prefetchers start reading once before the first epoch is set, and throw that away.
        if self.epoch is None:
            return
        processes, rank = self.sampler.num_replicas, self.sampler.rank
        skipped = self.used // processes if self.epoch == self.resumed_epoch else 0
        for number, index in enumerate(self.sampler):
            if number >= skipped:
                entropy = (self.seed, self.epoch, number * processes + rank)
                yield Draw(index, self.epoch, (number + 1) * processes, entropy)


class PortableDataset(Dataset[Any]):
    """A data set that knows `Draw`, and that repairs BasicSR's imports in the process to which it is sent.

    A sample that cannot be read raises `SampleError`, which names the file.

    Loader processes are forked or spawned, as the system and BasicSR's launcher have it. A spawned one imports BasicSR
    afresh when it unpickles the data set, and there nobody else has made the repairs.

    Args:
        dataset: one of BasicSR's.
    """

    # The loader asks for this first, and must not find that of the data set inside: it knows no `Draw`.
    __getitems__ = None

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int | Draw) -> Any:
        if not isinstance(index, Draw):
            return self._read(index)
        with seeded(index.entropy):
            sample = self._read(index.number)
        return {**sample, PLACE: torch.tensor([index.epoch, index.used])}

    def _read(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except Exception as error:  # decoders and other people's data sets raise anything
            raise SampleError(_why_unreadable(self.dataset, index, error)) from error

    def __getattr__(self, name: str) -> Any:
        """Pass on what BasicSR asks of its data sets."""
        return getattr(self.__dict__["dataset"], name)

    def __reduce__(self) -> tuple[Callable[..., "PortableDataset"], tuple["_Repairs", Any]]:
        """Have the repairs made before the data set is unpacked: arguments are unpacked in their order."""
        return _unpacked, (_Repairs(), self.dataset)


class Prefetcher:
    """What another iterator yields, read ahead by a thread; what that raises is raised here.

    In place of BasicSR's, whose reader waits forever after an error.

    Args:
        iterator: of batches.
        num_ahead: how many may be waiting, >= 1.
    """

    def __init__(self, iterator: Iterator[Any], num_ahead: int) -> None:
        self._queue: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(num_ahead)
        threading.Thread(target=self._read, args=(iterator,), daemon=True).start()

    def __iter__(self) -> "Prefetcher":
        return self

    def __next__(self) -> Any:
        item, error = self._queue.get()
        if error is not None:
            raise error
        return item

    def _read(self, iterator: Iterator[Any]) -> None:
        try:
            for item in iterator:
                self._queue.put((item, None))
            self._queue.put((None, StopIteration()))
        except Exception as error:
            self._queue.put((None, error))


class _Repairs:
    """Makes the repairs where it is unpacked."""

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return register, ()


def _why_unreadable(dataset: Any, index: int, error: Exception) -> str:
    """Return which file or entry of a sample is broken, as far as can be found out, and what was said of it."""
    sources = _sources(dataset, index)
    for name, read in sources.items():
        try:
            read()
        except ImageError as reason:
            return f"{name}: {reason}"
        except Exception:  # noqa: S112  (what can be said of it, the first error says)
            continue
    frame = traceback.extract_tb(error.__traceback__)[-1]
    said = " ".join(str(error).split())
    names = " and ".join(sources) or f"sample {index}"
    return f"{names}: {type(error).__name__}: {said} ({Path(frame.filename).name}, line {frame.lineno})"


def _sources(dataset: Any, index: int) -> dict[str, Callable[[], object]]:
    """Return what a sample is read from, by name, with a function that reads it."""
    paths = getattr(dataset, "paths", None)  # as BasicSR's data sets have them
    entry = paths[index] if isinstance(paths, list) and index < len(paths) else {}
    backend = getattr(dataset, "io_backend_opt", None) or {}
    databases = dict(zip(backend.get("client_keys", ()), backend.get("db_paths", ()), strict=False))
    named = entry if isinstance(entry, dict) else {next(iter(databases), "lq"): entry}
    sources: dict[str, Callable[[], object]] = {}
    for key, path in named.items():
        client = str(key).removesuffix("_path")
        if client in databases:
            name = f"{databases[client]}, key {str(path)!r}"
            sources[name] = functools.partial(_read_entry, dataset.file_client, str(path), client)
        elif not databases:
            sources[str(path)] = functools.partial(read_image, Path(str(path)))
    return sources


def _read_entry(file_client: Any, key: str, client: str) -> None:
    """Read an image from a database.

    Raises:
        ImageError: it is not there, or cannot be decoded.
    """
    value = file_client.get(key, client)
    if value is None:
        raise ImageError("has no such entry; meta_info.txt beside it lists more than was written")
    try:
        importlib.import_module("basicsr.utils").imfrombytes(value, float32=True)
    except Exception as error:  # its decoders raise anything
        raise ImageError(f"holds {len(value)} bytes that are no image, or a broken one") from error


def _unpacked(_: None, dataset: Any) -> PortableDataset:
    return PortableDataset(dataset)
