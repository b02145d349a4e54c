"""Checks of the top level of an option file, its sections as a whole, the machine and the weights."""

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from sparse_sr_attn.config import shown
from sparse_sr_attn_basicsr import option_names, schema
from sparse_sr_attn_basicsr.distributed import on_cpu
from sparse_sr_attn_basicsr.preflight.findings import MODEL, Findings, bases, nested, similar_file

_SHORTEST_TRAINING = 100  # iterations; fewer are a trial
_LARGEST_SHARE_OF_START = 0.05


def check(findings: Findings, launcher: str) -> None:
    """Check the top level of the file and the general options of each section."""
    options = findings.options
    general = findings.section(schema.Training if findings.training else schema.Testing, options, "")
    findings.scale = general.get("scale")
    if "model_type" in general:
        findings.by_name("MODEL", "model_type", general["model_type"])
    name = general.get("name")
    if name is not None and (name.strip() in ("", ".", "..") or {"/", "\\", "\0"} & set(name) or len(name) > 200):
        findings.add("name", f"must be fit for the name of a folder, got {shown(name)}")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if isinstance(num_gpu := general.get("num_gpu"), int) and num_gpu > gpus:
        findings.add(
            "num_gpu",
            f"must be at most {gpus}, the number of CUDA GPUs that this PyTorch sees, got {num_gpu}; 'auto' uses all, "
            "0 is the CPU",
        )
    if launcher != "none":
        _check_launcher(findings, launcher)
    declared: dict[str, type] = {
        "path": schema.Path,
        "dist_params": schema.DistParams,
        "val": schema.ValidationInTraining if findings.training else schema.ValidationInTesting,
    }
    if findings.training:
        declared |= {"train": schema.Train, "logger": schema.Logger}
    for key, cls in declared.items():
        if isinstance(options.get(key), Mapping):
            options[key] = dict(options[key])
            findings.section(cls, options[key], key)
    options["path"] = options.get("path") or {}
    if findings.training and isinstance(options.get("logger"), dict):
        _check_logger(findings)
    if findings.training and isinstance(options.get("train"), dict):
        _check_ema(findings)


def _check_launcher(findings: Findings, launcher: str) -> None:
    path = f"--launcher {launcher}"
    if launcher == "pytorch" and "RANK" not in os.environ:
        findings.add(
            path, "needs the environment variables of torchrun: torchrun --nproc_per_node 2 -m sparse_sr_attn train ..."
        )
    if findings.training and findings.options.get("manual_seed") is None:
        findings.remarks.append(
            "manual_seed: with --launcher and without a seed, each process draws its own, and a resumed run will not "
            "be exact"
        )
    if on_cpu(findings.options) and findings.model is not None and not findings.is_ours():
        name = findings.options.get("model_type")
        findings.add("model_type", f"must be {MODEL} for several processes on the CPU, got {name!r}")


def _check_logger(findings: Findings) -> None:
    logger = findings.options["logger"]
    logger.setdefault("use_tb_logger", False)
    if logger["use_tb_logger"] is True and importlib.util.find_spec("tensorboard") is None:
        findings.add("logger.use_tb_logger", "needs tensorboard: pip install tensorboard, or write false")
    if nested(logger, "wandb", "project") is not None and "debug" not in str(findings.options.get("name")):
        if logger["use_tb_logger"] is not True:
            findings.add("logger.use_tb_logger", "must be true with logger.wandb.project: wandb follows tensorboard")
        if importlib.util.find_spec("wandb") is None:
            findings.add("logger.wandb.project", "needs wandb: pip install wandb, or write project: ~")


def _check_ema(findings: Findings) -> None:
    train = findings.options["train"]
    decay, iterations = train.get("ema_decay"), train.get("total_iter")
    if not isinstance(decay, float) or not isinstance(iterations, int) or iterations < _SHORTEST_TRAINING:
        return
    if (kept := decay**iterations) > _LARGEST_SHARE_OF_START:
        findings.remarks.append(
            f"train.ema_decay: the averaged weights still contain {kept:.0%} of those at the start after {iterations} "
            f"iterations, got {decay}; {0.01 ** (1 / iterations):.4f} leaves 1%"
        )


def check_model(findings: Findings) -> None:
    """Check that the model has all required options, and none that it would ignore."""
    name, model = findings.options.get("model_type"), findings.model
    if model is None:
        return
    if findings.training and "gan_opt" in option_names.names_in(*bases(model)):
        for path in ("network_d", "train.optim_d", "train.gan_opt"):
            if nested(findings.options, *path.split(".")) is None:
                findings.add(path, f"missing; {name} needs it")
    if findings.is_ours():
        return
    known = option_names.names_in(*bases(model))
    for section, names in schema.ONLY_OURS.items():
        for option in names:
            if nested(findings.options, section, option) is not None and option not in known:
                findings.add(f"{section}.{option}", f"unknown to {name}; model_type: {findings.counterpart()} has it")


def check_weights(findings: Findings) -> None:
    """Check that weights and states exist and have a format that the model reads."""
    path = findings.options["path"]
    if not isinstance(path, Mapping):
        return
    for key, value in path.items():
        if key.startswith(("pretrain_network", "resume_state")) and isinstance(value, str):
            file = Path(value).expanduser()
            if not file.is_file():
                findings.add(f"path.{key}", f"there is no file {value!r}{similar_file(file)}")
            elif file.suffix == ".safetensors" and not findings.is_ours():
                findings.add(
                    f"path.{key}",
                    f"{findings.options.get('model_type')} reads files of torch.save only, got {value!r}; model_type: "
                    f"{MODEL} reads .safetensors, and `sparse-sr convert` writes .pth",
                )
    if not findings.training and not path.get("pretrain_network_g"):
        findings.remarks.append("path.pretrain_network_g: nothing given, so an untrained network is tested")
