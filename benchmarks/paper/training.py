"""Training for comparison: every variant gets the same patches, the same start and the same number of steps."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.paper.pictures import Pair, as_input, as_picture, digest, patches
from sparse_sr_attn.backbones import EDSR, ELAN, LCoAN
from sparse_sr_attn.backbones.base import Network
from sparse_sr_attn.blocks.upsample import Upscale
from sparse_sr_attn.config import NonNegative, Positive, PositiveInt
from sparse_sr_attn.data import metrics as evaluation
from sparse_sr_attn.data.atomic import write_json
from sparse_sr_attn.errors import TrainingError


@dataclass(frozen=True)
class Budget:
    """How long and how all variants are trained.

    Attributes:
        upscale: factor.
        iterations: steps of Adam on the L1 loss.
        batch: patches a step.
        patch: side of a patch in pixels of the input.
        learning_rate: at first; it falls to 0 along half a cosine.
        warmup: share of the steps during which the learning rate rises from 0.
        crop: side up to which validation pictures are taken, the middle of them, in pixels of the input; `None` for
            whole ones.
    """

    upscale: Upscale = 2
    iterations: PositiveInt = 400
    batch: PositiveInt = 4
    patch: PositiveInt = 32
    learning_rate: Positive = 1e-3
    warmup: NonNegative = 0.05
    crop: PositiveInt | None = 64


@dataclass(frozen=True)
class Variant:
    """One of the networks that are compared.

    Attributes:
        network: what builds it.
        options: of the network, but for `upscale`.
        changes: what is done to the network afterwards, where the library has no option for it; a function of it.
        look: what else is recorded of the trained network, from the validation pictures.
    """

    network: type[EDSR] | type[ELAN] | type[LCoAN]
    options: Mapping[str, Any] = field(default_factory=dict)
    changes: Callable[[Network], None] | None = None
    look: Callable[[Network, Sequence[Pair]], Any] | None = None

    def build(self, upscale: Upscale, seed: int = 0) -> Network:
        """Return the network; one seed gives variants the same weights wherever they have the same layers."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: Network = self.network(**self.options, upscale=upscale)
            if self.changes is not None:
                self.changes(model)
        return model

    def described(self) -> dict[str, Any]:
        """Return all that tells this variant from others, as JSON can write it."""
        return {
            "network": self.network.__name__,
            "options": dict(self.options),
            "changes": _text(self.changes),
            "look": _text(self.look),
        }


@dataclass(frozen=True)
class Result:
    """What a training came to.

    Attributes:
        psnr: in dB on luma, the mean over validation pictures.
        each: by picture.
        parameters: that learn.
        seconds: CPU time of the training.
        seen: what `Variant.look` returned.
    """

    psnr: float
    each: dict[str, float]
    parameters: int
    seconds: float
    seen: Any = None


@dataclass(frozen=True, eq=False)
class Trainer:
    """Trains variants one by one, and keeps the result of each, so that an interrupted run resumes.

    Attributes:
        budget: the same for all.
        train: pairs to learn from.
        validation: pairs to be judged by.
        folder: where results are kept, in a file for each variant and seed; those of other budgets and other pictures
            may be there, too.
        device: where it computes.
    """

    budget: Budget
    train: Sequence[Pair]
    validation: Sequence[Pair]
    folder: Path
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def result(self, variant: Variant, seed: int) -> Result:
        """Return the result of a variant and seed, trained now if it is not kept from before.

        Raises:
            TrainingError: the loss is not finite any more.
        """
        kept = self.kept(variant, seed)
        if kept is not None:
            return kept
        model = variant.build(self.budget.upscale, seed).to(self.device)
        start = time.process_time()
        fit(model, self.train, self.budget, seed, self.device)
        seconds = time.process_time() - start
        each = validate(model, self.validation, self.budget.upscale, self.device)
        result = Result(
            psnr=sum(each.values()) / len(each),
            each=each,
            parameters=count_parameters(model),
            seconds=seconds,
            seen=None if variant.look is None else variant.look(model, self.validation),
        )
        file = self._file(variant, seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"variant": variant.described(), "seed": seed, **self._made(), "result": asdict(result)})
        return result

    def kept(self, variant: Variant, seed: int) -> Result | None:
        """Return the result that is kept of a variant and seed, if there is one."""
        file = self._file(variant, seed)
        return Result(**json.loads(file.read_text())["result"]) if file.exists() else None

    def _file(self, variant: Variant, seed: int) -> Path:
        return self.folder / f"{_key({'variant': variant.described(), **self._made()})}-{seed}.json"

    def _made(self) -> dict[str, Any]:
        """Return how results are made here, whatever the variant."""
        return {"budget": asdict(self.budget), **self._digests}

    @cached_property
    def _digests(self) -> dict[str, str]:
        return {"train": digest(self.train), "validation": digest(self.validation)}


def _key(document: Mapping[str, Any]) -> str:
    """Return a name that other documents do not have."""
    return sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]


def count_parameters(model: nn.Module) -> int:
    """Return how many numbers of a network learn."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def fit(model: nn.Module, pairs: Sequence[Pair], budget: Budget, seed: int, device: torch.device) -> None:
    """Train a network in place.

    Raises:
        TrainingError: the loss is not finite any more.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=budget.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, budget))
    stream = patches(pairs, side=budget.patch, batch=budget.batch, seed=seed)
    model.train()
    for step in range(budget.iterations):
        low, high = next(stream)
        loss = F.l1_loss(model(low.to(device)), high.to(device))
        if not math.isfinite(loss.item()):
            raise TrainingError(f"the loss is {loss.item()} at step {step}; a smaller learning rate may help")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


def rate(step: int, budget: Budget) -> float:
    """Return the learning rate of a step, as a share of the largest."""
    rising = math.ceil(budget.warmup * budget.iterations)
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, budget.iterations - rising)))


def validate(model: nn.Module, pairs: Sequence[Pair], upscale: int, device: torch.device) -> dict[str, float]:
    """Return the PSNR of each picture in dB: on luma, as BasicSR counts, `upscale` pixels of border left out."""
    model.eval()
    found = {}
    with torch.no_grad():
        for pair in pairs:
            output = as_picture(model(as_input(pair.low)[None].to(device))[0].cpu())
            found[pair.name] = evaluation.psnr(evaluation.luma(output), evaluation.luma(pair.high), border=upscale)
    return found


def _text(function: Callable[..., Any] | None) -> str | None:
    """Return the name of a function, and what it is bound to."""
    if function is None:
        return None
    bound = getattr(function, "keywords", {})
    return " ".join([getattr(function, "func", function).__name__, *(f"{k}={v!r}" for k, v in bound.items())])
