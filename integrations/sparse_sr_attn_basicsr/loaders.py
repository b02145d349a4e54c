"""Loaders of training, validation and test data, on BasicSR's data sets and `build_dataloader`."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from basicsr.data import build_dataloader, build_dataset
from basicsr.data.data_sampler import EnlargedSampler
from basicsr.data.prefetch_dataloader import CUDAPrefetcher
from basicsr.utils import get_root_logger

from sparse_sr_attn.errors import ConfigError
from sparse_sr_attn_basicsr.data import PortableDataset, RunSampler


def training_batches(
    opt: Mapping[str, Any], num_batches: int, start: tuple[int, int] = (0, 0)
) -> Iterator[Mapping[str, Any]]:
    """Return the batches of a run, prefetched if the options say so; the batches are the same.

    Args:
        opt: complete options, see `option_file.complete`.
        num_batches: number of batches left in the run.
        start: see `RunSampler`.

    Raises:
        ConfigError: an epoch does not fill a batch.
    """
    options = {**opt["datasets"]["train"], "persistent_workers": False}  # one pass over the loader is the whole run
    mode = options.pop("prefetch_mode", None)
    if mode == "cpu":  # BasicSR prefetches in a thread, which would change the random states of training
        options["num_worker_per_gpu"] = max(1, options["num_worker_per_gpu"])
    dataset = PortableDataset(build_dataset(options))
    ratio = options.get("dataset_enlarge_ratio", 1)
    epoch = EnlargedSampler(dataset, opt["world_size"], opt["rank"], ratio)
    batch_size = options["batch_size_per_gpu"] * (1 if opt["dist"] else max(1, opt["num_gpu"]))
    per_epoch = len(epoch) // batch_size
    if not per_epoch:
        message = f"an epoch of {len(epoch)} samples must fill a batch of {batch_size}; enlarge it"
        raise ConfigError.at("datasets.train.dataset_enlarge_ratio", message)
    seed = opt["manual_seed"]
    sampler = RunSampler(epoch, seed, batch_size=batch_size, num_batches=num_batches, start=start)
    loader = build_dataloader(dataset, options, num_gpu=opt["num_gpu"], dist=opt["dist"], sampler=sampler, seed=seed)
    loader.generator = torch.Generator()  # or starting it draws a global random number before the network is built
    if loader.num_workers and "num_prefetch_queue" in options:
        loader.prefetch_factor = options["num_prefetch_queue"]
    get_root_logger().info(
        f"Number of train images: {len(dataset)}, enlarged {ratio} times; {per_epoch} iterations an epoch of "
        f"{opt['world_size']} x {batch_size} samples; {num_batches} iterations to go"
    )
    return iter(CUDAPrefetcher(loader, opt).next, None) if mode == "cuda" else iter(loader)


def evaluation_loader(options: Mapping[str, Any], opt: Mapping[str, Any]) -> Any:
    """Return the loader of a data set to validate or test on, from its options and complete options."""
    dataset = PortableDataset(build_dataset(options))
    get_root_logger().info(f"Number of {options['phase']} images in {options['name']}: {len(dataset)}")
    options = {**options, "prefetch_mode": None, "persistent_workers": False}  # BasicSR evaluates without workers
    return build_dataloader(dataset, options, num_gpu=opt["num_gpu"], dist=opt["dist"])
