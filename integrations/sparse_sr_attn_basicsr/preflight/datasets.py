"""Checks of `datasets`: folders, pairs of images, loaders, and the first sample of each."""

import importlib
import inspect
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sparse_sr_attn.config import fields, join_path
from sparse_sr_attn.errors import ConfigError
from sparse_sr_attn.registry import suggestion
from sparse_sr_attn_basicsr import option_names, schema
from sparse_sr_attn_basicsr.preflight import trials
from sparse_sr_attn_basicsr.preflight.findings import Findings, bases, nested
from sparse_sr_attn_basicsr.preflight.images import (
    files_in,
    is_deep,
    is_image,
    shown_size,
    similar_file,
    size_of,
)
from sparse_sr_attn_basicsr.preflight.validation import Metrics, try_metrics
from sparse_sr_attn_basicsr.with_attention import is_with_attention

_PAIRED = "PairedImageDataset"
_NUM_IMAGES_MEASURED = 10


def check(findings: Findings, metrics: Metrics) -> None:
    """Check every data set, and the metrics on the sizes of its images."""
    datasets, training = findings.options.get("datasets"), findings.training
    if not isinstance(datasets, Mapping):
        return
    findings.options["datasets"] = {
        phase: _Check(findings, str(phase), values, metrics).run() for phase, values in datasets.items()
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


class _Check:
    """The check of one data set.

    Args:
        findings: the check of the file.
        phase: the name of the data set in the file.
        values: its options.
        metrics: the metrics with valid options.
    """

    def __init__(self, findings: Findings, phase: str, values: Any, metrics: Metrics) -> None:
        self.findings = findings
        self.phase = phase
        self.kind = phase.split("_", maxsplit=1)[0]
        self.path = f"datasets.{phase}"
        self.values = values
        self.metrics = metrics
        self.right: dict[str, Any] = {}

    def add(self, option: str, message: str) -> None:
        """Add a problem of an option."""
        self.findings.add(join_path(self.path, option), message)

    def run(self) -> Any:
        """Check, and return the options."""
        findings, kind = self.findings, self.kind
        allowed = ("train", "val") if findings.training else ("val", "test")
        if kind not in allowed or (kind == "train" and self.phase != "train"):
            names = " and ".join(f"{name}, {name}_2, ..." if name != "train" else name for name in allowed)
            findings.add(self.path, f"data sets must be named {names}, got {self.phase!r}")
            return self.values
        if not isinstance(self.values, Mapping):
            findings.add(self.path, f"must be a mapping, got {self.values!r}")
            return self.values
        before = len(findings.problems)
        self.values = values = dict(self.values)
        declared = schema.TrainingSet if kind == "train" else schema.Dataset
        self.right = right = findings.section(declared, values, self.path, whole=False)
        build = findings.chosen("DATASET", f"{self.path}.type", right["type"]) if "type" in right else None
        known = {*fields(schema.TrainingSet), *option_names.names_in(*bases(build)), *findings.names}
        findings.unread(self.path, values, sorted(known))
        if right.get("type") == _PAIRED:
            needed = ["dataroot_gt", "dataroot_lq", "io_backend"]
            needed += ["gt_size", "use_hflip", "use_rot"] if kind == "train" else []
            for name in needed:
                if values.get(name) is None:
                    self.add(name, f"missing; {_PAIRED} needs it")
        self.check_backend()
        folders = {name: self.folder(name) for name in values if str(name).startswith("dataroot")}
        self.check_depths(folders)
        if (scale := findings.scale) is not None and (gt_size := right.get("gt_size")) and gt_size % scale:
            nearest = max(1, round(gt_size / scale)) * scale
            self.add("gt_size", f"must be a multiple of scale {scale}, got {gt_size}; nearest: {nearest}")
        self.check_loader()
        pairs: list[tuple[Path, Path]] = []
        if right.get("type") == _PAIRED and not values.get("meta_info_file"):
            pairs = self.pairs(folders.get("dataroot_gt"), folders.get("dataroot_lq"))
            self.check_sizes(pairs[:_NUM_IMAGES_MEASURED])
        if build is not None and len(findings.problems) == before and findings.scale is not None:
            self.check_samples(build, pairs)
        return values

    def check_loader(self) -> None:
        """Check the options of PyTorch's loaders and BasicSR's prefetchers."""
        right, training = self.right, self.kind == "train"
        if right.get("prefetch_mode") == "cuda" and not torch.cuda.is_available():
            self.add("prefetch_mode", "must be cpu or ~ without a CUDA GPU, got 'cuda'")
        elif right.get("prefetch_mode") == "cuda" and training and not right.get("pin_memory"):
            self.add("pin_memory", "must be true with prefetch_mode cuda")
        if right.get("persistent_workers") and (not training or right.get("num_worker_per_gpu") == 0):
            why = "num_worker_per_gpu is 0" if training else f"BasicSR reads {self.kind} sets without workers"
            self.add("persistent_workers", f"must be false: {why}")

    def check_backend(self) -> None:
        """Check the backend that images are read from."""
        backend = self.values.get("io_backend")
        if not isinstance(backend, Mapping):
            return
        client = getattr(importlib.import_module("basicsr.utils"), "FileClient", None)
        known = sorted(getattr(client, "_backends", ("disk", "lmdb", "memcached")))
        kind = backend.get("type")
        if kind is None:
            self.add("io_backend.type", f"missing; it is one of {', '.join(known)}")
        elif kind not in known:
            self.add("io_backend.type", f"BasicSR has no backend {kind!r}{suggestion(kind, known)}")
        for name, value in self.values.items():
            file = Path(str(value)).expanduser()
            if str(name).startswith("meta_info") and value is not None and not file.is_file():
                self.add(name, f"there is no file {value!r}{similar_file(file)}")
            if str(name).startswith("dataroot") and kind == "lmdb" and file.is_dir():
                lacking = [part for part in ("data.mdb", "meta_info.txt") if not (file / part).is_file()]
                if file.suffix != ".lmdb" or lacking:
                    lacks = f" and has no {' and no '.join(lacking)}" if lacking else ""
                    self.add(
                        name,
                        f"must be a database whose name ends in .lmdb, as io_backend says, got {value!r}, which is "
                        f"a folder{lacks}; for images in a folder write io_backend: {{type: disk}}",
                    )

    def folder(self, name: str) -> Path | None:
        """Check that a data folder exists; return it if its images are plain files."""
        given = self.values[name]
        if not isinstance(given, str):
            return None
        folder = Path(given).expanduser()
        if not folder.is_dir():
            self.add(name, f"there is no folder {given!r}{similar_file(folder)} (working directory: {os.getcwd()})")
            return None
        return folder if nested(self.values, "io_backend", "type") == "disk" else None

    def check_depths(self, folders: Mapping[str, Path | None]) -> None:
        """Add a remark on images whose lower bits are lost: BasicSR reads 8 bits per channel."""
        for name, folder in folders.items():
            files = sorted(files_in(folder))[:_NUM_IMAGES_MEASURED] if folder else []
            deep = [file for file in files if folder and is_deep(folder / file)]
            if deep:
                self.findings.remarks.append(
                    f"{join_path(self.path, name)}: BasicSR reads 8 bits per channel, and {deep[0]!r} has more; its "
                    f"lower bits are lost (as in {len(deep)} of the first {len(files)} images)"
                )

    def pairs(self, high: Path | None, low: Path | None) -> list[tuple[Path, Path]]:
        """Check that each image has its counterpart; return the pairs if all do."""
        if high is None or low is None:
            return []
        template = self.right.get("filename_tmpl", "{}")
        try:
            template.format("")
        except (IndexError, KeyError, ValueError):
            self.add("filename_tmpl", f"must have one {{}}, for the name of the file, got {template!r}")
            return []
        originals, counterparts = files_in(high), files_in(low)
        for name, folder, found in (("dataroot_gt", high, originals), ("dataroot_lq", low, counterparts)):
            if not found:
                self.add(name, f"there is no image in the folder '{folder}'")
        if not (originals and counterparts):
            return []
        wanted = {template.format(Path(name).stem) + Path(name).suffix: name for name in originals}
        alone = sorted(set(wanted) - counterparts)
        if not alone and len(originals) == len(counterparts):
            return [(high / name, low / counterpart) for counterpart, name in sorted(wanted.items())]
        example = f"; {wanted[alone[0]]!r} has no {alone[0]!r}" if alone else ""
        hint = " (filename_tmpl, e.g. '{}x2', says how names differ)" if alone else ""
        self.add(
            "dataroot_lq",
            f"must hold one file for each of the {len(originals)} in dataroot_gt, got {len(counterparts)}"
            f"{example}{hint}",
        )
        return []

    def check_sizes(self, pairs: Sequence[tuple[Path, Path]]) -> None:
        """Check that images are `scale` times as large as their counterparts and, in training, as large as a patch.

        In validation they may be larger: BasicSR crops them.
        """
        scale = self.findings.scale
        gt_size = self.right.get("gt_size") if self.kind == "train" else None
        if scale is None:
            return
        for high, low in pairs:
            original, counterpart = size_of(high), size_of(low)
            if original is None or counterpart is None:
                continue  # a file that is not an image is reported when it is read
            wanted = tuple(scale * side for side in counterpart)
            too_small = any(side < other for side, other in zip(original, wanted, strict=True))
            if too_small or (gt_size and original != wanted):
                self.add(
                    "dataroot_lq",
                    f"must hold images of 1/{scale} the size (the option 'scale'), but {str(high)!r} is "
                    f"{shown_size(original)} and {str(low)!r} is {shown_size(counterpart)}",
                )
                return
            if gt_size and min(original) < gt_size:
                size = shown_size(original)
                self.add(
                    "gt_size", f"must be at most the size of every image, got {gt_size}, and {str(high)!r} is {size}"
                )
                return

    def check_samples(self, build: type, pairs: Sequence[tuple[Path, Path]]) -> None:
        """Build a data set with valid options, read its first sample, and try the metrics on it."""
        scale = self.findings.scale or 1
        options = self.values | {"phase": self.kind, "scale": scale}
        for name in ("dataroot_gt", "dataroot_lq"):
            if isinstance(options.get(name), str):
                options[name] = os.path.expanduser(options[name])
        if options.get("cache_data"):  # it would read all images first
            return
        try:
            number, files, sample = trials.first_sample(build, options, self.path)
        except ConfigError as error:
            self.findings.add_all(error)
            return
        for file in files:
            if not is_image(Path(file)):
                self.findings.add(self.path, f"must hold images only, but {file!r} cannot be read as an image")
                return
        self.check_first(sample)
        if self.kind == "train":
            self.check_epoch(number)
        elif self.metrics:
            sizes = {low.name: (scale * size[0], scale * size[1]) for _, low in pairs if (size := size_of(low))}
            try_metrics(self.findings, self.metrics, self.path, self.right["type"], sample, sizes)

    def check_first(self, sample: object) -> None:
        """Check that a sample has the entries that the model reads and the channels that the network needs."""
        findings, name = self.findings, self.right["type"]
        if not isinstance(sample, Mapping):
            self.add("type", f"{name} must return a mapping for each sample, returns {type(sample).__name__}")
            return
        plain = findings.registered("MODEL", "SRModel")
        theirs = (cls for cls in bases(findings.model) if not cls.__module__.startswith("sparse_sr_attn"))
        feed_data = next((vars(cls)["feed_data"] for cls in theirs if "feed_data" in vars(cls)), None)
        if plain is not None and feed_data is vars(plain).get("feed_data"):
            for key in ("lq", "gt") if self.kind == "train" else ("lq",):
                if key not in sample:
                    what = "images of low resolution" if key == "lq" else "images to compare with"
                    self.add("type", f"{name} has no {what} ({key}), which {findings.options['model_type']} needs")
        for key, value in sample.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point() and not bool(value.isfinite().all()):
                findings.add(self.path, f"pixels must be finite, but {key} of the first sample has NaN or infinity")
        low, channels = sample.get("lq"), self.channels()
        if isinstance(low, torch.Tensor) and low.ndim == 3 and channels is not None and len(low) != channels:
            findings.add(
                self.path,
                f"must hold images of network_g.num_in_ch, {channels}, channels; the first sample has {len(low)}",
            )

    def channels(self) -> int | None:
        """Return the number of input channels of the network, if its options show it."""
        network = self.findings.options.get("network_g")
        if is_with_attention(self.findings.networks.get(str(nested(network, "type")))):
            network = nested(network, "network")
        build = self.findings.registered("ARCH", nested(network, "type"))
        default = inspect.signature(build).parameters.get("num_in_ch") if build is not None else None
        channels = nested(network, "num_in_ch") or (default.default if default is not None else None)
        return channels if isinstance(channels, int) else None

    def check_epoch(self, num_images: int) -> None:
        """Check that an epoch fills a batch."""
        batch, ratio = self.right["batch_size_per_gpu"], self.right.get("dataset_enlarge_ratio", 1)
        num_gpu = self.findings.options.get("num_gpu")
        batch *= max(1, num_gpu if isinstance(num_gpu, int) else torch.cuda.device_count())
        if num_images * ratio >= 2**31:
            most = 2**31 // num_images
            self.add("dataset_enlarge_ratio", f"must be at most {most:,} for {num_images} images, got {ratio:g}")
        elif math.ceil(num_images * ratio) < batch:
            self.add(
                "dataset_enlarge_ratio",
                f"must be at least {math.ceil(batch / num_images)}, got {ratio:g}: an epoch of {num_images} images "
                f"must fill a batch of {batch}, or BasicSR trains on no batch at all",
            )
