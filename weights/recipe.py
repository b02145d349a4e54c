"""Train the weights that come with the library, and measure them.

    python weights/recipe.py train LCoAN-light 2 --data T91/ BSD400/                  one network, one factor
    python weights/recipe.py train LCoAN-light 4 --data ... --start 2                 its body goes on from that of x2
    python weights/recipe.py ship LCoAN-light 2                                       into sparse_sr_attn/weights
    python weights/recipe.py report --test Set5/ Set14/                               figures into docs/weights.md

Folders hold photographs of high resolution; low resolution is made of them (`sparse-sr prepare`). Everything else comes
to lie in build/weights, and a training that was stopped goes on. All networks see the same patches in the same order.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

import torch
import yaml

from sparse_sr_attn import PRESETS, load_model
from sparse_sr_attn.commands.common import images_in
from sparse_sr_attn.conversion import convert_weights, write_weights
from sparse_sr_attn.degradation import crop_to_multiple, matlab_bicubic
from sparse_sr_attn.evaluation import Score, bicubic_luma, luma, score
from sparse_sr_attn.images import Picture, as_rgb, read_pixels, upscale_image
from sparse_sr_attn.paper.figures import LIGHT_EDSR, LIGHT_LCOA

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "weights"
PAGE = ROOT / "docs" / "weights.md"
RECORD = Path(__file__).with_name("figures.json")
BEGIN, END = "<!-- figures of weights/recipe.py -->\n", "<!-- end of figures -->"

NETWORKS: dict[str, dict[str, Any]] = {
    "LCoAN-light": {"type": "LCoAN", **PRESETS["LCoAN-light"].options},
    "ELAN-light": {"type": "ELAN", **PRESETS["ELAN-light"].options},
    "EDSR": {"type": "SparseEDSR", **LIGHT_EDSR},
    "EDSR-LCoA": {"type": "SparseEDSR", **LIGHT_EDSR, "attention": dict(LIGHT_LCOA)},
}


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """How long a network is trained: `batch` patches a step, of `patch` pixels a side in low resolution."""

    iterations: int = 3000
    batch: int = 8
    patch: int = 32
    learning_rate: float = 8e-4
    seed: int = 0
    workers: int = 0


def options(network: str, upscale: int, budget: Budget, *, pairs: Path, start: Path | None) -> dict[str, Any]:
    """Return the option file of a training."""
    return {
        "name": named(network, upscale, budget.seed),
        "model_type": "SparseSRModel",
        "scale": upscale,
        "num_gpu": "auto",
        "manual_seed": budget.seed,
        "datasets": {
            "train": {
                "name": pairs.name,
                "type": "PairedImageDataset",
                "dataroot_gt": str(pairs / "HR"),
                "dataroot_lq": str(pairs / f"LR_x{upscale}"),
                "filename_tmpl": "{}",
                "io_backend": {"type": "disk"},
                "gt_size": budget.patch * upscale,
                "use_hflip": True,
                "use_rot": True,
                "num_worker_per_gpu": budget.workers,
                "batch_size_per_gpu": budget.batch,
                "dataset_enlarge_ratio": 1,
                "prefetch_mode": None,
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
            "ema_decay": 0.998 if start is None else 0.995,
            "autocast": "bf16",
            "optim_g": {"type": "Adam", "lr": budget.learning_rate, "weight_decay": 0, "betas": [0.9, 0.99]},
            "scheduler": {"type": "CosineAnnealingRestartLR", "periods": [budget.iterations], "eta_min": 1e-6},
            "total_iter": budget.iterations,
            "warmup_iter": -1,
            "pixel_opt": {"type": "L1Loss", "loss_weight": 1.0, "reduction": "mean"},
        },
        "logger": {
            "print_freq": 100,
            "save_checkpoint_freq": 500,
            "use_tb_logger": False,
            "wandb": {"project": None, "resume_id": None},
        },
        "dist_params": {"backend": "gloo", "port": 29500},
    }


def named(network: str, upscale: int, seed: int = 0) -> str:
    return f"{network}_x{upscale}" + (f"_seed{seed}" if seed else "")


def trained(network: str, upscale: int, seed: int = 0) -> Path:
    return BUILD / "experiments" / named(network, upscale, seed) / "models" / "net_g_latest.pth"


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
        command("prepare", *data, "--scale", upscale, "--tile", 2 * crop, "--crop", crop, "-o", pairs)
    start = trained(arguments.network, arguments.start, budget.seed) if arguments.start else None
    asked = options(arguments.network, upscale, budget, pairs=pairs, start=start)
    file = BUILD / f"{asked['name']}.yml"
    file.write_text(yaml.safe_dump(asked, sort_keys=False))
    command("train", "-opt", file, "--auto_resume")


def ship(arguments: argparse.Namespace) -> None:
    model = load_model(trained(arguments.network, arguments.upscale))
    file = ROOT / "sparse_sr_attn" / "weights" / f"{arguments.network}_x{arguments.upscale}.safetensors"
    file.parent.mkdir(exist_ok=True)
    write_weights(convert_weights(model, "ours"), file, nested=False, overwrite=True)
    print(f"{file}: {file.stat().st_size / 1e6:.2f} MB")


# --- figures ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """How good a network is on a set of photographs: means over them, of luma, as BasicSR counts."""

    network: str
    upscale: int
    photographs: str
    psnr: float
    ssim: float
    parameters: int | None
    trained_on: str

    @property
    def key(self) -> tuple[str, int, str, str]:
        """Return what tells it from others."""
        return self.network, self.upscale, self.trained_on, self.photographs


def measure(name: str, model: Any, upscale: int, folder: Path, trained_on: str) -> Figure:
    """Measure a network, or, without one, bicubic interpolation as papers do."""
    scores: list[Score] = []
    for file in images_in(folder):
        pixels = read_pixels(file)
        if model is None:
            truth, image = bicubic_luma(pixels, upscale)
        else:
            high = crop_to_multiple(as_rgb(pixels), upscale)  # grey, too, as BasicSR has it
            low = Picture(matlab_bicubic(high, upscale).numpy())
            large = upscale_image(model, low, tile=max(low.pixels.shape), overlap=0).pixels
            truth, image = luma(high), luma(torch.from_numpy(large))
        scores.append(score(truth, image, border=upscale))
    means = torch.tensor(scores, dtype=torch.float64).mean(0).tolist()
    size = None if model is None else sum(parameter.numel() for parameter in model.parameters())
    return Figure(name, upscale, folder.name, *means, size, trained_on)


PUBLISHED = {
    ("ELAN-light", 2): {"Set5": (38.17, 0.9611), "Set14": (33.94, 0.9207)},
    ("ELAN-light", 3): {"Set5": (34.61, 0.9288), "Set14": (30.55, 0.8463)},
    ("ELAN-light", 4): {"Set5": (32.43, 0.8975), "Set14": (28.78, 0.7858)},
}
"""Of arXiv 2203.06697, trained on DIV2K. LCoAN-light has none, being ours."""


def report(arguments: argparse.Namespace) -> None:
    """Measure what is trained here; figures of other trainings stay on record."""
    found = [Figure(**figure) for figure in json.loads(RECORD.read_text())]
    untold = {"EDSR": {"img_range": LIGHT_EDSR["img_range"]}}  # weights without attention carry no options
    for upscale in (2, 3, 4):
        models: dict[str, tuple[Any, str]] = {"bicubic": (None, "")}
        for network, seed in product(NETWORKS, range(arguments.seeds)):
            if (file := trained(network, upscale, seed)).exists():
                option_file = yaml.safe_load((BUILD / f"{named(network, upscale, seed)}.yml").read_text())
                label = network + (f", seed {seed}" if seed else "")
                models[label] = load_model(file, **untold.get(network, {})), described(option_file)
        for label, (model, trained_on) in models.items() if len(models) > 1 else ():
            for folder in arguments.test:
                figure = measure(label, model, upscale, folder, trained_on)
                print(figure, flush=True)
                found = [one for one in found if one.key != figure.key] + [figure]
    found.sort(key=lambda figure: (figure.upscale, figure.trained_on, figure.parameters or 0, figure.network))
    RECORD.write_text(json.dumps([asdict(figure) for figure in found], indent=1, ensure_ascii=False) + "\n")
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + table(found) + END + rest.partition(END)[2])


def described(option_file: Mapping[str, Any]) -> str:
    """Return what a training saw: steps, patches a step, pixels of a patch in low resolution."""
    data, upscale = option_file["datasets"]["train"], option_file["scale"]
    steps, side = option_file["train"]["total_iter"], data["gt_size"] // upscale
    start = option_file["path"]["pretrain_network_g"]
    return f"{steps:,} × {data['batch_size_per_gpu']} × {side}²" + (f", after {Path(start).parts[-3]}" if start else "")


def table(figures: Sequence[Figure]) -> str:
    """Return the figures as Markdown, PSNR in dB and SSIM of each set of photographs."""
    sets = list(dict.fromkeys(figure.photographs for figure in figures))
    lines = [f"| | parameters | steps × patches × pixels | {' | '.join(sets)} |", f"|---|---|---|{'---|' * len(sets)}"]
    for key in dict.fromkeys(figure.key[:3] for figure in figures):
        own = {figure.photographs: figure for figure in figures if figure.key[:3] == key}
        one = next(iter(own.values()))
        size = f"{one.parameters:,}" if one.parameters else ""
        cells = [f"{own[photographs].psnr:.2f} / {own[photographs].ssim:.4f}" for photographs in sets]
        lines.append(f"| ×{one.upscale} {one.network} | {size} | {one.trained_on} | {' | '.join(cells)} |")
        if published := PUBLISHED.get((one.network, one.upscale)):
            cells = [f"{published[p][0]:.2f} / {published[p][1]:.4f}" if p in published else "" for p in sets]
            lines.append(f"| ×{one.upscale} {one.network}, published | {size} | DIV2K | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="command")
    trainer = commands.add_parser("train", help="train one network for one factor; go on if it was stopped")
    trainer.add_argument("--data", type=Path, nargs="+", required=True, help="folders of photographs to train on")
    for option in fields(Budget):
        flag = f"--{option.name.replace('_', '-')}"
        trainer.add_argument(flag, type=type(option.default), default=option.default, help="default: %(default)s")
    trainer.add_argument("--start", type=int, metavar="N", help="begin with the weights trained for this factor")
    shipper = commands.add_parser("ship", help="put trained weights into the package")
    for command in (trainer, shipper):
        command.add_argument("network", choices=NETWORKS)
        command.add_argument("upscale", type=int, choices=(2, 3, 4))
    reporter = commands.add_parser("report", help="measure all that is trained")
    reporter.add_argument("--seeds", type=int, default=2, metavar="N", help="trainings with seeds below this")
    reporter.add_argument("--test", type=Path, nargs="+", required=True, help="folders of photographs to measure on")
    for command, function in ((trainer, train), (shipper, ship), (reporter, report)):
        command.set_defaults(function=function)
    arguments = parser.parse_args()
    arguments.function(arguments)


if __name__ == "__main__":
    main()
