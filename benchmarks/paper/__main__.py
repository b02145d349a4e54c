"""`python -m benchmarks.paper`: figures and ablations of the LCoA and ELAN papers, on your own images."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import make_parser, run_command
from benchmarks.paper.experiment import Costing, costed, keep, kept, trained
from benchmarks.paper.figures import FIGURES, SCALES, Figure, Scale
from benchmarks.paper.pictures import read_pairs
from benchmarks.paper.report import fill, markdown, section, write_plot
from benchmarks.paper.training import Budget, Trainer
from sparse_sr_attn.cli.common import (
    UsageError,
    add_device,
    find_device,
    images_in,
    name,
    require,
    say,
    show,
)
from sparse_sr_attn.config import read
from sparse_sr_attn.data.atomic import atomic_write
from sparse_sr_attn.errors import ConfigError, SparseSRError

DESCRIPTION = """\
Repeat a comparison of the papers: train all networks with the same seeds, patches and steps, measure their cost, and
write a table and a plot.

examples:
  python -m benchmarks.paper lcoa-2                                         memory and time; needs no images
  python -m benchmarks.paper lcoa-3 elan-lfe --data DIV2K/HR --val Set5/HR  two comparisons
  python -m benchmarks.paper all --data A B --val C D --iterations 2000
  python -m benchmarks.paper all --data A --val C --budget full --device cuda
  python -m benchmarks.paper page --page paper.md                           write the stored results into a page

