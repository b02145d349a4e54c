"""Everything in an option file that can be wrong, said before anything is loaded or written.

BasicSR meets a wrong option where it first uses it, minutes into a run, or never, when it just ignores the name.
`check` looks at all options first, and reports all problems together.
"""

import copy
import importlib
import importlib.util
import inspect
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, make_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from PIL import ExifTags, Image
from torch import nn

from sparse_sr_attn import attach
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
    shown,
)
from sparse_sr_attn.errors import ConfigError
from sparse_sr_attn.foreign import find_facts
from sparse_sr_attn.images import is_reduced
from sparse_sr_attn.layers.base import SATURATING_RANGE, raw_queries_in
from sparse_sr_attn.registry import suggestion
from sparse_sr_attn_basicsr import option_lookups, registration
from sparse_sr_attn_basicsr.preflight import trials
from sparse_sr_attn_basicsr.attended import Attended, SeenThrough
from sparse_sr_attn_basicsr.distributed import on_cpu

_MODEL = "SparseSRModel"
_PAIRED = "PairedImageDataset"
_PIPELINE = ("basicsr.train", "basicsr.test", "basicsr.utils.options", "basicsr.utils.logger", "basicsr.utils.misc")
_NO_FOLDERS = ("strict_load", "pretrain_network", "resume", "param_key")  # of other options in path it makes folders
_ON_CUDA = ("RealESRNetModel", "RealESRGANModel")  # they call .cuda() whatever num_gpu says
_NUM_IMAGES_MEASURED = 10

_READ_BY_MODELS = r"""opt\[["'](network_\w+)["']\]\[["'](\w+)["']\]"""

# Options of our models; BasicSR's own ignore them.
_OF_OUR_MODEL = {
    "train": (
        "grad_clip",
        "accumulate",
        "one_kmeans_update",
        "autocast",
        "channels_last",
        "deterministic",
        "pretrain_img_range",
        "fft_opt",
    ),
    "val": ("tile", "tile_overlap"),
}

# What the buffers of layers are to those who train them, by how their names end.
_BUFFERS = {"centroids": "k-means centroids", "running_mean": "BatchNorm statistics"}

# Those of `torch.optim` that any network can be trained with: the others want a closure, or a certain kind of gradient
# or weight.
_OPTIMIZERS = {
    name: value
    for name, value in vars(torch.optim).items()
    if isinstance(value, type)
    and issubclass(value, torch.optim.Optimizer)
    and name not in ("Optimizer", "LBFGS", "SparseAdam", "Muon")
}

# BasicSR's own option files write `val_freq: !!float 5e3`.
Count = Annotated[
    float,
    Rule("whole and >= 1", lambda value: value >= 1 and float(value).is_integer()),
    Rule("below 2**31", lambda value: value < 2**31),
]
Seed = Annotated[int, Rule("in [0, 2**32)", lambda value: 0 <= value < 2**32)]  # as NumPy has it
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
    manual_seed: Seed | None = None
    dist_params: Mapping[str, Any] | None = None
    find_unused_parameters: bool = False
    custom_imports: Sequence[str] | None = None


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
class _Processes:
    backend: Literal["nccl", "gloo"] = "nccl"
    port: PositiveInt | None = None


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
    ema_decay: Annotated[float, Rule("in [0, 1)", lambda value: 0 <= value < 1)] = 0.0  # 1 would average nothing
    grad_clip: Positive | None = None
    accumulate: PositiveInt = 1
    one_kmeans_update: bool = False
    autocast: Literal["bf16", "fp16"] | None = None
    channels_last: bool | None = None
    deterministic: bool = False
    pretrain_img_range: Positive | None = None
    net_d_iters: Count = 1
    net_d_init_iters: Annotated[float, Rule("whole and >= 0", lambda value: value >= 0 and value.is_integer())] = 0


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
    tile: PositiveInt | None = None
    tile_overlap: NonNegativeInt | None = None


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
class _Metric:
    better: Literal["higher", "lower"] = "higher"


@dataclass(frozen=True, kw_only=True)
class _Wandb:
    project: str | None = None
    resume_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Dataset:
    name: str
    type: str
    dataroot_gt: str | None = None
    dataroot_lq: str | None = None
    meta_info_file: str | None = None
    filename_tmpl: str = "{}"
    io_backend: Mapping[str, Any] | None = None
    color: Literal["y", "rgb"] | None = None
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
    preflight.looked_up()
    preflight.problems.raise_if_any()
    return preflight.options, preflight.remarks


@contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _Preflight:
    """One check of one file: the options as far as they are put right, and what was found."""

    def __init__(self, options: Mapping[str, Any], training: bool) -> None:
        self.options = dict(options)
        self.training = training
        self.problems = ProblemList()
        self.remarks: list[str] = []
        self.multiples: dict[str, int] = {}  # of the sides of what attended networks take
        self.registries = importlib.import_module("basicsr.utils.registry")
        self.ours = registration.names()
        self.model: Any = None  # the class, if there is one of that name
        self.reads = option_lookups.Reads()
        self.scale: int | None = None  # if it is right
        self.metrics: dict[
            str, tuple[Callable[..., Any], dict[str, Any]]
        ] = {}  # by path, those whose options are right

    def general(self, launcher: str) -> None:
        options = self.options
        self.model = self.registered("MODEL_REGISTRY", options.get("model_type"))
        modules = [importlib.import_module(name) for name in _PIPELINE if importlib.util.find_spec(name)]
        self.reads = option_lookups.of(*modules, importlib.import_module("basicsr.data"), *_bases(self.model))
        general = self.section(_Training if self.training else _Testing, options, "")
        self.scale = general.get("scale")
        self.named("MODEL_REGISTRY", "model_type", general.get("model_type"))
        name = general.get("name")
        if name is not None and (name.strip() in ("", ".", "..") or {"/", "\\", "\0"} & set(name) or len(name) > 200):
            self.problems.add("name", f"must be fit for the name of a folder, got {shown(name)}")
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
        self.model_needs()
        options["path"] = options.get("path") or {}
        self.our_model()
        self.training_options()
        self.validation_options()
        self.weights()
        if isinstance(options.get("datasets"), Mapping):
            options["datasets"] = {phase: self.dataset(phase, value) for phase, value in options["datasets"].items()}
            validated = [phase for phase in options["datasets"] if str(phase).startswith("val")]
            if self.training and validated and not options.get("val"):
                self.remarks.append(f"datasets.{validated[0]}: nothing is validated without the section val")
            if self.training and not validated and options.get("val"):
                self.remarks.append("val: nothing is validated without a data set in datasets.val")
            if self.training and "train" not in options["datasets"]:
                self.problems.add("datasets.train", "missing; training needs images")
            if not self.training and not options["datasets"]:
                self.problems.add("datasets", "must hold at least one data set, e.g. test_1, got none")

    def section(self, cls: type, values: Any, path: str, *, whole: bool = True) -> dict[str, Any]:
        """Check the options of `values` that `cls` declares, convert its numbers in place, return what is right.

        `whole` if `cls` declares all that there are; then a name that is nearly one of them is misspelt.
        """
        known = fields(cls)
        if whole:
            self.unread(path, values, [*known, *self.reads.names.get(path.partition(".")[0], ())])
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

    def unread(self, path: str, values: Mapping[str, Any], known: Sequence[str]) -> None:
        """Refuse names that are nearly one that is looked up, and remark on others that nobody looks up."""
        for name, value in values.items():
            if name in known or (path == "train" and str(name).endswith("_opt")):  # losses: see there
                continue
            if str(name).startswith(("network_", "optim_")) and self.training and path in ("", "train"):
                if self.model is not None:  # else it is not known which ones there are
                    self.problems.add(join_path(path, name), f"unknown to {self.options['model_type']}")
                continue
            close = get_close_matches(str(name), known, n=1, cutoff=0.8)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            if close and value is not None:
                self.problems.add(join_path(path, name), f"unknown{hint}")
            elif path == "path" and not any(part in str(name) for part in _NO_FOLDERS):
                self.problems.add(join_path(path, name), f"unknown, and BasicSR would make a folder of it{hint}")
            else:
                self.remarks.append(f"{join_path(path, name)}: nothing reads this option{hint}")

    def registered(self, registry: str, name: object) -> Any:
        """Return what BasicSR has under a name; None if there is nothing, or another kind of name."""
        table = getattr(self.registries, registry)
        names = (name, f"{name}_basicsr") if isinstance(name, str) else ()
        return next((table.get(key) for key in names if key in table), None)

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
        if launcher != "none":
            self.processes(launcher)

    def processes(self, launcher: str) -> None:
        """Check what several processes need."""
        path = f"--launcher {launcher}"
        if launcher == "pytorch" and "RANK" not in os.environ:
            self.problems.add(
                path, "needs what torchrun tells each process: torchrun --nproc_per_node 2 -m sparse_sr_attn train ..."
            )
        if self.training and self.options.get("manual_seed") is None:
            self.remarks.append(
                "manual_seed: with --launcher each process draws its own if none is given, and a resumed run will not "
                "be exact"
            )
        params = self.options.get("dist_params")
        if isinstance(params, Mapping):
            self.section(_Processes, dict(params), "dist_params")
        if not on_cpu(self.options):
            return
        if launcher == "slurm":
            self.problems.add(path, "needs CUDA GPUs; on the CPU start torchrun with --launcher pytorch")
        name = self.options.get("model_type")
        if self.model is not None and not self.is_ours():
            self.problems.add("model_type", f"must be {_MODEL} for several processes on the CPU, got {name!r}")

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
        if self.ours.get(name) is Attended:
            self.attended(path, rest)
        elif name in self.ours:
            self.our_network(path, self.ours[name], rest)
        else:
            self.named("ARCH_REGISTRY", f"{path}.type", name)
            self.their_network(path, name, rest)

    def our_network(self, path: str, build: registration.Build, options: Mapping[str, Any]) -> None:
        fitting: dict[str, Any] = {}
        for key, value in options.items():
            with self.problems.gathered():
                fitting |= read(build, {key: value}, path)
        defaults = {name: option.default for name, option in fields(build).items()}
        upscale, scale = {**defaults, **fitting}.get("upscale"), self.scale
        if isinstance(scale, int) and upscale != scale and ("upscale" in fitting or "upscale" not in options):
            default = "" if "upscale" in options else " (its default)"
            self.problems.add(f"{path}.upscale", f"must be {scale}, the option 'scale', got {upscale}{default}")
        try:
            # Rules that join several options are the constructor's own. The meta device allocates nothing.
            with torch.device("meta"), _without_warnings():  # there is a remark on what they warn of
                network = build(**fitting)
        except ConfigError as error:
            for problem in error.under(path).problems:
                self.problems.add(problem.path, problem.message)
            return
        self.attention(path, network, options)

    def attention(self, path: str, network: nn.Module, options: Mapping[str, Any]) -> None:
        """Remark on options that do not go well with what attention keeps in buffers, if there is any."""
        buffers = [name for name, _ in network.named_buffers()]
        kept = [words for end, words in _BUFFERS.items() if any(name.endswith(end) for name in buffers)]
        img_range = getattr(network, "img_range", 1.0)
        raw = raw_queries_in(network)
        if raw and img_range > SATURATING_RANGE:
            default = "" if "img_range" in options else " (the default of this network)"
            self.remarks.append(
                f"{path}.img_range: {img_range:g}{default} makes raw queries so long that the softmax of "
                f"{', '.join(raw)} saturates; use img_range: 1, or similarity: cosine where the layer has it."
            )
        train = self.options.get("train")
        averaged = isinstance(train, Mapping) and train.get("ema_decay")
        if self.training and averaged and kept and self.model is not None and not self.is_ours():
            if {"named_buffers", "buffers", "state_dict"} & option_lookups.of(getattr(self.model, "model_ema", None)).used:
                return
            self.problems.add(
                "train.ema_decay",
                f"must be 0 with {self.options['model_type']}, which leaves {' and '.join(kept)} of the averaged "
                f"network untrained; {self.better()}",
            )

    def attended(self, path: str, options: Mapping[str, Any]) -> None:
        """Check a network of BasicSR by itself, and then whether attention can be put into it."""
        before = len(self.problems)
        right: dict[str, Any] = {}
        with self.problems.gathered():
            right = read(Attended, options, path)
            self.network(f"{path}.network", right["network"])
        if len(self.problems) > before or right["attention"] is None:
            return
        network = self.built(f"{path}.network", right["network"])
        if network is None:
            return
        if (facts := find_facts(network)) is not None:
            self.multiples[path] = facts.multiple
        try:
            with _without_warnings():
                attach(network, right.get("body"), right["attention"])
        except ConfigError as error:
            for problem in error.under(path).problems:
                self.problems.add(problem.path, problem.message)
            return
        self.attention(f"{path}.network", network, right["network"])

    def looked_up(self) -> None:
        """Let the model find the options of its networks that it reads, and check that it does.

        Models read options such as `opt['network_g']['window_size']` when they first validate. They find those of the
        network inside `Attended`, and defaults that are not spelt out.
        """
        for key in [key for key in self.options if key.startswith("network_")]:
            options = self.options[key]
            if isinstance(options, Mapping):
                inner = options.get("network") if self.ours.get(str(options.get("type"))) is Attended else options
                inner = inner if isinstance(inner, Mapping) else {}
                build = self.builder(str(inner.get("type")))
                known = inspect.signature(build).parameters if build is not None else {}
                defaults = {name: p.default for name, p in known.items() if p.default is not p.empty}
                self.options[key] = SeenThrough(options, {**defaults, **inner})
        name = self.options.get("model_type")
        model = self.registries.MODEL_REGISTRY.get(name) if name in self.registries.MODEL_REGISTRY else None
        for cls in inspect.getmro(model) if inspect.isclass(model) else ():
            with suppress(OSError, TypeError):
                for key, option in re.findall(_READ_BY_MODELS, inspect.getsource(cls)):
                    if isinstance(self.options.get(key), Mapping) and option not in self.options[key]:
                        self.problems.add(f"{key}.{option}", f"missing; {name} reads it")
        if (multiple := self.multiples.get("network_g", 1)) > 1:
            self.padding(multiple, model)

    def padding(self, multiple: int, model: Any) -> None:
        """Check that images can go through a network that takes only sides which are multiples of a number."""
        why = f"because network_g takes only sides that are multiples of {multiple}"
        theirs = importlib.import_module("basicsr.models.sr_model").SRModel
        if getattr(model, "test", None) is theirs.test:
            name = self.options.get("model_type")
            self.problems.add("model_type", f"must be one that pads images, {why}, got {name}; {_MODEL} does")
        datasets, scale = self.options.get("datasets"), self.scale
        training_set = datasets.get("train") if isinstance(datasets, Mapping) else None
        gt_size = training_set.get("gt_size") if isinstance(training_set, Mapping) else None
        if isinstance(gt_size, int) and isinstance(scale, int) and scale > 0 and gt_size % (scale * multiple):
            self.problems.add(
                "datasets.train.gt_size", f"must be a multiple of {scale * multiple}, {why}, got {gt_size}"
            )

    def built(self, path: str, options: Mapping[str, Any]) -> nn.Module | None:
        """Return a network of BasicSR's registry, without memory for its weights if it can be built so."""
        build, rest = self.builder(options["type"]), {key: value for key, value in options.items() if key != "type"}
        reason = ""
        for device in ("meta", "cpu"):  # some networks compute with their first weights, which the meta device forbids
            try:
                with torch.device(device), _without_warnings():
                    network: nn.Module = build(**copy.deepcopy(rest))
            except Exception as error:  # somebody else's code can raise anything
                reason = f"{type(error).__name__}: {error}"
            else:
                return network
        self.problems.add(path, f"{options['type']} cannot be built with these options: {reason}")
        return None

    def builder(self, name: str) -> Any:
        """Return what BasicSR builds a network of this name with; None if there is none."""
        registry = self.registries.ARCH_REGISTRY
        return next((registry.get(key) for key in (name, f"{name}_basicsr") if key in registry), None)

    def their_network(self, path: str, name: str, options: Mapping[str, Any]) -> None:
        build = self.builder(name)
        if build is None:
            return
        parameters = inspect.signature(build).parameters
        before = len(self.problems)
        for key in () if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) else options:
            if key not in parameters:
                sparse = f"Sparse{name}"
                better = sparse in self.ours and key in fields(self.ours[sparse])
                hint = f"; type: {sparse} has it" if better else suggestion(key, list(parameters))
                if key == "attention" and not better:
                    hint = f"; put it beside: {{type: Attended, network: {{type: {name}, ...}}, attention: ...}}"
                self.problems.add(join_path(path, key), f"unknown to {name}{hint}")
        for key, parameter in parameters.items():
            variadic = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
            if parameter.default is parameter.empty and key not in options and not variadic:
                self.problems.add(join_path(path, key), f"missing; {name} needs it")
        if len(self.problems) == before:
            network = self.built(path, {"type": name, **options})
            if network is not None and self.training:
                self.patches(path, network, {"type": name, **options})

    def patches(self, path: str, network: nn.Module, options: Mapping[str, Any]) -> None:
        """Check that a network of BasicSR takes the patches of training, and that images come out in the right size."""
        scale, gt_size = self.scale, _nested(self.options, "datasets", "train", "gt_size")
        channels = options.get("num_in_ch", 3)
        if scale is None or not isinstance(gt_size, int) or gt_size < 1 or gt_size % scale:
            return
        if path == "network_g":
            with suppress(Exception), torch.no_grad():  # not every network computes on the meta device
                low = gt_size // scale
                output = network.to("meta").eval()(torch.empty(1, channels, low, low, device="meta"))
                if tuple(output.shape[-2:]) != (gt_size, gt_size):
                    factor = output.shape[-1] / low
                    self.problems.add(path, f"must upscale by {scale}, the option 'scale', but does so by {factor:g}")
        elif path == "network_d" and "SRGANModel" in [cls.__name__ for cls in _bases(self.model)]:
            reason = ""
            for device in ("meta", "cpu"):
                try:
                    with torch.device(device), torch.no_grad(), warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        self.builder(options["type"])(**{k: v for k, v in options.items() if k != "type"})(
                            torch.zeros(2, 3, gt_size, gt_size)
                        )
                except Exception as error:  # somebody else's code can raise anything
                    reason = trials.told(error)
                else:
                    return
            self.problems.add(path, f"{options['type']} must take images of datasets.train.gt_size {gt_size}: {reason}")

    def is_ours(self) -> bool:
        ours = self.registered("MODEL_REGISTRY", _MODEL)
        return inspect.isclass(self.model) and inspect.isclass(ours) and issubclass(self.model, ours)

    def better(self) -> str:
        """Return which of our models to take in place of the one given."""
        name = f"Sparse{self.options.get('model_type')}"
        if self.registered("MODEL_REGISTRY", name) is None:
            return f"{_MODEL} does not"
        return f"model_type: {name} does not"

    def our_model(self) -> None:
        """Refuse options that the model would accept and ignore."""
        name = self.options.get("model_type")
        if self.model is None or self.is_ours():
            return
        ours = f"Sparse{name}" if self.registered("MODEL_REGISTRY", f"Sparse{name}") is not None else _MODEL
        for section, names in _OF_OUR_MODEL.items():
            values = self.options.get(section)
            for option in names:
                read = option in self.reads.names.get(section, ())
                if isinstance(values, Mapping) and values.get(option) is not None and not read:
                    self.problems.add(f"{section}.{option}", f"unknown to {name}; model_type: {ours} has it")

    def model_needs(self) -> None:
        """Check what this model, unlike `SRModel`, cannot do without."""
        name, train = self.options.get("model_type"), self.options.get("train")
        if self.model is None:
            return
        cuda = [cls.__name__ for cls in _bases(self.model) if cls.__name__ in _ON_CUDA]
        if cuda and on_cpu(self.options):
            self.problems.add("model_type", f"{name} needs a CUDA GPU")
        if not self.training or not isinstance(train, Mapping):
            return
        plain = option_lookups.of(*_bases(self.registered("MODEL_REGISTRY", "SRModel"))).needed
        for section, values in (("", self.options), ("train", train)):
            declared = fields(_Train if section else _Training)
            for option in sorted(self.model_reads().needed.get(section, set()) - plain.get(section, set())):
                given = values.get(option) if option.endswith("_opt") else option in values
                if not given and option not in declared:
                    self.problems.add(join_path(section, option), f"missing; {name} needs it")
        if train.get("ldl_opt") and not train.get("ema_decay"):
            self.problems.add("train.ldl_opt", "needs train.ema_decay: it compares with the averaged network")
        if "optim_d" in train and isinstance(train.get("accumulate"), int) and train["accumulate"] > 1:
            self.problems.add(
                "train.accumulate",
                f"must be 1 with {name}, whose discriminator sees whole batches, got {train['accumulate']}",
            )

    def model_reads(self) -> option_lookups.Reads:
        return option_lookups.of(*_bases(self.model))

    def training_options(self) -> None:
        train, logger = self.options.get("train"), self.options.get("logger")
        if self.training and isinstance(train, dict):
            given = self.options.get("network_g")
            network = given if isinstance(given, Mapping) else {}
            plain = self.ours.get(str(network.get("type"))) is registration.SparseEDSR and network.get("block") is None
            if train.get("pretrain_img_range") is not None and not plain:
                block = " with block" if network.get("block") is not None else ""
                self.problems.add(
                    "train.pretrain_img_range",
                    "must be ~ unless network_g is a SparseEDSR without block, whose image can stay the same; "
                    f"it is {network.get('type')}{block}",
                )
            for key in [key for key in train if str(key).startswith("optim_")]:
                if not isinstance(train[key], Mapping):
                    if key != "optim_g":
                        self.problems.add(f"train.{key}", f"must be a map with a key 'type', got {train[key]!r}")
                    continue
                train[key] = dict(train[key])
                self.optimizer(f"train.{key}", train[key])
            if isinstance(train.get("scheduler"), Mapping):
                train["scheduler"] = dict(train["scheduler"])
                self.scheduler(train["scheduler"], train.get("total_iter"))
            self.losses(train)
            self.precision(train)
            self.parts(train)
        if self.training and isinstance(logger, dict):
            logger.setdefault("use_tb_logger", False)
            if logger["use_tb_logger"] is True and importlib.util.find_spec("tensorboard") is None:
                self.problems.add("logger.use_tb_logger", "needs tensorboard: pip install tensorboard, or write false")
            if isinstance(logger.get("wandb"), Mapping):
                self.wandb(logger)

    def wandb(self, logger: Mapping[str, Any]) -> None:
        right = self.section(_Wandb, dict(logger["wandb"]), "logger.wandb")
        if right.get("project") is None or "debug" in str(self.options.get("name")):
            return
        if logger.get("use_tb_logger") is not True:
            self.problems.add(
                "logger.use_tb_logger", "must be true with logger.wandb.project: wandb follows tensorboard"
            )
        if importlib.util.find_spec("wandb") is None:
            self.problems.add("logger.wandb.project", "needs wandb: pip install wandb, or write project: ~")

    def losses(self, train: dict[str, Any]) -> None:
        """Check every loss: that the model takes it, and that it can be built and computed."""
        reads, name = self.model_reads(), self.options.get("model_type")
        known = sorted(key for key in reads.names.get("train", ()) if key.endswith("_opt"))
        given = [key for key in train if str(key).endswith("_opt") and (train[key] or train[key] == {})]
        for key in given:
            path = f"train.{key}"
            if self.model is not None and known and key not in known and key not in _OF_OUR_MODEL["train"]:
                self.problems.add(path, f"unknown to {name}{suggestion(key, known)}")
            elif key in reads.built and reads.built[key] not in reads.used:
                self.problems.add(path, f"{name} builds this loss and then leaves it out; write ~")
            elif not isinstance(train[key], Mapping):
                self.problems.add(path, f"must be a map with a key 'type', got {train[key]!r}")
            else:
                train[key] = dict(train[key])
                self.loss(key, train[key])
        if "gan_opt" not in known and not {"pixel_opt", "perceptual_opt"} & set(given) and set(given) <= {"fft_opt"}:
            self.problems.add("train.pixel_opt", "missing; training needs a loss, e.g. {type: L1Loss}")

    def chosen(self, registry: str, path: str, options: Mapping[str, Any], example: str) -> Any:
        """Return what the option `type` names in a registry of BasicSR; `None`, with a problem, if it names nothing."""
        kind = options.get("type")
        if not isinstance(kind, str):
            self.problems.add(f"{path}.type", f"missing; it names {example}")
            return None
        build = self.registered(registry, kind)
        if build is None:
            self.named(registry, f"{path}.type", kind)
        return build

    def loss(self, key: str, options: dict[str, Any]) -> None:
        path = f"train.{key}"
        build = self.chosen("LOSS_REGISTRY", path, options, "the loss, e.g. L1Loss")
        if build is None:
            return
        rest = {name: value for name, value in options.items() if name != "type"}
        before = len(self.problems)
        with self.problems.gathered():
            trials.arguments(build, rest, path)
        options |= rest
        fault = trials.loss(build, rest, key) if len(self.problems) == before else None
        if fault:
            self.problems.add(path, fault)

    def optimizer(self, path: str, options: dict[str, Any]) -> None:
        model = self.options.get("model_type")
        right = self.section(_Optimizer, options, path, whole=False)
        name = right.get("type")
        if name is None:
            return
        known = self.optimizers()
        if name not in known and name in _OPTIMIZERS and not self.is_ours():
            names = f"{known[0]} only" if len(known) == 1 else ", ".join(known)
            ours = f"Sparse{model}" if self.registered("MODEL_REGISTRY", f"Sparse{model}") is not None else _MODEL
            self.problems.add(f"{path}.type", f"{model} knows {names}, got {name!r}; model_type: {ours} knows more")
        elif name not in known:
            self.problems.add(f"{path}.type", f"there is no optimizer {name!r}{suggestion(name, known)}")
        elif len(right.get("betas", (0, 0))) != 2:
            self.problems.add(f"{path}.betas", f"must be two numbers, got {options['betas']}")
        elif name in _OPTIMIZERS:
            self.judged(path, _OPTIMIZERS[name], [torch.nn.Parameter(torch.zeros(1))], options, right)

    def optimizers(self) -> list[str]:
        """Return the optimizers that the model can make."""
        if self.model is None or self.is_ours() or not hasattr(self.model, "get_optimizer"):
            return sorted(_OPTIMIZERS)
        known = []
        for name in sorted(_OPTIMIZERS):
            with suppress(Exception):  # somebody else's code can raise anything
                self.model.get_optimizer(None, name, [torch.nn.Parameter(torch.zeros(1))], lr=1.0)
                known.append(name)
        return known or sorted(_OPTIMIZERS)

    def scheduler(self, options: dict[str, Any], total_iter: object) -> None:
        path = "train.scheduler"
        right = self.section(_Scheduler, options, path, whole=False)
        name = right.get("type")
        if name is None:
            return
        schedulers = vars(importlib.import_module("basicsr.models.lr_scheduler"))
        known = {key: value for key, value in schedulers.items() if key.endswith("LR") and not key.startswith("_")}
        known["MultiStepLR"] = known["MultiStepRestartLR"]
        if name not in known:
            self.problems.add(f"{path}.type", f"BasicSR has no scheduler {name!r}{suggestion(name, sorted(known))}")
            return
        covered = sum(right.get("periods", ()))
        if name == "CosineAnnealingRestartLR" and isinstance(total_iter, int) and covered < total_iter - 1:
            self.problems.add(
                f"{path}.periods",
                f"must add up to total_iter {total_iter:,}, got {covered:,.0f}: BasicSR fails after the last",
            )
            return
        first = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        self.judged(path, known[name], first, options, right)

    def judged(
        self,
        path: str,
        build: Callable[..., object],
        first: object,
        options: dict[str, Any],
        right: Mapping[str, Any],
    ) -> None:
        """Let what the options are for judge them, unless one is wrong already: not all that is given is `right`."""
        if any(name in fields(_Optimizer) | fields(_Scheduler) and name not in right for name in options):
            return
        names = [name for name in list(inspect.signature(build).parameters)[1:] if name != "last_epoch"]
        before = len(self.problems)
        for name in [name for name in options if name in names]:
            one = {name: options[name]}
            with self.problems.gathered():
                trials.arguments(
                    build, one, path, [other for other in inspect.signature(build).parameters if other != name]
                )
            options[name] = one[name]
        if len(self.problems) > before:
            return
        try:
            build(first, **{key: value for key, value in options.items() if key != "type"})
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            self.problems.add(path, f"{options['type']} refuses these options: {error} (known: {', '.join(names)})")

    def precision(self, train: Mapping[str, Any]) -> None:
        if train.get("autocast") == "fp16" and on_cpu(self.options):
            self.problems.add("train.autocast", "must be bf16 or ~ on the CPU, got 'fp16', which needs a CUDA GPU")

    def parts(self, train: Mapping[str, Any]) -> None:
        """Check that a batch can be cut into equal parts, and that the loss is an average over them."""
        parts, datasets = train.get("accumulate"), self.options.get("datasets")
        if not isinstance(parts, int) or parts <= 1:
            return
        training_set = datasets.get("train") if isinstance(datasets, Mapping) else None
        batch = training_set.get("batch_size_per_gpu") if isinstance(training_set, Mapping) else None
        if isinstance(batch, int) and batch % parts:
            self.problems.add(
                "train.accumulate",
                f"must divide batch_size_per_gpu {batch}, which goes through the network in so many parts, got {parts}",
            )
        loss = train.get("pixel_opt")
        if isinstance(loss, Mapping) and loss.get("reduction", "mean") != "mean":
            self.problems.add(
                "train.pixel_opt.reduction",
                f"must be mean with accumulate {parts}, which averages over the parts, got {loss['reduction']!r}",
            )

    def validation_options(self) -> None:
        val = self.options.get("val")
        if not isinstance(val, dict):
            return
        val.setdefault("save_img", False)
        val.setdefault("suffix", None)
        tile, overlap = val.get("tile"), val.get("tile_overlap")
        if isinstance(overlap, int) and overlap and (tile is None or (isinstance(tile, int) and overlap >= tile)):
            self.problems.add("val.tile_overlap", f"must be less than val.tile, got {overlap} with tile {tile or '~'}")
        if isinstance(val.get("metrics"), Mapping):
            val["metrics"] = dict(val["metrics"])
            for key, metric in val["metrics"].items():
                if not isinstance(metric, Mapping):
                    self.problems.add(f"val.metrics.{key}", f"must be a map with a key 'type', got {metric!r}")
                    continue
                val["metrics"][key] = dict(metric)
                self.metric(f"val.metrics.{key}", val["metrics"][key])

    def metric(self, path: str, options: dict[str, Any]) -> None:
        """Check the options of a metric; if they are right, keep it to be tried on the sizes of the images."""
        build = self.chosen("METRIC_REGISTRY", path, options, "the metric, e.g. calculate_psnr")
        if build is None:
            return
        before = len(self.problems)
        rest = {name: value for name, value in options.items() if name not in ("type", "better")}
        with self.problems.gathered():
            trials.arguments(build, rest, path, ("img", "img2"))
        with self.problems.gathered():
            read(_only(_Metric, "better"), {"better": options.get("better", "higher")}, path)
        options |= rest
        if len(self.problems) == before:
            self.metrics[path] = (build, rest)

    def measured(
        self, path: str, kind: object, sample: Mapping[str, Any], sizes: Mapping[str, tuple[int, int]]
    ) -> None:
        """Take the metrics of images as large as those of a data set."""
        image = sample.get("gt", sample.get("lq"))
        if not isinstance(image, torch.Tensor) or image.ndim != 3:
            return
        channels, *size = image.shape
        name, smallest = min(sizes.items(), key=lambda item: min(item[1]), default=("the first", (size[1], size[0])))
        for metric, (build, options) in self.metrics.items():
            if "gt" not in sample and "img2" in inspect.signature(build).parameters:
                self.problems.add(f"{path}.type", f"{kind} has no image to compare with, which {metric} needs")
                continue
            shape = smallest[::-1] if channels == 1 else (*smallest[::-1], 3)
            fault = trials.metric(build, options, shape)
            if fault:
                border = f"; crop_border is {options['crop_border']}" if options.get("crop_border") else ""
                self.problems.add(
                    metric, f"{build.__name__} {fault} on an image of {_times(smallest)}, {name!r}{border}"
                )

    def weights(self) -> None:
        path = self.options["path"]
        if not isinstance(path, Mapping):
            return
        for key, value in path.items():
            if key.startswith(("pretrain_network", "resume_state")) and isinstance(value, str):
                file = Path(value).expanduser()
                if not file.is_file():
                    self.problems.add(f"path.{key}", f"there is no file {value!r}{_near(file)}")
                elif file.suffix == ".safetensors" and not self.is_ours():
                    self.problems.add(
                        f"path.{key}",
                        f"{self.options.get('model_type')} reads files of torch.save only, got {value!r}; model_type: "
                        f"{_MODEL} reads .safetensors, and `sparse-sr convert` writes .pth",
                    )
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
        before = len(self.problems)
        values = dict(values)
        declared = _TrainingSet if kind == "train" else _Dataset
        right = self.section(declared, values, path, whole=False)
        build = self.registered("DATASET_REGISTRY", right.get("type"))
        looked_up = option_lookups.of(*_bases(build)).names.get("", set()) | self.reads.names.get("datasets", set())
        self.unread(path, values, [*fields(_TrainingSet), *sorted(looked_up)])
        if build is None:
            self.named("DATASET_REGISTRY", f"{path}.type", right.get("type"))
        if right.get("type") == _PAIRED:
            wanted = ["dataroot_gt", "dataroot_lq", "io_backend"]
            if kind == "train":
                wanted += ["gt_size", "use_hflip", "use_rot"]
            for name in wanted:
                if values.get(name) is None:
                    self.problems.add(join_path(path, name), f"missing; {_PAIRED} needs it")
        self.backend(path, values)
        folders = {name: self.folder(path, name, values) for name in values if str(name).startswith("dataroot")}
        self.depths(path, folders)
        scale = self.scale
        gt_size = right.get("gt_size")
        if isinstance(scale, int) and scale > 0 and gt_size and gt_size % scale:
            nearest = max(1, round(gt_size / scale)) * scale
            self.problems.add(
                f"{path}.gt_size", f"must be a multiple of scale {scale}, got {gt_size}; nearest: {nearest}"
            )
        self.loader(path, kind, right)
        pairs: list[tuple[Path, Path]] = []
        if right.get("type") == _PAIRED and not values.get("meta_info_file"):
            pairs = self.pairs(path, folders, right.get("filename_tmpl", "{}"))
            self.sizes(path, pairs[:_NUM_IMAGES_MEASURED], gt_size if kind == "train" else None)
        if build is not None and len(self.problems) == before and self.scale is not None:
            self.samples(path, kind, build, values, right, pairs)
        return values

    def loader(self, path: str, kind: str, right: Mapping[str, Any]) -> None:
        """Check what PyTorch's loaders and BasicSR's prefetchers need."""
        if right.get("prefetch_mode") == "cuda" and not torch.cuda.is_available():
            self.problems.add(f"{path}.prefetch_mode", "must be cpu or ~ without a CUDA GPU, got 'cuda'")
        elif right.get("prefetch_mode") == "cuda" and kind == "train" and not right.get("pin_memory"):
            self.problems.add(f"{path}.pin_memory", "must be true with prefetch_mode cuda")
        if right.get("persistent_workers") and (kind != "train" or right.get("num_worker_per_gpu") == 0):
            why = "num_worker_per_gpu is 0" if kind == "train" else f"BasicSR reads {kind} sets without workers"
            self.problems.add(f"{path}.persistent_workers", f"must be false: {why}")

    def backend(self, path: str, values: Mapping[str, Any]) -> None:
        """Check from what images are read."""
        backend = values.get("io_backend")
        if not isinstance(backend, Mapping):
            return
        client = getattr(importlib.import_module("basicsr.utils"), "FileClient", None)
        known = sorted(getattr(client, "_backends", ("disk", "lmdb", "memcached")))
        kind = backend.get("type")
        if kind is None:
            self.problems.add(f"{path}.io_backend.type", f"missing; it is one of {', '.join(known)}")
        elif kind not in known:
            self.problems.add(f"{path}.io_backend.type", f"BasicSR has no backend {kind!r}{suggestion(kind, known)}")
        for name in [name for name in values if str(name).startswith("meta_info")]:
            file = Path(str(values[name])).expanduser()
            if values[name] is not None and not file.is_file():
                self.problems.add(join_path(path, name), f"there is no file {values[name]!r}{_near(file)}")
        for name in [name for name in values if str(name).startswith("dataroot") and kind == "lmdb"]:
            root = Path(str(values[name])).expanduser()
            lacking = [file for file in ("data.mdb", "meta_info.txt") if not (root / file).is_file()]
            if root.is_dir() and (root.suffix != ".lmdb" or lacking):
                lacks = f" and has no {' and no '.join(lacking)}" if lacking else ""
                self.problems.add(
                    join_path(path, name),
                    f"must be a database whose name ends in .lmdb, as io_backend says, got {values[name]!r}, which is "
                    f"a folder{lacks}; for images in a folder write io_backend: {{type: disk}}",
                )

    def samples(
        self,
        path: str,
        kind: str,
        build: type,
        values: Mapping[str, Any],
        right: Mapping[str, Any],
        pairs: Sequence[tuple[Path, Path]],
    ) -> None:
        """Build a data set whose options look right, read its first sample, and try on it what will be done with it."""
        given = dict(values) | {"phase": kind, "scale": self.scale}
        for name in ("dataroot_gt", "dataroot_lq"):
            if isinstance(given.get(name), str):
                given[name] = os.path.expanduser(given[name])
        if given.get("cache_data"):  # all of it, before the first sample
            return
        try:
            number, files, sample = trials.first_sample(build, given, path)
        except ConfigError as error:
            for problem in error.problems:
                self.problems.add(problem.path, problem.message)
            return
        for file in files:
            if not trials.is_image(Path(file)):
                self.problems.add(path, f"must hold images only, but {file!r} cannot be read as an image")
                return
        self.fitting(path, kind, right.get("type"), sample)
        if kind == "train":
            self.batches(path, number, right)
        elif self.metrics and self.scale is not None:
            scale = self.scale
            sizes = {low.name: size for _, low in pairs if (size := _size(low))}
            self.measured(path, right["type"], sample, {name: (scale * w, scale * h) for name, (w, h) in sizes.items()})

    def fitting(self, path: str, kind: str, name: object, sample: object) -> None:
        """Check that a sample has what the model will look for, and as many channels as the network takes."""
        if not isinstance(sample, Mapping):
            self.problems.add(f"{path}.type", f"{name} must give a map for each sample, gives {type(sample).__name__}")
            return
        plain = self.registered("MODEL_REGISTRY", "SRModel")
        theirs = next(
            (
                vars(cls).get("feed_data")
                for cls in _bases(self.model)
                if "feed_data" in vars(cls) and not cls.__module__.startswith("sparse_sr_attn")
            ),
            None,
        )
        wanted = ("lq", "gt") if kind == "train" else ("lq",)
        for key in wanted if plain is not None and theirs is vars(plain).get("feed_data") else ():
            if key not in sample:
                what = "images of low resolution" if key == "lq" else "images to compare with"
                self.problems.add(
                    f"{path}.type", f"{name} has no {what} ({key}), which {self.options['model_type']} needs"
                )
        for key, value in sample.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point() and not bool(value.isfinite().all()):
                self.problems.add(path, f"pixels must be finite, but {key} of the first sample has NaN or infinity")
        low, channels = sample.get("lq"), self.channels()
        if isinstance(low, torch.Tensor) and low.ndim == 3 and channels is not None and len(low) != channels:
            self.problems.add(
                path, f"must hold images of network_g.num_in_ch, {channels}, channels; the first sample has {len(low)}"
            )

    def channels(self) -> int | None:
        """Return how many channels the network takes, if that can be seen from its options."""
        network = self.options.get("network_g")
        if self.ours.get(str(_nested(network, "type"))) is Attended:
            network = _nested(network, "network")
        if not isinstance(network, Mapping):
            return None
        build = self.ours.get(str(network.get("type"))) or self.builder(str(network.get("type")))
        default = inspect.signature(build).parameters.get("num_in_ch") if build is not None else None
        channels = network.get("num_in_ch", default.default if default is not None else None)
        return channels if isinstance(channels, int) else None

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

    def pairs(self, path: str, folders: Mapping[str, Path | None], template: str) -> list[tuple[Path, Path]]:
        """Check that each image has its counterpart, as BasicSR looks for it; return the pairs if all do."""
        high, low = folders.get("dataroot_gt"), folders.get("dataroot_lq")
        if high is None or low is None:
            return []
        try:
            template.format("")
        except (IndexError, KeyError, ValueError):
            self.problems.add(
                f"{path}.filename_tmpl", f"must have one {{}}, for the name of the file, got {template!r}"
            )
            return []
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
            return []
        return (
            [(high / name, low / counterpart) for counterpart, name in sorted(wanted.items())] if counterparts else []
        )

    def sizes(self, path: str, pairs: Sequence[tuple[Path, Path]], gt_size: int | None) -> None:
        """Check that images are `scale` times as large as their counterparts, and in training no smaller than a patch.

        In validation they may be larger: BasicSR cuts them.
        """
        scale = self.scale
        if not isinstance(scale, int) or scale < 1:
            return
        for high, low in pairs:
            original, counterpart = _size(high), _size(low)
            if original is None or counterpart is None:
                continue  # what is no image comes out when it is read
            wanted = tuple(scale * side for side in counterpart)
            too_small = any(side < other for side, other in zip(original, wanted, strict=True))
            if too_small or (gt_size and original != wanted):
                self.problems.add(
                    join_path(path, "dataroot_lq"),
                    f"must hold images of 1/{scale} the size (the option 'scale'), but {str(high)!r} is "
                    f"{_times(original)} and {str(low)!r} is {_times(counterpart)}",
                )
                return
            if gt_size and min(original) < gt_size:
                self.problems.add(
                    join_path(path, "gt_size"),
                    f"must be at most the size of every image, got {gt_size}, and {str(high)!r} is {_times(original)}",
                )
                return

    def depths(self, path: str, folders: Mapping[str, Path | None]) -> None:
        """Remark on images whose lower bits are lost: BasicSR reads 8 bits a channel."""
        for name, folder in folders.items():
            files = sorted(_files(folder))[:_NUM_IMAGES_MEASURED] if folder else []
            deep = [file for file in files if folder and _is_deep(folder / file)]
            if deep:
                self.remarks.append(
                    f"{join_path(path, name)}: BasicSR reads 8 bits a channel, and {deep[0]!r} has more; its lower "
                    f"bits are lost (as in {len(deep)} of the first {len(files)} images)"
                )

    def batches(self, path: str, num_pairs: int, right: Mapping[str, Any]) -> None:
        """Check that an epoch holds a batch."""
        batch, ratio = right.get("batch_size_per_gpu"), right.get("dataset_enlarge_ratio", 1)
        num_gpu = self.options.get("num_gpu")
        if not batch:
            return
        batch *= max(1, num_gpu if isinstance(num_gpu, int) else torch.cuda.device_count())
        if num_pairs * ratio >= 2**31:
            most = 2**31 // num_pairs
            self.problems.add(
                f"{path}.dataset_enlarge_ratio", f"must be at most {most:,} for {num_pairs} images, got {ratio:g}"
            )
            return
        samples = math.ceil(num_pairs * ratio)
        if samples < batch:
            self.problems.add(
                f"{path}.dataset_enlarge_ratio",
                f"must be at least {math.ceil(batch / num_pairs)}, got {ratio:g}: an epoch of {num_pairs} images must "
                f"fill a batch of {batch}, or BasicSR trains on nothing",
            )


