"""The options of a BasicSR option file that do not depend on a network, loss or data set, by section."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from sparse_sr_attn.config import NonNegative, NonNegativeInt, Positive, PositiveInt, Rule, UnitInterval, fields

# BasicSR's own option files write `val_freq: !!float 5e3`.
Count = Annotated[
    float,
    Rule("whole and >= 1", lambda value: value >= 1 and float(value).is_integer()),
    Rule("below 2**31", lambda value: value < 2**31),
]
Seed = Annotated[int, Rule("in [0, 2**32)", lambda value: 0 <= value < 2**32)]  # as in NumPy
WholeNumber = Annotated[float, Rule("whole", lambda value: float(value).is_integer())]

ONLY_OURS = {
    "train": (
        "grad_clip",
        "accumulate",
        "one_kmeans_update",
        "autocast",
        "channels_last",
        "cuda_graph",
        "deterministic",
        "pretrain_img_range",
        "fft_opt",
    ),
    "val": ("tile", "tile_overlap"),
}
"""Options of our models, by section; BasicSR's models ignore them."""


@dataclass(frozen=True, kw_only=True)
class General:
    """The top level of every option file."""

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
class Training(General):
    """The top level of an option file for training."""

    train: Mapping[str, Any]
    logger: Mapping[str, Any]
    val: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Testing(General):
    """The top level of an option file for testing."""

    val: Mapping[str, Any]
    train: Mapping[str, Any] | None = None
    logger: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class DistParams:
    """`dist_params`."""

    backend: Literal["nccl", "gloo"] = "nccl"
    port: PositiveInt | None = None


@dataclass(frozen=True, kw_only=True)
class Path:
    """`path`."""

    pretrain_network_g: str | None = None
    param_key_g: str | None = "params"
    strict_load_g: bool = True
    resume_state: str | None = None
    ignore_resume_networks: Sequence[str] | None = None


@dataclass(frozen=True, kw_only=True)
class Train:
    """`train`."""

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
    cuda_graph: bool = False
    deterministic: bool = False
    pretrain_img_range: Positive | None = None
    net_d_iters: Count = 1
    net_d_init_iters: Annotated[float, Rule("whole and >= 0", lambda value: value >= 0 and value.is_integer())] = 0


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """`train.optim_g`; the optimizer has more."""

    type: str
    lr: Positive
    weight_decay: NonNegative = 0.0
    betas: Sequence[UnitInterval] = (0.9, 0.99)
    eps: Positive = 1e-8


@dataclass(frozen=True, kw_only=True)
class Scheduler:
    """`train.scheduler`; the scheduler may have more."""

    type: str
    milestones: Sequence[Count] = ()
    gamma: Positive = 0.1
    periods: Sequence[Count] = ()
    restart_weights: Sequence[NonNegative] = (1,)
    eta_min: NonNegative = 0.0


@dataclass(frozen=True, kw_only=True)
class ValidationInTesting:
    """`val` of a file to test by."""

    val_freq: Count = 1
    save_img: bool = False
    pbar: bool = False
    suffix: str | None = None
    metrics: Mapping[str, Any] | None = None
    tile: PositiveInt | None = None
    tile_overlap: NonNegativeInt | None = None


@dataclass(frozen=True, kw_only=True)
class ValidationInTraining(ValidationInTesting):
    """`val` of a file to train by."""

    val_freq: Count


@dataclass(frozen=True, kw_only=True)
class Metric:
    """`val.metrics.<name>`; the metric has more."""

    better: Literal["higher", "lower"] = "higher"


@dataclass(frozen=True, kw_only=True)
class Logger:
    """`logger`."""

    print_freq: Count
    save_checkpoint_freq: Count
    use_tb_logger: bool = False
    wandb: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """`datasets.<phase>`; the data set may have more."""

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
class TrainingSet(Dataset):
    """`datasets.train`."""

    batch_size_per_gpu: PositiveInt
    num_worker_per_gpu: NonNegativeInt
    dataset_enlarge_ratio: Positive = 1
    gt_size: PositiveInt | None = None
    use_hflip: bool | None = None
    use_rot: bool | None = None
    use_shuffle: bool = True


_SECTIONS = (Training, DistParams, Path, Train, Optimizer, Scheduler, ValidationInTraining, Metric, Logger, TrainingSet)

NAMES = {name for section in _SECTIONS for name in fields(section)}
"""All options declared here, of whatever section."""
