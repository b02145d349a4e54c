"""Train the weights that come with the library and the networks they are compared with, and measure them.

    python -m benchmarks.weights train LCoAN-light 2 --data T91/ BSD400/     one network, one factor
    python -m benchmarks.weights train LCoAN-light 4 --data ... --start LCoAN-light_x2      start from the body of x2
    python -m benchmarks.weights train LCoAN-light 2 --data ... --teacher outputs/ --label taught
    python -m benchmarks.weights report --test Set5/ Set14/ Urban25/         figures into docs/weights.md
    python -m benchmarks.weights ship LCoAN-light_x2                         into the package, once it is measured

Folders hold photographs of high resolution; low resolution is made of them (`sparse-sr prepare`). Everything is written
to build/weights, and a training that was stopped resumes. All networks see the same patches in the same order.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.paper.figures import LIGHT_EDSR
from sparse_sr_attn import PRESETS, AttentionLayer, load_model
from sparse_sr_attn.checkpoints.convert import convert_weights, write_weights
from sparse_sr_attn.cli.common import images_in
from sparse_sr_attn.data.images import as_rgb, read_pixels
from sparse_sr_attn.data.imresize import crop_to_multiple, matlab_bicubic
from sparse_sr_attn.data.metrics import Score, bicubic_luma, score
from sparse_sr_attn.inference.evaluate import attention_off, evaluate
from sparse_sr_attn.inference.visualize import attention_entropy, attention_states

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "weights"
PAGE = ROOT / "docs" / "weights.md"
RECORD = Path(__file__).with_name("figures.json")

_EDSR = {"type": "SparseEDSR", **LIGHT_EDSR}
# Attention starts as the identity with any `res_scale`; with the default of 0.1 a network learns to use it late.
_LCOA = PRESETS["EDSR-LCoA"].options["attention"]
_WHOLE_PATCH = 96**2  # a chunk of so many tokens holds the patch: dense attention

NETWORKS: dict[str, dict[str, Any]] = {
    "LCoAN-light": {"type": "LCoAN", **PRESETS["LCoAN-light"].options},
    "ELAN-light": {"type": "ELAN", **PRESETS["ELAN-light"].options},
    "EDSR": _EDSR,
    "EDSR-wider": {**_EDSR, "num_feat": 49},
    "EDSR-deeper": {**_EDSR, "num_block": 16},
    "EDSR-LCoA": {**_EDSR, "attention": _LCOA},
    "EDSR-nearest": {**_EDSR, "attention": {**_LCOA, "neighbors": "nearest", "chunk_size": 21, "num_adjacent": 4}},
    "EDSR-index": {**_EDSR, "attention": {**_LCOA, "cluster_order": "index"}},
    "EDSR-hash": {**_EDSR, "attention": {**_LCOA, "routing": "lsh"}},
    "EDSR-published": {**_EDSR, "attention": {**_LCOA, "similarity": "dot", "cluster_order": "index"}},
    "EDSR-dense": {**_EDSR, "attention": {**_LCOA, "chunk_size": _WHOLE_PATCH}},
}
"""EDSR-wider has as many parameters as EDSR-LCoA; a training step of EDSR-deeper takes as long as one of EDSR-LCoA."""

PARTS = "3,000 × 8 × 48²"
"""Steps, patches and their side where parts of attention are compared."""


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """How a network is trained: `batch` patches a step, of `patch` pixels a side in low resolution."""

    iterations: int = 15_000
    batch: int = 8
    patch: int = 48
    learning_rate: float = 8e-4
    fft: float = 0.05
    teacher_weight: float = 1.0
    seed: int = 0
    workers: int = 0
    label: str = ""


def options(
    network: str, upscale: int, budget: Budget, *, pairs: Path, start: Path | None, teacher: Path | None
) -> dict[str, Any]:
    """Return the option file of a training."""
    taught = {"dataroot_teacher": str(teacher), "teacher_weight": budget.teacher_weight} if teacher else {}
    return {
        "name": named(network, upscale, budget.seed, budget.label),
        "model_type": "SparseSRModel",
        "scale": upscale,
        "num_gpu": "auto",
        "manual_seed": budget.seed,
        "datasets": {
            "train": {
                "name": pairs.name,
                "type": "CachedPairedImageDataset",
                "dataroot_gt": str(pairs / "HR"),
                "dataroot_lq": str(pairs / f"LR_x{upscale}"),
                "io_backend": {"type": "disk"},
                "gt_size": budget.patch * upscale,
                "use_hflip": True,
                "use_rot": True,
                "num_worker_per_gpu": budget.workers,
                "batch_size_per_gpu": budget.batch,
                "dataset_enlarge_ratio": 10,
                "prefetch_mode": None,
                **taught,
            },
        },
        "network_g": {**NETWORKS[network], "upscale": upscale},
        "path": {
            "pretrain_network_g": start and str(start),
            "param_key_g": "params_ema",
            "strict_load_g": start is None,
            "resume_state": None,
        },
        "train": {
            # A short training must not average in the weights of the start, where those of the upsampler are random.
            "ema_decay": min(0.999, round(0.01 ** (1 / budget.iterations), 4)),
            "autocast": "bf16",
            "optim_g": {"type": "Adam", "lr": budget.learning_rate, "weight_decay": 0, "betas": [0.9, 0.99]},
            "scheduler": {"type": "CosineAnnealingRestartLR", "periods": [budget.iterations], "eta_min": 1e-6},
            "total_iter": budget.iterations,
            "warmup_iter": -1,
            "pixel_opt": {"type": "L1Loss", "loss_weight": 1.0, "reduction": "mean"},
            **({"fft_opt": {"type": "FFTLoss", "loss_weight": budget.fft}} if budget.fft else {}),
        },
        "logger": {
            "print_freq": 100,
            "save_checkpoint_freq": 500,
            "use_tb_logger": False,
            "wandb": {"project": None, "resume_id": None},
        },
        "dist_params": {"backend": "gloo", "port": 29500},
    }


def named(network: str, upscale: int, seed: int = 0, label: str = "") -> str:
    return f"{network}_x{upscale}" + (f"_{label}" if label else "") + (f"_seed{seed}" if seed else "")


def trained(name: str) -> Path:
    return BUILD / "experiments" / name / "models" / "net_g_latest.pth"


def command(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "sparse_sr_attn", *map(str, arguments)], cwd=BUILD, check=True)


def train(arguments: argparse.Namespace) -> None:
    upscale = arguments.upscale
    budget = Budget(**{option.name: getattr(arguments, option.name) for option in fields(Budget)})
    crop = budget.patch * upscale
    BUILD.mkdir(parents=True, exist_ok=True)
    pairs = BUILD / f"pairs_x{upscale}_{crop}"
    if not pairs.exists():
        data = [path.resolve() for path in arguments.data]
        command("prepare", *data, "--scale", upscale, "--crop", crop, "-o", pairs)
    start, teacher = arguments.start and trained(arguments.start), arguments.teacher and arguments.teacher.resolve()
    asked = options(arguments.network, upscale, budget, pairs=pairs, start=start, teacher=teacher)
    file = BUILD / f"{asked['name']}.yml"
    file.write_text(yaml.safe_dump(asked, sort_keys=False))
    command("train", "-opt", file, "--auto_resume")


def ship(arguments: argparse.Namespace) -> None:
    asked = yaml.safe_load((BUILD / f"{arguments.name}.yml").read_text())
    network, scale = arguments.name.split("_")[:2]
    found = recorded()
    mine = [figure for figure in found if (figure.network, figure.upscale) == (network, asked["scale"])]
    if not any(figure.trained_on == described(asked) for figure in mine):
        sys.exit(
            f"error: {arguments.name} has no figures yet; run: python -m benchmarks.weights report --test FOLDER ..."
        )
    model = load_model(trained(arguments.name))
    file = ROOT / "sparse_sr_attn" / "checkpoints" / "trained" / f"{network}_{scale}.safetensors"
    file.parent.mkdir(exist_ok=True)
    write_weights(convert_weights(model, "ours"), file, nested=False, overwrite=True)
    record(
        [
            replace(figure, included=figure.trained_on == described(asked)) if figure in mine else figure
            for figure in found
        ]
    )
    print(f"{file}: {file.stat().st_size / 1e6:.2f} MB")


# --- figures ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """How good a network is on a set of photographs: means over them, of luma, as BasicSR counts.

    Attributes:
        network: name, and the seed unless it is 0.
        upscale: factor.
        photographs: the folder's name.
        psnr: in dB.
        ssim: in 0..1.
        parameters: of the network; `None` for interpolation.
        trained_on: steps, patches and what came before.
        psnr_without_attention: PSNR with attention disabled after training, in dB; `None` for other networks.
        entropy: mean `attention_entropy` of the first attention layer; `None` for other networks.
        included: whether these are the weights in the package.
    """

    network: str
    upscale: int
    photographs: str
    psnr: float
    ssim: float
    parameters: int | None
    trained_on: str
    psnr_without_attention: float | None = None
    entropy: float | None = None
    included: bool = False

    @property
    def key(self) -> tuple[str, int, str, str]:
        """Return what tells it from others."""
        return self.network, self.upscale, self.trained_on, self.photographs


def measure(name: str, model: Any, upscale: int, folder: Path, trained_on: str) -> Figure:
    """Measure a network, or, without one, bicubic interpolation as papers do."""
    if model is None:
        bicubic = [score(*bicubic_luma(read_pixels(file), upscale), border=upscale) for file in images_in(folder)]
        return Figure(name, upscale, folder.name, *means(bicubic), None, trained_on)
    pictures = [as_rgb(read_pixels(file)) for file in images_in(folder)]
    psnr, ssim = means(evaluate(model, pictures))
    size = sum(parameter.numel() for parameter in model.parameters())
    figure = Figure(name, upscale, folder.name, psnr, ssim, size, trained_on)
    if not any(isinstance(layer, AttentionLayer) for layer in model.modules()):
        return figure
    entropy = sum(entropies(model, pictures)) / len(pictures)
    with attention_off(model):
        return replace(figure, psnr_without_attention=means(evaluate(model, pictures))[0], entropy=entropy)


def means(each: Sequence[Score]) -> tuple[float, float]:
    psnr, ssim = torch.tensor(each, dtype=torch.float64).mean(0).tolist()
    return psnr, ssim


def entropies(model: Any, pictures: Sequence[torch.Tensor]) -> Iterator[float]:
    """Yield the entropy of the first attention layer on the middle of each photograph."""
    for picture in pictures:
        low = matlab_bicubic(crop_to_multiple(picture, model.upscale), model.upscale)
        top, left = (max(0, (side - ENTROPY_SIDE) // 2) for side in low.shape[:2])
        middle = low[top : top + ENTROPY_SIDE, left : left + ENTROPY_SIDE].permute(2, 0, 1) / 255
        state = next(iter(attention_states(model, middle).values()))
        yield attention_entropy(state)


ENTROPY_SIDE = 128

PUBLISHED = {
    ("ELAN-light", 2): {"Set5": (38.17, 0.9611), "Set14": (33.94, 0.9207)},
    ("ELAN-light", 3): {"Set5": (34.61, 0.9288), "Set14": (30.55, 0.8463)},
    ("ELAN-light", 4): {"Set5": (32.43, 0.8975), "Set14": (28.78, 0.7858)},
}
"""Of arXiv 2203.06697, trained on DIV2K. LCoAN-light has none, being ours."""


def report(arguments: argparse.Namespace) -> None:
    """Measure what is trained here and not on record yet."""
    found = recorded()
    known = {figure.key for figure in found}
    for file in sorted(BUILD.glob("*.yml")):
        asked = yaml.safe_load(file.read_text())
        network, upscale, seed = asked["name"].partition("_x")[0], asked["scale"], asked["manual_seed"]
        if not finished(asked):
            continue
        # Older weights without attention do not record the range of their training.
        untold = {key: value for key, value in asked["network_g"].items() if key == "img_range"}
        models = {
            "bicubic": (None, ""),
            network + (f", seed {seed}" if seed else ""): (asked["name"], described(asked)),
        }
        for (label, (name, trained_on)), folder in product(models.items(), arguments.test):
            if (label, upscale, trained_on, folder.name) not in known:
                model = name and load_model(trained(name), **untold)
                figure = measure(label, model, upscale, folder, trained_on)
                print(figure, flush=True)
                found.append(figure)
                known.add(figure.key)
    record(found)


def recorded() -> list[Figure]:
    return [Figure(**figure) for figure in json.loads(RECORD.read_text())]


def record(figures: Sequence[Figure]) -> None:
    """Write the record, a figure a line, and the tables of the page."""
    lines = ",\n".join(json.dumps(asdict(figure), ensure_ascii=False) for figure in figures)
    RECORD.write_text(f"[\n{lines}\n]\n")
    page = PAGE.read_text()
    for name, shown in (("included", included(figures)), ("parts", parts(figures)), ("all", figures)):
        begin, end = f"<!-- figures: {name} -->\n", f"<!-- end of figures: {name} -->"
        before, _, rest = page.partition(begin)
        page = before + begin + table(shown) + end + rest.partition(end)[2]
    PAGE.write_text(page)


def included(figures: Sequence[Figure]) -> list[Figure]:
    """Return the figures of the weights in the package, and of bicubic at the same factors."""
    factors = {figure.upscale for figure in figures if figure.included}
    return [figure for figure in figures if figure.included or (not figure.parameters and figure.upscale in factors)]


def parts(figures: Sequence[Figure]) -> list[Figure]:
    """Return the figures of EDSRs whose attention differs in one part, all trained for as long."""
    return [figure for figure in figures if figure.network.startswith("EDSR-") and figure.trained_on == PARTS]


def finished(asked: Mapping[str, Any]) -> bool:
    states = BUILD / "experiments" / asked["name"] / "training_states"
    return (states / f"{asked['train']['total_iter']}.state").exists() and trained(asked["name"]).exists()


def described(option_file: Mapping[str, Any]) -> str:
    """Return what a training saw: steps, patches a step, pixels of a patch in low resolution."""
    data, upscale = option_file["datasets"]["train"], option_file["scale"]
    steps, side = option_file["train"]["total_iter"], data["gt_size"] // upscale
    start, teacher = option_file["path"]["pretrain_network_g"], data.get("dataroot_teacher")
    return (
        f"{steps:,} × {data['batch_size_per_gpu']} × {side}²"
        + (f", {data['teacher_weight']:.0%} teacher" if teacher else "")
        + (f", after {Path(start).parts[-3]}" if start else "")
    )


def table(figures: Sequence[Figure]) -> str:
    """Return the figures as Markdown, PSNR in dB and SSIM of each set; in brackets PSNR with attention switched off."""
    sets = list(dict.fromkeys(figure.photographs for figure in figures))
    figures = sorted(figures, key=place)
    lines = [
        f"| | parameters | steps × patches × pixels | {' | '.join(sets)} | entropy |",
        f"|---|---|---|{'---|' * len(sets)}---|",
    ]
    published = dict(PUBLISHED)  # a row each, however many trainings there are
    for key in dict.fromkeys(figure.key[:3] for figure in figures):
        own = {figure.photographs: figure for figure in figures if figure.key[:3] == key}
        one = next(iter(own.values()))
        size = f"{one.parameters:,}" if one.parameters else ""
        cells = [cell(own.get(photographs)) for photographs in sets]
        spread = [figure.entropy for figure in own.values() if figure.entropy is not None]
        entropy = f"{sum(spread) / len(spread):.2f}" if spread else ""
        lines.append(f"| ×{one.upscale} {one.network} | {size} | {one.trained_on} | {' | '.join(cells)} | {entropy} |")
        if theirs := published.pop((one.network, one.upscale), None):
            cells = [f"{theirs[p][0]:.2f} / {theirs[p][1]:.4f}" if p in theirs else "" for p in sets]
            lines.append(f"| ×{one.upscale} {one.network}, published | {size} | DIV2K | {' | '.join(cells)} | |")
    return "\n".join(lines) + "\n"


def place(figure: Figure) -> tuple[int, list[int], int, str]:
    """Return what tables are sorted by: factor, the numbers of the training, size, name."""
    budget = [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", figure.trained_on)]
    return figure.upscale, budget, figure.parameters or 0, figure.network


def cell(figure: Figure | None) -> str:
    if figure is None:
        return ""
    off = figure.psnr_without_attention
    return f"{figure.psnr:.2f} / {figure.ssim:.4f}" + ("" if off is None else f" ({off:.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="command")
    trainer = commands.add_parser("train", help="train one network for one factor; go on if it was stopped")
    trainer.add_argument("--data", type=Path, nargs="+", required=True, help="folders of photographs to train on")
    for option in fields(Budget):
        flag = f"--{option.name.replace('_', '-')}"
        trainer.add_argument(flag, type=type(option.default), default=option.default, help="default: %(default)s")
    trainer.add_argument("--start", metavar="NAME", help="begin with the weights of an earlier training")
    trainer.add_argument("--teacher", type=Path, metavar="FOLDER", help="a teacher's outputs, named like the HR images")
    trainer.add_argument("network", choices=NETWORKS)
    trainer.add_argument("upscale", type=int, choices=(2, 3, 4))
    shipper = commands.add_parser("ship", help="put trained weights into the package")
    shipper.add_argument("name", help="of a training, e.g. LCoAN-light_x2")
    reporter = commands.add_parser("report", help="measure all that is trained")
    reporter.add_argument("--test", type=Path, nargs="+", required=True, help="folders of photographs to measure on")
    for command, function in ((trainer, train), (shipper, ship), (reporter, report)):
        command.set_defaults(function=function)
    arguments = parser.parse_args()
    arguments.function(arguments)
