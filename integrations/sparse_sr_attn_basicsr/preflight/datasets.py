"""Checks of `datasets`: options, folders, and the first sample of each data set."""

import copy
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from sparse_sr_attn.config import fields, join_path
from sparse_sr_attn.errors import ConfigError, Problem
from sparse_sr_attn_basicsr import option_names, schema
from sparse_sr_attn_basicsr.data import PortableDataset, SampleError
from sparse_sr_attn_basicsr.preflight.findings import Findings, bases, similar_file, without_warnings
from sparse_sr_attn_basicsr.preflight.signatures import reason
from sparse_sr_attn_basicsr.preflight.validation import Metrics, try_metrics
from sparse_sr_attn_basicsr.randomness import undisturbed

_PAIRED = "PairedImageDataset"


def check(findings: Findings, metrics: Metrics) -> None:
    """Check every data set, and the metrics on the sizes of its images."""
    datasets, training = findings.options.get("datasets"), findings.training
    if not isinstance(datasets, Mapping):
        return
    findings.options["datasets"] = {
        phase: _check_dataset(findings, str(phase), values, metrics) for phase, values in datasets.items()
    }
    validated = [phase for phase in datasets if str(phase).startswith("val")]
    if training and "train" not in datasets:
        findings.add("datasets.train", "missing; training needs images")
    if training and bool(validated) != bool(findings.options.get("val")):
        findings.remarks.append(
            f"datasets.{validated[0]}: nothing is validated without the section val"
            if validated
            else "val: nothing is validated without a data set in datasets.val"
        )
    if not training and not datasets:
        findings.add("datasets", "must hold at least one data set, e.g. test_1, got none")


def _check_dataset(findings: Findings, phase: str, values: Any, metrics: Metrics) -> Any:
    """Check one data set, and return its options."""
    path, kind, before = f"datasets.{phase}", phase.split("_", maxsplit=1)[0], len(findings.problems)
    allowed = ("train", "val") if findings.training else ("val", "test")
    if kind not in allowed or (kind == "train" and phase != "train"):
        names = " and ".join(f"{name}, {name}_2, ..." if name != "train" else name for name in allowed)
        findings.add(path, f"data sets must be named {names}, got {phase!r}")
        return values
    if not isinstance(values, Mapping):
        findings.add(path, f"must be a mapping, got {values!r}")
        return values
    values = dict(values)
    right = findings.section(schema.TrainingSet if kind == "train" else schema.Dataset, values, path, whole=False)
    build = findings.by_name("DATASET", f"{path}.type", right["type"]) if "type" in right else None
    known = {*fields(schema.TrainingSet), *option_names.names_in(*bases(build)), *findings.names}
    findings.unread(path, values, sorted(known))
    _check_values(findings, path, values, right)
    reads_all = values.get("cache_data")  # an option of forks; building the data set would read all images
    if build is None or len(findings.problems) > before or findings.scale is None or reads_all:
        return values
    try:
        number, sample = _first_sample(build, {**values, "phase": kind, "scale": findings.scale}, path)
    except ConfigError as error:
        findings.add_all(error)
        return values
    _check_sizes(findings, path, sample, findings.scale)
    if kind == "train":
        _check_epoch(findings, path, right, number)
    elif metrics:
        try_metrics(findings, metrics, path, right["type"], sample)
    return values


