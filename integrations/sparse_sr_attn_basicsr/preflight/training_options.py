"""Checks of `train`: losses, optimizers, the scheduler, precision and accumulation."""

import copy
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from sparse_sr_attn.config import fields
from sparse_sr_attn.registry import suggestion
from sparse_sr_attn_basicsr import option_names, registration, schema
from sparse_sr_attn_basicsr.distributed import on_cpu
from sparse_sr_attn_basicsr.preflight.findings import Findings, bases, nested, without_warnings
from sparse_sr_attn_basicsr.preflight.signatures import check_arguments, reason
from sparse_sr_attn_basicsr.randomness import undisturbed

OPTIMIZERS = {
    name: value
    for name, value in vars(torch.optim).items()
    if isinstance(value, type)
    and issubclass(value, torch.optim.Optimizer)
    and name not in ("Optimizer", "LBFGS", "SparseAdam", "Muon")
}
"""Optimizers of `torch.optim` for any network; the others need a closure, or special gradients or weights."""


def check(findings: Findings) -> None:
    """Check the section `train`."""
    train, name = findings.options.get("train"), findings.options.get("model_type")
    if not isinstance(train, dict):
        return
    for key in [key for key in train if str(key).startswith("optim_")]:
        if key == "optim_g" and not isinstance(train[key], Mapping):
            continue  # already reported for the section
        if (options := findings.mapping(f"train.{key}", train[key])) is not None:
            train[key] = options
            _check_optimizer(findings, f"train.{key}", options)
    if isinstance(train.get("scheduler"), Mapping):
        train["scheduler"] = dict(train["scheduler"])
        _check_scheduler(findings, train["scheduler"], train.get("total_iter"))
    _check_losses(findings, train)
    _check_accumulation(findings, train)
    _check_img_range(findings, train)
    _check_cuda_graph(findings, train)
    if train.get("autocast") == "fp16" and on_cpu(findings.options):
        findings.add("train.autocast", "must be bf16 or ~ on the CPU, got 'fp16', which needs a CUDA GPU")
    if "optim_d" in train and isinstance(parts := train.get("accumulate"), int) and parts > 1:
        findings.add("train.accumulate", f"must be 1 with {name}, whose discriminator sees whole batches, got {parts}")


def _check_img_range(findings: Findings, train: Mapping[str, Any]) -> None:
    network = nested(findings.options, "network_g") or {}
    kind, block = nested(network, "type"), nested(network, "block")
    plain = findings.networks.get(str(kind)) is registration.SparseEDSR and block is None
    if train.get("pretrain_img_range") is not None and not plain:
        findings.add(
            "train.pretrain_img_range",
            "must be ~ unless network_g is a SparseEDSR without block, whose biases can be scaled; "
            f"got {kind}{' with block' if block is not None else ''}",
        )


def _check_accumulation(findings: Findings, train: Mapping[str, Any]) -> None:
    """Check that a batch can be split into equal parts, and that the loss is an average over them."""
    parts, loss = train.get("accumulate"), train.get("pixel_opt")
    if not isinstance(parts, int) or parts <= 1:
        return
    batch = nested(findings.options, "datasets", "train", "batch_size_per_gpu")
    if isinstance(batch, int) and batch % parts:
        findings.add("train.accumulate", f"must divide batch_size_per_gpu {batch} into equal parts, got {parts}")
    if isinstance(loss, Mapping) and loss.get("reduction", "mean") != "mean":
        findings.add(
            "train.pixel_opt.reduction",
            f"must be mean with accumulate {parts}, which averages over the parts, got {loss['reduction']!r}",
        )


def _check_cuda_graph(findings: Findings, train: Mapping[str, Any]) -> None:
    """Check that a GPU trains on whole batches; the model checks that it is one GPU."""
    if train.get("cuda_graph") is not True:
        return
    if on_cpu(findings.options):
        findings.add("train.cuda_graph", "must be false on the CPU, got true, which needs a CUDA GPU")
    if isinstance(parts := train.get("accumulate"), int) and parts > 1:
        findings.add("train.accumulate", f"must be 1 with cuda_graph: true, got {parts}")


