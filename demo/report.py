"""Measure and draw the result of `sparse-sr train -opt train.yml`.

python demo/report.py [--opt FILE] [--root FOLDER] [--output FOLDER]

Prints a table for the held-out photographs, writes `report.json` and `demo.png`, and fails if the gain
over bicubic is too small.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
import yaml
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from sparse_sr_attn import EDSR, LSP, LCoAN
from sparse_sr_attn.backbones.base import Network
from sparse_sr_attn.data import metrics
from sparse_sr_attn.data.imresize import imresize
from sparse_sr_attn.inference.evaluate import attention_off
from sparse_sr_attn.inference.visualize import attention_states, similarity_palette

UPSCALE = 2
REQUIRED_GAIN = 0.5  # dB
HERE = Path(__file__).resolve().parent


class DemoError(Exception):
    """The demo cannot continue; the message says what to run first."""


@dataclass(frozen=True)
class Result:
    """One held-out photograph; pictures are uint8 (h, w, 3) in RGB."""

    name: str
    low: Tensor
    high: Tensor
    bicubic: Tensor
    ours: Tensor
    without_attention: Tensor
    plain: Tensor | None


def read_picture(file: Path) -> Tensor:
    return torch.from_numpy(np.array(Image.open(file).convert("RGB")))


def as_input(picture: Tensor) -> Tensor:
    return picture.permute(2, 0, 1)[None].float() / 255


def upscale(model: Network, low: Tensor) -> Tensor:
    with torch.no_grad():
        output = model(as_input(low))[0]
    return output.permute(1, 2, 0).mul(255).round().clamp(0, 255).to(torch.uint8)


def score(picture: Tensor, truth: Tensor) -> metrics.Score:
    return metrics.score(metrics.luma(picture), metrics.luma(truth), border=UPSCALE)


def load_trained(options: dict, experiment: Path) -> Network:
    """The averaged weights of the finished training."""
    weights = experiment / "models" / "net_g_latest.pth"
    if not weights.is_file():
        raise DemoError(f"{weights} is missing; train first: cd {HERE} && sparse-sr train -opt train.yml")
    network = {"LCoAN": LCoAN, "SparseEDSR": EDSR}[options["network_g"]["type"]]
    model = network(**{name: value for name, value in options["network_g"].items() if name != "type"})
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True)["params_ema"])
    return model.eval()


def training_seconds(experiment: Path) -> int:
    """Duration according to the newest log of the experiment, validation included."""
    pattern = re.compile(r"Time consumed: (?:(\d+) days?, )?(\d+):(\d+):(\d+)")
    for log in sorted(experiment.glob("train_*.log"), reverse=True):
        found = pattern.findall(log.read_text())
        if found:
            days, hours, minutes, seconds = (int(number or 0) for number in found[-1])
            return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    raise DemoError(
        f"no log in {experiment} says how long the training took; it may have been interrupted. Train again"
    )


def results(model: LCoAN, plain: Network | None, data: Path) -> list[Result]:
    pictures = []
    for file in sorted((data / "val" / "HR").glob("*.png")):
        low = read_picture(data / "val" / f"LR_x{UPSCALE}" / file.name)
        ours = upscale(model, low)
        with attention_off(model):
            off = upscale(model, low)
        other = plain and upscale(plain, low)
        pictures.append(Result(file.stem, low, read_picture(file), imresize(low, scale=UPSCALE), ours, off, other))
    if not pictures:
        raise DemoError(f"no photographs in {data / 'val' / 'HR'}; cut them first: python {HERE / 'prepare.py'}")
    return pictures


def table(pictures: Sequence[Result]) -> dict[str, float]:
    """Print one line per photograph and return the means."""
    rows = {}
    for result in pictures:
        bicubic, ours = score(result.bicubic, result.high), score(result.ours, result.high)
        rows[result.name] = {
            "psnr_bicubic": bicubic.psnr,
            "psnr": ours.psnr,
            "ssim_bicubic": bicubic.ssim,
            "ssim": ours.ssim,
            "psnr_without_attention": score(result.without_attention, result.high).psnr,
        }
        if result.plain is not None:
            rows[result.name]["psnr_plain"] = score(result.plain, result.high).psnr
    means = {key: float(np.mean([row[key] for row in rows.values()])) for key in next(iter(rows.values()))}
    width = max(map(len, [*rows, "photograph"]))
    print(f"x{UPSCALE}, Y channel, {UPSCALE} pixels of border shaved; held-out photographs\n")
    print(f"{'':{width}}  ------ PSNR, dB ------  ----- SSIM -----")
    print(f"{'photograph':{width}}  bicubic   ours   gain  bicubic    ours")
    for name, row in [*rows.items(), ("mean", means)]:
        gain = row["psnr"] - row["psnr_bicubic"]
        print(
            f"{name:{width}}  {row['psnr_bicubic']:7.2f}  {row['psnr']:5.2f}  {gain:+5.2f}  "
            f"{row['ssim_bicubic']:7.4f}  {row['ssim']:6.4f}"
        )
    lost = means["psnr"] - means["psnr_without_attention"]
    print(f"\nwith the attention switched off: {means['psnr_without_attention']:.2f} dB, {lost:.2f} dB less")
    if "psnr_plain" in means:
        gain = round(means["psnr"] - means["psnr_plain"], 2) + 0  # no -0.00
        print(f"an EDSR of the same size, trained as long: {means['psnr_plain']:.2f} dB; ours {gain:+.2f} dB")
    return means


@dataclass(frozen=True)
class Detail:
    """A square cut out of a held-out photograph, in high-resolution pixels."""

    name: str
    top: int
    left: int
    size: int

    def of(self, picture: Tensor, scale: int = 1) -> Tensor:
        top, left, size = self.top // scale, self.left // scale, self.size // scale
        return picture[top : top + size, left : left + size]


DETAILS = (Detail("rocket", 348, 576, 64), Detail("astronaut", 336, 240, 64))
MAPPED = "chelsea"  # the picture beneath


def draw(model: LCoAN, pictures: Sequence[Result], file: Path) -> None:
    """Details of LR, bicubic, ours and HR side by side; beneath, the clusters over a photograph."""
    mpl.use("Agg")
    by_name = {result.name: result for result in pictures}
    # A run on other data shows what there is.
    details = [detail for detail in DETAILS if detail.name in by_name] or [
        Detail(pictures[0].name, 0, 0, min(64, *pictures[0].high.shape[:2]))
    ]
    rows = 3.0 * len(details)
    figure = plt.figure(figsize=(15, rows + 3.7), layout="constrained", facecolor="white")
    above, beneath = figure.subfigures(2, 1, height_ratios=(rows, 3.7))
    for row, detail in zip(
        above.subplots(len(details), 5, squeeze=False, width_ratios=(1.45, 1, 1, 1, 1)), details, strict=True
    ):
        draw_detail(row, by_name[detail.name], detail)
    draw_clusters(beneath.subplots(1, 3), model, by_name.get(MAPPED, pictures[0]))
    figure.savefig(file, dpi=100)
    plt.close(figure)


def draw_detail(axes: Sequence[Axes], result: Result, detail: Detail) -> None:
    whole, *parts = axes
    show(whole, result.high, f"{result.name}, held out from training")
    corner = (detail.left - 0.5, detail.top - 0.5)
    whole.add_patch(Rectangle(corner, detail.size, detail.size, fill=False, edgecolor="#ff2d2d", linewidth=2.5))
    pictures = {
        "low resolution": detail.of(result.low, UPSCALE),
        f"bicubic  {score(result.bicubic, result.high).psnr:.2f} dB": detail.of(result.bicubic),
        f"LCoAN-light  {score(result.ours, result.high).psnr:.2f} dB": detail.of(result.ours),
        "high resolution": detail.of(result.high),
    }
    for axis, (title, picture) in zip(parts, pictures.items(), strict=True):
        show(axis, picture, title, bold="LCoAN" in title)


def draw_clusters(axes: Sequence[Axes], model: LCoAN, result: Result) -> None:
    """The photograph, the clusters painted over it, and one of them alone."""
    state = next(iter(attention_states(model, as_input(result.low)).values()))
    clusters = state.pattern.assignment.view(result.low.shape[:2])
    pattern = next(module for module in model.modules() if isinstance(module, LSP))
    counts = torch.bincount(clusters.flatten(), minlength=len(pattern.centroids))
    light = result.low.double().mean(2, keepdim=True) / 255
    painted = similarity_palette(pattern.centroids, counts)[clusters].double() * (0.55 + 0.45 * light)
    kin = (clusters == telling_cluster(clusters, counts, light[..., 0]))[..., None]
    amber = torch.tensor([255.0, 170.0, 0.0], dtype=torch.float64)
    one = torch.where(kin, amber, 255 * (0.1 + 0.5 * light))
    show(axes[0], result.low, f"{result.name}, low resolution")
    show(
        axes[1], painted.round().to(torch.uint8), f"the {len(clusters.unique())} clusters that k-means learnt, over it"
    )
    show(axes[2], one.round().to(torch.uint8), "one of the clusters: pixels that look alike to the network")


def telling_cluster(clusters: Tensor, counts: Tensor, light: Tensor) -> int:
    """The cluster with the most contrast in its pixels, among those of half a percent of the picture and more."""
    contrast = torch.zeros_like(light)
    contrast[1:-1, 1:-1] = torch.hypot(light[2:, 1:-1] - light[:-2, 1:-1], light[1:-1, 2:] - light[1:-1, :-2])
    mean = torch.zeros(len(counts), dtype=light.dtype).index_add(0, clusters.flatten(), contrast.flatten()) / counts
    return int(torch.where(counts >= min(0.005 * clusters.numel(), float(counts.max())), mean, -1).argmax())


def show(axis: Axes, picture: Tensor, title: str, *, bold: bool = False) -> None:
    axis.imshow(picture.numpy(), interpolation="nearest")
    axis.set_title(title, fontsize=12, fontweight="bold" if bold else "normal")
    axis.set_axis_off()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--opt", type=Path, default=HERE / "train.yml", help="option file that was trained")
    parser.add_argument(
        "--plain",
        type=Path,
        default=HERE / "train_plain.yml",
        help="option file of the network without attention; compared with if it was trained",
    )
    parser.add_argument("--root", type=Path, default=HERE, help="folder with data/ and experiments/")
    parser.add_argument("-o", "--output", type=Path, default=HERE, help="folder for report.json and demo.png")
    arguments = parser.parse_args()
    options = yaml.safe_load(arguments.opt.read_text())
    experiment = arguments.root / "experiments" / options["name"]
    model = load_trained(options, experiment)
    plain = yaml.safe_load(arguments.plain.read_text())
    beside = arguments.root / "experiments" / plain["name"]
    pictures = results(model, load_trained(plain, beside) if beside.is_dir() else None, arguments.root / "data")
    seconds = training_seconds(experiment)
    report = {**{key: round(value, 4) for key, value in table(pictures).items()}, "seconds": seconds}
    print(f"trained for {seconds // 60}:{seconds % 60:02d} minutes\n")
    arguments.output.mkdir(parents=True, exist_ok=True)
    draw(model, pictures, arguments.output / "demo.png")
    (arguments.output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"written: {arguments.output / 'report.json'} and {arguments.output / 'demo.png'}")
    gain = report["psnr"] - report["psnr_bicubic"]
    if gain < REQUIRED_GAIN:
        raise DemoError(
            f"the gain over bicubic must be >= {REQUIRED_GAIN} dB, got {gain:.2f} dB; "
            "was training interrupted, or total_iter in train.yml lowered?"
        )


if __name__ == "__main__":
    try:
        main()
    except DemoError as error:
        sys.exit(f"error: {error}")