def _nested(options: object, *names: str) -> Any:
    """Return what stands at the end of a path; None if nothing does."""
    for name in names:
        options = options.get(name) if isinstance(options, Mapping) else None
    return options


def _bases(cls: Any) -> tuple[type, ...]:
    """Return a class and what it is made of, the nearest first; nothing for what is no class."""
    return cls.__mro__ if inspect.isclass(cls) else ()


def _only(cls: type, name: str) -> type:
    """Return a class that declares the option `name` of `cls` alone, so that one fault hides no other."""
    option = fields(cls)[name]
    if option.default is option.empty:
        return make_dataclass(cls.__name__, [(name, option.annotation)])
    return make_dataclass(cls.__name__, [(name, option.annotation, field(default=option.default))])


def _files(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")}


def _size(image: Path) -> tuple[int, int] | None:
    """Return (width, height) as BasicSR reads the image, from the head of the file; None if that says nothing."""
    try:
        with Image.open(image) as opened:
            sideways = opened.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            size = opened.size
        return _decoded_size(image) if sideways else size
    except (OSError, SyntaxError, ValueError):
        return None


def _decoded_size(image: Path) -> tuple[int, int] | None:
    """Return (width, height) of what BasicSR makes of a file: which EXIF it follows is a matter of OpenCV's version."""
    imfrombytes = importlib.import_module("basicsr.utils").imfrombytes
    pixels = imfrombytes(image.read_bytes())
    return None if pixels is None else (pixels.shape[1], pixels.shape[0])


def _is_deep(image: Path) -> bool:
    """Return whether a file has more than 8 bits a channel, as far as its head says."""
    try:
        with Image.open(image) as opened:
            return opened.mode.startswith(("I", "F")) or is_reduced(opened)
    except (OSError, SyntaxError, ValueError):
        return False


def _times(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _near(wanted: Path) -> str:
    """Return a hint at a sibling of nearly the same name."""
    parent = wanted.parent
    beside = {entry.name.casefold(): entry.name for entry in parent.iterdir()} if parent.is_dir() else {}
    close = get_close_matches(wanted.name.casefold(), beside, n=1)
    return f"; did you mean {str(parent / beside[close[0]])!r}?" if close else ""
