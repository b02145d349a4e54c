"""Which form of an operation runs where."""

import importlib.util
import os
from typing import Literal, get_args

import torch

from sparse_sr_attn.errors import FormError
from sparse_sr_attn.functional._torch import is_transformed, needs_plain_code
from sparse_sr_attn.functional.flops import teach_flop_counters

Form = Literal["auto", "oneshot", "tiles", "flex", "triton"]
"""How cluster attention is carried out."""

_PLAIN = "forward-mode derivatives and transforms of torch.func (vmap, grad, jacrev, ...) need"

HAS_TRITON = importlib.util.find_spec("triton") is not None


def resolve_form(form: Form, device: torch.device | str) -> Form:
    """Return the form of cluster attention that runs on a device.

    Args:
        form: "oneshot", "tiles", "flex" or "triton", which stay as they are if the device can run them, or "auto":
            tiles on the CPU; triton on CUDA devices of compute capability 8.0 and more, if triton is installed;
            oneshot everywhere else, for export, for forward-mode derivatives and in transforms of `torch.func`.
        device: where the tensors are.

    Returns:
        Any form but "auto".

    Raises:
        FormError: `form` is none of these, or was asked for by name and cannot run there.
    """
    teach_flop_counters()
    if form not in get_args(Form):
        raise FormError(f"form must be one of {', '.join(map(repr, get_args(Form)))}, got {form!r}")
    device = torch.device(device)
    if form == "auto":
        return _best_form(device)
    if form != "oneshot" and is_transformed():
        raise FormError(f"{_PLAIN} form 'oneshot' or 'auto', got {form!r}")
    if form == "triton" and not HAS_TRITON:
        raise FormError("form 'triton' needs the package triton, which is not installed; 'oneshot' works on any device")
    if form == "triton" and device.type != "cuda" and not interpreting():
        raise FormError(
            f"form 'triton' runs on GPUs, got tensors on {device.type!r}; 'oneshot' works on any device, 'tiles' is "
            "made for the CPU (and TRITON_INTERPRET=1, set before Python starts, runs the kernels there, slowly)"
        )
    if form == "flex" and device.type not in ("cpu", "cuda"):
        raise FormError(f"form 'flex' runs on 'cpu' and 'cuda', got tensors on {device.type!r}; 'oneshot' works there")
    return form


def uses_operator(form: str, operator: str) -> bool:
    """Return whether an operation with two forms, "oneshot" and one that is an operator of ours, runs as the latter.

    Args:
        form: "oneshot", the name of the other, or "auto": the other but where `resolve_form` takes oneshot, too.
        operator: what the other form is called.

    Raises:
        FormError: `form` is none of these, or was asked for by name and cannot run.
    """
    teach_flop_counters()
    if form not in ("auto", "oneshot", operator):
        raise FormError(f"form must be 'auto', 'oneshot' or {operator!r}, got {form!r}")
    plain = needs_plain_code()
    if form == operator and is_transformed():
        raise FormError(f"{_PLAIN} form 'oneshot' or 'auto', got {form!r}")
    return form == operator or (form == "auto" and not plain)


def _best_form(device: torch.device) -> Form:
    if needs_plain_code():
        return "oneshot"
    if device.type == "cpu":
        return "tiles"
    if device.type == "cuda" and HAS_TRITON and torch.cuda.get_device_capability(device) >= (8, 0):
        return "triton"
    return "oneshot"


def interpreting() -> bool:
    """Return whether triton, as the process was started, runs kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")