def _check_losses(findings: Findings, train: dict[str, Any]) -> None:
    """Check that the model uses every loss, and that each can be built."""
    name = findings.options.get("model_type")
    known = sorted(key for key in option_names.names_in(*bases(findings.model)) if key.endswith("_opt"))
    given = [key for key in train if str(key).endswith("_opt") and (train[key] or train[key] == {})]
    for key in given:
        path = f"train.{key}"
        if findings.model is not None and known and key not in known and key not in schema.ONLY_OURS["train"]:
            findings.add(path, f"unknown to {name}{suggestion(key, known)}")
        elif (options := findings.mapping(path, train[key])) is not None:
            train[key] = options
            _check_loss(findings, path, options)
    if "gan_opt" not in known and not {"pixel_opt", "perceptual_opt"} & set(given) and set(given) <= {"fft_opt"}:
        findings.add("train.pixel_opt", "missing; training needs a loss, e.g. {type: L1Loss}")


def _check_loss(findings: Findings, path: str, options: dict[str, Any]) -> None:
    before = len(findings.problems)
    build = findings.by_type("LOSS", path, options, "the loss, e.g. L1Loss")
    if build is None:
        return
    rest = {name: value for name, value in options.items() if name != "type"}
    check_arguments(findings.problems, build, rest, path)
    options |= rest
    if len(findings.problems) > before or build.__name__ == "PerceptualLoss":  # which may download weights
        return
    try:
        with without_warnings(), undisturbed():
            build(**copy.deepcopy(rest))
    except Exception as error:  # user code can raise anything
        findings.add(path, f"{build.__name__} rejects these options: {reason(error)}")


def _check_optimizer(findings: Findings, path: str, options: dict[str, Any]) -> None:
    before = len(findings.problems)
    name = findings.section(schema.Optimizer, options, path, whole=False).get("type")
    if name is None:
        return
    if name in OPTIMIZERS:
        if len(findings.problems) == before:
            _try_to_build(findings, path, OPTIMIZERS[name], [torch.nn.Parameter(torch.zeros(1))], options)
    elif findings.is_ours():  # other models may know optimizers of their own
        findings.add(f"{path}.type", f"there is no optimizer {name!r}{suggestion(name, sorted(OPTIMIZERS))}")


def _check_scheduler(findings: Findings, options: dict[str, Any], total_iter: object) -> None:
    path, before = "train.scheduler", len(findings.problems)
    right = findings.section(schema.Scheduler, options, path, whole=False)
    name = right.get("type")
    if name is None:
        return
    schedulers = vars(importlib.import_module("basicsr.models.lr_scheduler"))
    known = {key: value for key, value in schedulers.items() if key.endswith("LR") and not key.startswith("_")}
    known["MultiStepLR"] = known["MultiStepRestartLR"]
    covered = sum(right.get("periods", ()))
    if name not in known:
        findings.add(f"{path}.type", f"BasicSR has no scheduler {name!r}{suggestion(name, sorted(known))}")
    elif name == "CosineAnnealingRestartLR" and isinstance(total_iter, int) and covered < total_iter - 1:
        findings.add(
            f"{path}.periods",
            f"must add up to total_iter {total_iter:,}, got {covered:,.0f}: BasicSR fails after the last",
        )
    elif len(findings.problems) == before:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        _try_to_build(findings, path, known[name], optimizer, options)


def _try_to_build(
    findings: Findings, path: str, build: Callable[..., object], first: object, options: dict[str, Any]
) -> None:
    """Check the options of an optimizer or a scheduler by its signature, then by building it."""
    before = len(findings.problems)
    rest = {name: value for name, value in options.items() if name != "type"}
    taken = (next(iter(inspect.signature(build).parameters)), "last_epoch")
    check_arguments(findings.problems, build, rest, path, taken)
    options |= rest
    if len(findings.problems) == before:
        try:
            build(first, **rest)
        except Exception as error:  # PyTorch unpacks tuples without a check of their length
            known = [name for name in fields(build) if name not in taken]
            findings.add(path, f"{options['type']} rejects these options: {error} (known: {', '.join(known)})")
