"""Everything in an option file that can be wrong, said before anything is loaded or written.

BasicSR meets a wrong option where it first uses it, minutes into a run, or never, when it just ignores the name.
`check` looks at all options first, and reports all problems together.
"""

import importlib
import importlib.util
import inspect
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from sparse_sr_attn.config import (
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    ProblemList,
    Rule,
    UnitInterval,
    fields,
    join_path,
    read,
)
from sparse_sr_attn.errors import ConfigError
from sparse_sr_attn.registry import suggestion
from sparse_sr_attn_basicsr.registration import NETWORKS

_OURS = {network.__name__: network for network in NETWORKS}
_MODEL = "SparseSRModel"
_PAIRED = "PairedImageDataset"
_SATURATING_RANGE = 16.0

# BasicSR's own option files write `val_freq: !!float 5e3`.
Count = Annotated[float, Rule("whole and >= 1", lambda value: value >= 1 and float(value).is_integer())]
WholeNumber = Annotated[float, Rule("whole", lambda value: float(value).is_integer())]


@dataclass(frozen=True, kw_only=True)
class _General:
    name: str
    model_type: str
    num_gpu: NonNegativeInt | Literal["auto"]
    scale: PositiveInt
    datasets: Mapping[str, Any]
    network_g: Mapping[str, Any]
    path: Mapping[str, Any] | None = None
    manual_seed: NonNegativeInt | None = None
    dist_params: Mapping[str, Any] | None = None
    find_unused_parameters: bool = False


@dataclass(frozen=True, kw_only=True)
class _Training(_General):
    train: Mapping[str, Any]
    logger: Mapping[str, Any]
    val: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class _Testing(_General):
    val: Mapping[str, Any]
    train: Mapping[str, Any] | None = None
    logger: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class _Path:
    pretrain_network_g: str | None = None
    param_key_g: str | None = "params"
    strict_load_g: bool = True
    resume_state: str | None = None
    ignore_resume_networks: Sequence[str] | None = None


@dataclass(frozen=True, kw_only=True)
class _Train:
    total_iter: Count
    optim_g: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    warmup_iter: WholeNumber = -1
    ema_decay: UnitInterval = 0.0
    pixel_opt: Mapping[str, Any] | None = None
    perceptual_opt: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class _Optimizer:
    type: str
    lr: Positive
    weight_decay: NonNegative = 0.0
    betas: Sequence[UnitInterval] = (0.9, 0.99)
    eps: Positive = 1e-8


@dataclass(frozen=True, kw_only=True)
class _Scheduler:
    type: str
    milestones: Sequence[Count] = ()
    gamma: Positive = 0.1
    periods: Sequence[Count] = ()
    restart_weights: Sequence[NonNegative] = (1,)
    eta_min: NonNegative = 0.0


@dataclass(frozen=True, kw_only=True)
class _Validation:
    save_img: bool = False
    pbar: bool = False
    suffix: str | None = None
    metrics: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class _ValidationInTraining(_Validation):
    val_freq: Count


@dataclass(frozen=True, kw_only=True)
class _ValidationInTesting(_Validation):
    val_freq: Count = 1


@dataclass(frozen=True, kw_only=True)
class _Logger:
    print_freq: Count
    save_checkpoint_freq: Count
    use_tb_logger: bool = False
    wandb: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class _Dataset:
    name: str
    type: str
    dataroot_gt: str | None = None
    dataroot_lq: str | None = None
    meta_info_file: str | None = None
    filename_tmpl: str = "{}"
    io_backend: Mapping[str, Any] | None = None
    color: str | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    pin_memory: bool = False
    persistent_workers: bool = False
    prefetch_mode: Literal["cpu", "cuda"] | None = None
    num_prefetch_queue: PositiveInt = 1


