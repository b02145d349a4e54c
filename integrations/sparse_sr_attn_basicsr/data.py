"""Training data in which every sample is determined by the seed, the epoch and its position in the epoch.

BasicSR's augmentation draws from global random numbers, so a sample depends on the number of workers and on everything
drawn before. Here each sample carries its own seed, and a resumed run skips the samples used before without reading
them.
"""

import functools
import importlib
import itertools
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset, Sampler

from sparse_sr_attn.data.images import read_image
from sparse_sr_attn.errors import ImageError
from sparse_sr_attn_basicsr import shims
from sparse_sr_attn_basicsr.randomness import seeded

shims.apply()  # a spawned process imports this module first, then BasicSR, to unpickle a data set

PLACE = "place_in_epoch"
"""Key of a training sample: (epoch, number of samples of the epoch that all processes have used with it), a tensor."""


class SampleError(ImageError):
    """A sample of a data set cannot be read."""

    def __init__(self, text: str) -> None:
        # PyTorch raises an error of a loader process again with a whole traceback as its text, and ours at the end.
        super().__init__(text.rpartition(f"{type(self).__name__}: ")[2].strip())


class Draw(NamedTuple):
    """What `RunSampler` passes to `PortableDataset` instead of an index.

    Attributes:
        number: index of the sample in the data set.
        epoch: the epoch in which it is drawn.
        used: number of samples of this epoch that all processes have used, including this one.
        entropy: seed of its augmentation.
    """

    number: int
    epoch: int
    used: int
    entropy: tuple[int, int, int]


class RunSampler(Sampler[Draw]):
    """The samples of a whole run, epoch after epoch in full batches, from the position of a resumed run.

    One pass is the whole run, so loader processes start once and prefetch across epochs.

    Args:
        sampler: BasicSR's `EnlargedSampler`, which gives the order within an epoch.
        seed: `manual_seed`.
        batch_size: of one process. Samples at the end of an epoch that do not fill a batch are dropped.
        num_batches: of the run.
        start: the epoch to start in, and the number of its samples that all processes together have used.
    """

    def __init__(
        self, sampler: Any, seed: int, *, batch_size: int, num_batches: int, start: tuple[int, int] = (0, 0)
    ) -> None:
        self.sampler = sampler
        self.seed = seed
        self.batch_size = batch_size
        self.num_batches = num_batches
        self.start = start

    def __len__(self) -> int:
        return self.batch_size * self.num_batches

    def __iter__(self) -> Iterator[Draw]:
        first, used = self.start
        processes, rank = self.sampler.num_replicas, self.sampler.rank
        epochs = (
            self._epoch(e, used // processes if e == first else 0, processes, rank) for e in itertools.count(first)
        )
        return itertools.islice(itertools.chain.from_iterable(epochs), len(self))

    def _epoch(self, epoch: int, skipped: int, processes: int, rank: int) -> Iterator[Draw]:
        self.sampler.set_epoch(epoch)
        order = list(self.sampler)
        unfilled = (len(order) - skipped) % self.batch_size
        for number in range(skipped, len(order) - unfilled):
            entropy = (self.seed, epoch, number * processes + rank)
            yield Draw(order[number], epoch, (number + 1) * processes, entropy)


class PortableDataset(Dataset[Any]):
    """A data set of BasicSR that accepts `Draw` and can be sent to spawned loader processes.

    A sample that cannot be read raises `SampleError`, which names the file.

    Args:
        dataset: one of BasicSR's.
    """

    # The loader looks for this first, and must not find that of the wrapped data set, which does not accept `Draw`.
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
        except Exception as error:  # decoders and third-party data sets can raise anything
            raise SampleError(_why_unreadable(self.dataset, index, error)) from error

    def __getattr__(self, name: str) -> Any:
        """Forward the attributes that BasicSR reads from its data sets."""
        if name.startswith("__"):  # while it is unpickled there is no data set yet
            raise AttributeError(name)
        return getattr(self.dataset, name)


def _why_unreadable(dataset: Any, index: int, error: Exception) -> str:
    """Return the damaged file or entry of a sample, as far as it can be found, and the reason."""
    sources = _sources(dataset, index)
    for name, read in sources.items():
        try:
            read()
        except ImageError as reason:
            return f"{name}: {reason}"
        except Exception:  # noqa: S112  (the first error tells more)
            continue
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    names = " and ".join(sources) or f"sample {index}"
    return f"{names}: {type(error).__name__}: {text} ({Path(frame.filename).name}, line {frame.lineno})"


def _sources(dataset: Any, index: int) -> dict[str, Callable[[], object]]:
    """Return the files or entries of a sample by name, each with a function that reads it."""
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
    """Read an image from a database, or raise ImageError."""
    value = file_client.get(key, client)
    if value is None:
        raise ImageError("has no such entry, although meta_info.txt beside it lists it")
    try:
        importlib.import_module("basicsr.utils").imfrombytes(value, float32=True)
    except Exception as error:  # its decoders raise anything
        raise ImageError(f"holds {len(value)} bytes that are not an image, or a damaged one") from error
