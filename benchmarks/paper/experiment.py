"""One figure from beginning to end: trainings, costs, and a document that holds all that was found."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.paper.cost import PASSES, Body, costs
from benchmarks.paper.figures import Figure, Scale
from benchmarks.paper.pictures import Pair
from benchmarks.paper.training import Budget, Trainer, count_parameters
from benchmarks.speed.run import environment, features, images
from sparse_sr_attn.data import metrics as evaluation
from sparse_sr_attn.data.atomic import write_json
from sparse_sr_attn.data.imresize import imresize

Progress = Callable[[str], None]

_ROUNDS = 5
_LIMIT = 20.0


@dataclass(frozen=True)
class Costing:
    """How costs are measured.

    Attributes:
        device: where.
        times: whether times are measured; memory always is.
    """

    device: torch.device
    times: bool = True


def trained(
    figure: Figure, trainer: Trainer, seeds: Sequence[int], progress: Progress = lambda text: None
) -> dict[str, Any]:
    """Train all variants with one seed, then with the next; return what came of it.

    Raises:
        TrainingError: a loss is not finite any more.
    """
    found: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in figure.variants}
    for seed in seeds:
        for number, (name, variant) in enumerate(figure.variants.items(), 1):
            progress(f"training {number} of {len(figure.variants)} with seed {seed}: {name}")
            result = trainer.result(variant, seed)
            found[name][seed] = {"psnr": result.psnr, "seconds": result.seconds, "seen": result.seen}
    return {
        "budget": asdict(trainer.budget),
        "seeds": list(seeds),
        "pictures": {"train": len(trainer.train), "validation": len(trainer.validation)},
        "bicubic": bicubic(trainer.validation, trainer.budget.upscale),
        "results": {name: {str(seed): found[name][seed] for seed in seeds} for name in found},
    }


def costed(figure: Figure, scale: Scale, costing: Costing, progress: Progress) -> dict[str, Any]:
    """Measure all variants in inference and a step of training: networks on images, or bodies on maps of all sizes."""
    growing = figure.kind == "growth"
    budget = scale.budget
    models: dict[str, Any] = {name: variant.build(budget.upscale) for name, variant in figure.variants.items()}
    parameters = {name: count_parameters(model) for name, model in models.items()}
    measured: dict[str, Any] = {}
    for passed in PASSES:
        infers = passed == "forward"
        batch = 1 if infers or growing else budget.batch
        if growing:
            sides = scale.sides if infers else scale.step_sides
        else:
            sides = (scale.cost_side if infers else budget.patch,)
        left = {name: (Body(model) if growing else model).to(costing.device) for name, model in models.items()}
        measured[passed] = {}
        for side in sides:
            progress(f"measuring {passed} at {side}x{side}")
            x = features(batch, figure.channels, side) if growing else images(batch, side)
            found = costs(
                left,
                x.to(costing.device),
                passed=passed,
                device=costing.device,
                rounds=_ROUNDS,
                limit=_LIMIT,
                times=costing.times,
            )
            left = {name: left[name] for name in found}  # who takes too long here does so at larger sizes
            measured[passed][str(side)] = {
                "batch": batch,
                "costs": {name: asdict(cost) for name, cost in found.items()},
            }
    return {
        "environment": environment(costing.device),
        "upscale": budget.upscale,
        "parameters": parameters,
        "passes": measured,
    }


def bicubic(pairs: Sequence[Pair], upscale: int) -> float:
    """Return the PSNR that enlarging the same low-resolution pictures by bicubic interpolation has, in dB."""
    each = []
    for pair in pairs:
        output = imresize(pair.low, size=(pair.high.shape[0], pair.high.shape[1]))
        each.append(evaluation.psnr(evaluation.luma(output), evaluation.luma(pair.high), border=upscale))
    return sum(each) / len(each)


def kept(file: Path) -> Any:
    """Return the document that a file holds, `None` if there is no such file."""
    return json.loads(file.read_text()) if file.exists() else None


def keep(document: Any, file: Path) -> None:
    """Write a document, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, document)


def described(budget: Budget) -> str:
    """Return a budget in words."""
    judged = (
        "whole validation images"
        if budget.crop is None
        else (f"the centre of each validation image, up to {budget.crop}×{budget.crop} pixels of the input")
    )
    return (
        f"×{budget.upscale}, {budget.iterations:,} iterations of Adam (learning rate {budget.learning_rate:g}, half a "
        f"cosine) on the L1 loss, {budget.batch} patches of {budget.patch}×{budget.patch} pixels; PSNR of luma on "
        f"{judged}"
    )