def _check_values(findings: Findings, path: str, values: Mapping[str, Any], right: Mapping[str, Any]) -> None:
    """Check the folders of a data set, and options that depend on others; `right` are those of the right type."""
    if right.get("type") == _PAIRED:
        needed = ["dataroot_gt", "dataroot_lq", "io_backend"]
        needed += ["gt_size", "use_hflip", "use_rot"] if path == "datasets.train" else []
        for name in needed:
            if values.get(name) is None:
                findings.add(join_path(path, name), f"missing; {_PAIRED} needs it")
    if isinstance(values.get("io_backend"), Mapping) and not values["io_backend"].get("type"):
        findings.add(f"{path}.io_backend.type", "missing; it names where images are read from, e.g. disk")
    for name, folder in values.items():
        if str(name).startswith("dataroot") and isinstance(folder, str) and not Path(folder).expanduser().is_dir():
            similar = similar_file(Path(folder).expanduser())
            here = f"(working directory: {os.getcwd()})"
            findings.add(join_path(path, name), f"there is no folder {folder!r}{similar} {here}")
    scale, gt_size = findings.scale, right.get("gt_size")
    if scale is not None and gt_size and gt_size % scale:
        nearest = max(1, round(gt_size / scale)) * scale
        findings.add(f"{path}.gt_size", f"must be a multiple of scale {scale}, got {gt_size}; nearest: {nearest}")
    if right.get("prefetch_mode") == "cuda" and not torch.cuda.is_available():
        findings.add(f"{path}.prefetch_mode", "must be cpu or ~ without a CUDA GPU, got 'cuda'")


def _check_sizes(findings: Findings, path: str, sample: Mapping[str, Any], scale: int) -> None:
    """Check that an image is `scale` times as large as its counterpart."""
    high, low = sample.get("gt"), sample.get("lq")
    if not (isinstance(high, torch.Tensor) and isinstance(low, torch.Tensor)):
        return
    size, small = tuple(high.shape[-2:]), tuple(low.shape[-2:])
    if size != tuple(scale * side for side in small):
        findings.add(
            f"{path}.dataroot_lq",
            f"must hold images of 1/{scale} the size (the option 'scale'), but the first pair has sizes "
            f"{size[1]}x{size[0]} and {small[1]}x{small[0]}",
        )


def _check_epoch(findings: Findings, path: str, right: Mapping[str, Any], num_images: int) -> None:
    """Check that an epoch fills a batch."""
    batch, ratio = right["batch_size_per_gpu"], right.get("dataset_enlarge_ratio", 1)
    num_gpu = findings.options.get("num_gpu")
    batch *= max(1, num_gpu if isinstance(num_gpu, int) else torch.cuda.device_count())
    if math.ceil(num_images * ratio) < batch:
        findings.add(
            f"{path}.dataset_enlarge_ratio",
            f"must be at least {math.ceil(batch / num_images)}, got {ratio:g}: an epoch of {num_images} images "
            f"must fill a batch of {batch}, or BasicSR trains on no batch at all",
        )


def _first_sample(build: type, values: Mapping[str, Any], path: str) -> tuple[int, Mapping[str, Any]]:
    """Build a data set; return the number of its samples, and the first.

    Raises:
        ConfigError: there is no sample, or it cannot be read.
    """
    options = copy.deepcopy(dict(values))
    for name in ("dataroot_gt", "dataroot_lq"):
        if isinstance(options.get(name), str):
            options[name] = os.path.expanduser(options[name])
    dataset: Any = None
    try:
        with without_warnings(), undisturbed():
            dataset = build(options)
            number = len(dataset)
            sample = dict(PortableDataset(dataset)[0]) if number else {}
    except Exception as error:  # user code can raise anything
        raise ConfigError([_why_not_read(build, error, path)]) from None
    finally:
        # A database cannot be opened a second time while it is open.
        client = getattr(getattr(dataset, "file_client", None), "client", None)
        environments = getattr(client, "_client", None)
        for environment in environments.values() if isinstance(environments, dict) else ():
            with suppress(Exception):
                environment.close()
    if not number:
        raise ConfigError.at(path, f"must hold at least one image; {build.__name__} finds none")
    return number, sample


def _why_not_read(build: type, error: Exception, path: str) -> Problem:
    cause = error.__cause__ if isinstance(error, SampleError) else error
    if isinstance(cause, KeyError) and cause.args[0] in option_names.names_in(*build.__mro__):
        return Problem(join_path(path, cause.args[0]), f"missing; {build.__name__} needs it")
    if isinstance(error, SampleError):
        return Problem(path, f"the first sample cannot be read: {error}")
    hint = " filename_tmpl, e.g. '{}x2', says how names differ" if "is not in lq_paths" in str(error) else ""
    return Problem(path, f"{build.__name__} rejects these options: {reason(error)}{hint}")