Finished training runs are stored in the output folder: the same command resumes where it was interrupted, or adds
seeds."""
EPILOG = "figures:\n" + "\n".join(
    f"  {label:<14}{(build.__doc__ or '').partition(chr(10))[0]}" for label, build in FIGURES.items()
)

_DEFAULT = SCALES["small"].budget
_NO_TRAINING = "growth"
_OUTPUT_HELP = "folder for results and finished training runs (default: %(default)s)"
_BUDGET_HELP = "size of networks and length of training: small, minutes on two cores (default); full, hours on a GPU"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add = parser.add_argument
    add("figures", nargs="+", choices=[*FIGURES, "all", "page"], metavar="FIGURE", help="see below; or all; or page")
    add("--data", nargs="+", type=Path, default=[], metavar="FOLDER", help="images for training")
    add("--val", nargs="+", type=Path, default=[], metavar="FOLDER", help="images for validation")
    add("-o", "--output", type=Path, default=Path("paper"), metavar="FOLDER", help=_OUTPUT_HELP)
    add("--budget", choices=SCALES, default="small", help=_BUDGET_HELP)
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="one training run each (default: 0 1 2)")
    add("--iterations", type=int, metavar="N", help=f"steps of each training run (small: {_DEFAULT.iterations})")
    add("--batch", type=int, metavar="N", help=f"patches per step (small: {_DEFAULT.batch})")
    add("--patch", type=int, metavar="N", help=f"side of a patch in pixels of the input (small: {_DEFAULT.patch})")
    add("--learning-rate", type=float, metavar="X", help=f"initial one, of Adam (small: {_DEFAULT.learning_rate:g})")
    add_device(parser)
    add("--threads", type=int, default=1, metavar="N", help="threads of torch on the CPU (default: 1)")
    add("--costs", choices=["all", "memory", "none"], default="all", help="time and memory, memory only, or neither")
    add("--page", type=Path, metavar="FILE", help="page to fill; plots and records go to assets/ next to it")


def run(arguments: argparse.Namespace) -> int:
    """Do what is asked; return the exit status.

    Raises:
        UsageError: the arguments are wrong.
        SparseSRError: pictures cannot be read, a training fails, or a file cannot be written.
    """
    require("matplotlib", "PIL", "numpy")
    scale = _scale(arguments)
    try:
        if "page" in arguments.figures:
            return _page(arguments, scale)
        return _figures(arguments, scale)
    except OSError as error:
        raise SparseSRError(f"cannot write: {error}") from error


def _figures(arguments: argparse.Namespace, scale: Scale) -> int:
    chosen = list(FIGURES) if "all" in arguments.figures else list(dict.fromkeys(arguments.figures))
    figures = {label: FIGURES[label](scale) for label in chosen}
    if arguments.costs == "none" and (idle := [label for label in chosen if figures[label].kind == _NO_TRAINING]):
        raise UsageError(f"{idle[0]} measures costs, which --costs none switches off")
    torch.set_num_threads(arguments.threads)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else some builds of torch tell of each start of its profiler
    device = find_device(arguments.device)
    trainer = None
    if any(figure.kind != _NO_TRAINING for figure in figures.values()):
        trainer = _trainer(arguments, scale, device)
        for seed in arguments.seeds:  # one after the other for all figures: an interruption leaves complete seeds
            for label, figure in figures.items():
                if figure.kind != _NO_TRAINING:
                    trained(figure, trainer, [seed], partial(_progress, label))
    for label, figure in figures.items():
        document = kept(arguments.output / f"{label}.json") or {}
        if trainer is not None and figure.kind != _NO_TRAINING:
            document |= trained(figure, trainer, arguments.seeds)
        if arguments.costs != "none":
            costing = Costing(device, times=arguments.costs == "all")
            document |= costed(figure, scale, costing, partial(_progress, label))
        keep(document, arguments.output / f"{label}.json")
        _progress()
        show(f"\n## {figure.title}\n\n{markdown(figure, document)}")
        write_plot(figure, document, arguments.output / f"{label}.png")
        show(f"\n{name(arguments.output / f'{label}.png')}")
    return 0


def _trainer(arguments: argparse.Namespace, scale: Scale, device: torch.device) -> Trainer:
    for option, folders in (("--data", arguments.data), ("--val", arguments.val)):
        if not folders:
            raise UsageError(f"{option} must name a folder of images, for all figures except lcoa-2")
    budget = scale.budget
    _progress("images", "reading")
    return Trainer(
        budget,
        read_pairs(_images(arguments.data), budget.upscale, smallest=budget.patch),
        read_pairs(_images(arguments.val), budget.upscale, smallest=16, crop=budget.crop),
        arguments.output / "trainings",
        device,
    )


def _images(folders: list[Path]) -> list[Path]:
    return [path for folder in folders for path in images_in(folder)]


def _scale(arguments: argparse.Namespace) -> Scale:
    """Return the scale of `--budget`, with what the arguments change in its budget."""
    scale = SCALES[arguments.budget]
    given = {key: getattr(arguments, key) for key in ("iterations", "batch", "patch", "learning_rate")}
    try:
        budget = read(Budget, {**asdict(scale.budget), **{k: v for k, v in given.items() if v is not None}})
    except ConfigError as error:
        raise UsageError("\n".join(f"--{problem}".replace("_", "-", 1) for problem in error.problems)) from error
    if arguments.threads < 1:
        raise UsageError(f"--threads must be >= 1, got {arguments.threads}")
    return replace(scale, budget=Budget(**budget))


def _page(arguments: argparse.Namespace, scale: Scale) -> int:
    """Write the stored results of each figure between its marks in the page, and its plot and record next to it."""
    page = arguments.page
    if arguments.figures != ["page"] or page is None:
        raise UsageError("`python -m benchmarks.paper page` needs --page FILE and no figure")
    if not page.is_file():
        raise UsageError(f"--page must be an existing file, got {name(page)}")
    text = page.read_text(encoding="utf-8")
    for label, build in FIGURES.items():
        document: Any = kept(arguments.output / f"{label}.json")
        if document is None:
            say(f"{label}: no results in {name(arguments.output)}; its section is unchanged")
            continue
        figure: Figure = build(scale)
        beside = page.parent / "assets" / f"paper-{label}"
        write_plot(figure, document, beside.with_suffix(".png"))
        keep(document, beside.with_suffix(".json"))
        text = fill(text, label, section(figure, label, document))
    with atomic_write(page) as stream:
        stream.write(text.encode())
    show(name(page))
    return 0


def _progress(label: str = "", text: str = "") -> None:
    """Show the progress: on one line of a terminal, otherwise as separate lines."""
    line = f"{label}: {text}" if label else ""
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
    elif line:
        print(line, file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    return make_parser("paper", DESCRIPTION, EPILOG, add_arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    return run_command(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