@dataclass(frozen=True, kw_only=True)
class _TrainingSet(_Dataset):
    batch_size_per_gpu: PositiveInt
    num_worker_per_gpu: NonNegativeInt
    dataset_enlarge_ratio: Positive = 1
    gt_size: PositiveInt | None = None
    use_hflip: bool | None = None
    use_rot: bool | None = None
    use_shuffle: bool = True


def check(options: Mapping[str, Any], *, training: bool, launcher: str = "none") -> tuple[dict[str, Any], list[str]]:
    """Return the options, ready for BasicSR, and remarks on what is legal and probably not meant.

    Args:
        options: of a whole option file. Relative paths in it start from the working directory.
        training: whether they are for training; else for testing.
        launcher: BasicSR's `--launcher`.

    Returns:
        A copy in which numbers given as text are numbers and what BasicSR wants spelt out is there.

    Raises:
        ConfigError: names all problems, each with its path. Nothing was loaded or written.
    """
    preflight = _Preflight(options, training)
    preflight.general(launcher)
    preflight.problems.raise_if_any()
    return preflight.options, preflight.remarks


class _Preflight:
    """One check of one file: the options as far as they are put right, and what was found."""

    def __init__(self, options: Mapping[str, Any], training: bool) -> None:
        self.options = dict(options)
        self.training = training
        self.problems = ProblemList()
        self.remarks: list[str] = []
        self.registries = importlib.import_module("basicsr.utils.registry")

    def general(self, launcher: str) -> None:
        options = self.options
        general = self.section(_Training if self.training else _Testing, options, "")
        self.named("MODEL_REGISTRY", "model_type", general.get("model_type"))
        self.machine(general.get("num_gpu"), launcher)
        for key in [key for key in options if key.startswith("network_")]:
            self.network(key, options[key])
        for key, cls in {
            "path": _Path,
            "train": _Train if self.training else None,
            "logger": _Logger if self.training else None,
            "val": _ValidationInTraining if self.training else _ValidationInTesting,
        }.items():
            if cls and isinstance(options.get(key), Mapping):
                options[key] = dict(options[key])
                self.section(cls, options[key], key)
        options["path"] = options.get("path") or {}
        self.training_options()
        self.validation_options()
        self.weights()
        if isinstance(options.get("datasets"), Mapping):
            options["datasets"] = {phase: self.dataset(phase, value) for phase, value in options["datasets"].items()}
            if self.training and "train" not in options["datasets"]:
                self.problems.add("datasets.train", "missing; training needs images")
            if not self.training and not options["datasets"]:
                self.problems.add("datasets", "must hold at least one data set, e.g. test_1, got none")

    def section(self, cls: type, values: Any, path: str) -> dict[str, Any]:
        """Check the options of `values` that `cls` declares, convert its numbers in place, return what is right."""
        known = fields(cls)
        unknown = [name for name in values if name not in known]
        for name in unknown:
            close = get_close_matches(str(name), [other for other in known if other not in values], n=1, cutoff=0.8)
            if not close:
                continue
            if self.options.get("model_type") == _MODEL:
                self.problems.add(join_path(path, name), f"unknown; did you mean {close[0]!r}?")
            else:
                self.remarks.append(
                    f"{join_path(path, name)}: BasicSR knows no such option; did you mean {close[0]!r}?"
                )
        right: dict[str, Any] = {}
        for name in known:
            if name in values or known[name].default is known[name].empty:
                with self.problems.gathered():
                    given = {name: values[name]} if name in values else {}
                    right |= read(_only(cls, name), given, path)
        for name, value in right.items():
            if known[name].annotation in (Count, WholeNumber):
                values[name] = int(value)
            elif isinstance(value, float) and isinstance(values[name], str):
                values[name] = value
        return right

    def named(self, registry: str, path: str, name: object) -> None:
        """Check that BasicSR has something registered under `name`."""
        if isinstance(name, str):
            known = sorted({str(key).removesuffix("_basicsr") for key in getattr(self.registries, registry).keys()})  # noqa: SIM118
            if name not in known and name not in getattr(self.registries, registry):
                noun = registry.removesuffix("_REGISTRY").replace("ARCH", "network").lower()
                self.problems.add(path, f"BasicSR has no {noun} named {name!r}{suggestion(name, known)}")

    def machine(self, num_gpu: int | str | None, launcher: str) -> None:
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if isinstance(num_gpu, int) and num_gpu > gpus:
            self.problems.add(
                "num_gpu",
                f"must be at most the number of CUDA GPUs, of which this PyTorch sees {gpus}, got {num_gpu}; 'auto' "
                "takes what there is, 0 is the CPU",
            )
        if launcher != "none" and not gpus:
            self.problems.add(f"--launcher {launcher}", "needs CUDA GPUs, and this PyTorch sees none; leave it away")

    def network(self, path: str, options: object) -> None:
        if not isinstance(options, Mapping):
            if path != "network_g":
                self.problems.add(path, f"must be a map with a key 'type', got {options!r}")
            return
        name = options.get("type")
        if not isinstance(name, str):
            self.problems.add(f"{path}.type", "missing; it names the network, e.g. SparseEDSR")
            return
        rest = {key: value for key, value in options.items() if key != "type"}
        if name in _OURS:
            self.our_network(path, _OURS[name], rest)
        else:
            self.named("ARCH_REGISTRY", f"{path}.type", name)
            self.their_network(path, name, rest)

    def our_network(self, path: str, build: type, options: Mapping[str, Any]) -> None:
        fitting: dict[str, Any] = {}
        for key, value in options.items():
            with self.problems.gathered():
                fitting |= read(build, {key: value}, path)
        defaults = {name: option.default for name, option in fields(build).items()}
        upscale, scale = {**defaults, **fitting}.get("upscale"), self.options.get("scale")
        if isinstance(scale, int) and upscale != scale and ("upscale" in fitting or "upscale" not in options):
            default = "" if "upscale" in options else " (its default)"
            self.problems.add(f"{path}.upscale", f"must be {scale}, the option 'scale', got {upscale}{default}")
        try:
            # Rules that join several options are the constructor's own. The meta device allocates nothing.
            with torch.device("meta"):
                network = build(**fitting)
        except ConfigError as error:
            for problem in error.under(path).problems:
                self.problems.add(problem.path, problem.message)
            return
        attends = any(name.endswith("centroids") for name, _ in network.named_buffers())
        if attends and network.img_range > _SATURATING_RANGE:
            default = "" if "img_range" in options else " (the default of this network)"
            self.remarks.append(
                f"{path}.img_range: {network.img_range:g}{default} makes queries so long that the softmax of LCoA "
                "saturates; prefer img_range: 1."
            )
        train = self.options.get("train")
        averaged = isinstance(train, Mapping) and train.get("ema_decay")
        if self.training and averaged and self.options.get("model_type") == "SRModel":
            self.remarks.append(f"model_type: SRModel leaves k-means centroids out of the EMA network; prefer {_MODEL}")

    def their_network(self, path: str, name: str, options: Mapping[str, Any]) -> None:
        registry = self.registries.ARCH_REGISTRY
        build = next((registry.get(key) for key in (name, f"{name}_basicsr") if key in registry), None)
        if build is None:
            return
        parameters = inspect.signature(build).parameters
        if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            return
        for key in options:
            if key not in parameters:
                sparse = f"Sparse{name}"
                better = sparse in _OURS and key in fields(_OURS[sparse])
                hint = f"; type: {sparse} has it" if better else suggestion(key, list(parameters))
                self.problems.add(join_path(path, key), f"unknown to {name}{hint}")

    def training_options(self) -> None:
        train, logger = self.options.get("train"), self.options.get("logger")
        if self.training and isinstance(train, dict):
            for key, cls in {"optim_g": _Optimizer, "scheduler": _Scheduler}.items():
                if isinstance(train.get(key), Mapping):
                    train[key] = dict(train[key])
                    self.section(cls, train[key], f"train.{key}")
            losses = [key for key in ("pixel_opt", "perceptual_opt") if isinstance(train.get(key), Mapping)]
            for key in losses:
                self.named("LOSS_REGISTRY", f"train.{key}.type", train[key].get("type", ""))
            if not losses:
                self.problems.add("train.pixel_opt", "missing; training needs a loss, e.g. {type: L1Loss}")
        if self.training and isinstance(logger, dict):
            logger.setdefault("use_tb_logger", False)
            if logger["use_tb_logger"] is True and importlib.util.find_spec("tensorboard") is None:
                self.problems.add("logger.use_tb_logger", "needs tensorboard: pip install tensorboard, or write false")

    def validation_options(self) -> None:
        val = self.options.get("val")
        if not isinstance(val, dict):
            return
        val.setdefault("save_img", False)
        val.setdefault("suffix", None)
        metrics = val.get("metrics")
        if isinstance(metrics, Mapping):
            for key, metric in metrics.items():
                given = metric.get("type", "") if isinstance(metric, Mapping) else ""
                self.named("METRIC_REGISTRY", f"val.metrics.{key}.type", given)

    def weights(self) -> None:
        path = self.options["path"]
        for key, value in path.items():
            if key.startswith(("pretrain_network", "resume_state")) and isinstance(value, str):
                file = Path(value).expanduser()
                if not file.is_file():
                    self.problems.add(f"path.{key}", f"there is no file {value!r}{_near(file)}")
        if not self.training and not path.get("pretrain_network_g"):
            self.remarks.append("path.pretrain_network_g: nothing given, so an untrained network is tested")

    def dataset(self, phase: str, values: Any) -> Any:
        """Check one data set; return its options."""
        path = f"datasets.{phase}"
        kind = str(phase).split("_")[0]
        allowed = ("train", "val") if self.training else ("val", "test")
        if kind not in allowed or (kind == "train" and phase != "train"):
            names = " and ".join(f"{name}, {name}_2, ..." if name != "train" else name for name in allowed)
            self.problems.add(path, f"data sets must be named {names}, got {phase!r}")
            return values
        if not isinstance(values, Mapping):
            self.problems.add(path, f"must be a map, got {values!r}")
            return values
        values = dict(values)
        right = self.section(_TrainingSet if kind == "train" else _Dataset, values, path)
        self.named("DATASET_REGISTRY", f"{path}.type", right.get("type"))
        if right.get("type") == _PAIRED:
            wanted = ["dataroot_gt", "dataroot_lq", "io_backend"]
            if kind == "train":
                wanted += ["gt_size", "use_hflip", "use_rot"]
            for name in wanted:
                if values.get(name) is None:
                    self.problems.add(join_path(path, name), f"missing; {_PAIRED} needs it")
        folders = {name: self.folder(path, name, values) for name in values if str(name).startswith("dataroot")}
        scale = self.options.get("scale")
        gt_size = right.get("gt_size")
        if isinstance(scale, int) and scale > 0 and gt_size and gt_size % scale:
            nearest = max(1, round(gt_size / scale)) * scale
            self.problems.add(
                f"{path}.gt_size", f"must be a multiple of scale {scale}, got {gt_size}; nearest: {nearest}"
            )
        if right.get("prefetch_mode") == "cuda" and not torch.cuda.is_available():
            self.problems.add(f"{path}.prefetch_mode", "must be cpu or ~ without a CUDA GPU, got 'cuda'")
        if right.get("type") == _PAIRED and not values.get("meta_info_file"):
            num_pairs = self.pairs(path, folders, right.get("filename_tmpl", "{}"))
            if kind == "train" and num_pairs:
                self.batches(path, num_pairs, right)
        return values

    def folder(self, path: str, name: str, values: Mapping[str, Any]) -> Path | None:
        """Check that a data folder is there; return it if its images are plain files."""
        given = values[name]
        if not isinstance(given, str):
            return None
        folder = Path(given).expanduser()
        if not folder.is_dir():
            self.problems.add(
                join_path(path, name), f"there is no folder {given!r}{_near(folder)} (working directory: {os.getcwd()})"
            )
            return None
        backend = values.get("io_backend")
        return folder if isinstance(backend, Mapping) and backend.get("type") == "disk" else None

    def pairs(self, path: str, folders: Mapping[str, Path | None], template: str) -> int:
        """Check that each image has its counterpart, as BasicSR looks for it; return how many there are."""
        high, low = folders.get("dataroot_gt"), folders.get("dataroot_lq")
        if high is None or low is None:
            return 0
        originals, counterparts = _files(high), _files(low)
        for name, folder, found in (("dataroot_gt", high, originals), ("dataroot_lq", low, counterparts)):
            if not found:
                self.problems.add(join_path(path, name), f"there is no image in the folder '{folder}'")
        wanted = {template.format(Path(name).stem) + Path(name).suffix: name for name in originals}
        alone = sorted(set(wanted) - counterparts)
        if originals and counterparts and (alone or len(originals) != len(counterparts)):
            example = f"; {wanted[alone[0]]!r} has no {alone[0]!r}" if alone else ""
            hint = " (filename_tmpl, e.g. '{}x2', says how names differ)" if alone else ""
            self.problems.add(
                join_path(path, "dataroot_lq"),
                f"must hold one file for each of the {len(originals)} in dataroot_gt, got {len(counterparts)}"
                f"{example}{hint}",
            )
            return 0
        return min(len(originals), len(counterparts))

    def batches(self, path: str, num_pairs: int, right: Mapping[str, Any]) -> None:
        """Check that an epoch holds a batch, and that BasicSR's count of epochs reaches `total_iter`."""
        batch, ratio = right.get("batch_size_per_gpu"), right.get("dataset_enlarge_ratio", 1)
        train = self.options.get("train")
        total = train.get("total_iter") if isinstance(train, Mapping) else None
        num_gpu = self.options.get("num_gpu")
        if not batch:
            return
        batch *= max(1, num_gpu if isinstance(num_gpu, int) else torch.cuda.device_count())
        samples = math.ceil(num_pairs * ratio)
        if samples < batch:
            self.problems.add(
                f"{path}.dataset_enlarge_ratio",
                f"must be at least {math.ceil(batch / num_pairs)}, got {ratio:g}: an epoch of {num_pairs} images must "
                f"fill a batch of {batch}, or BasicSR trains on nothing",
            )
        elif isinstance(total, int):
            per_epoch = samples // batch
            reached = (math.ceil(total / math.ceil(num_pairs * ratio / batch)) + 1) * per_epoch
            if reached < total:
                self.remarks.append(
                    f"{path}.dataset_enlarge_ratio: {ratio:g} makes epochs of {samples / batch:.3g} batches, and "
                    f"BasicSR, which rounds, will stop after {reached} of {total} iterations; a large one, say "
                    f"{max(100, math.ceil(100 * batch / num_pairs))}, avoids that"
                )


def _only(cls: type, name: str) -> type:
    """Return a class that declares the option `name` of `cls` alone, so that one fault hides no other."""
    option = fields(cls)[name]
    if option.default is option.empty:
        return make_dataclass(cls.__name__, [(name, option.annotation)])
    return make_dataclass(cls.__name__, [(name, option.annotation, field(default=option.default))])


def _files(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")}


def _near(wanted: Path) -> str:
    """Return a hint at a sibling of nearly the same name."""
    parent = wanted.parent
    beside = {entry.name.casefold(): entry.name for entry in parent.iterdir()} if parent.is_dir() else {}
    close = get_close_matches(wanted.name.casefold(), beside, n=1)
    return f"; did you mean {str(parent / beside[close[0]])!r}?" if close else ""
