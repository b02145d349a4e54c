"""The choice of a backend for an operation."""

import importlib.util
import os
from typing import Literal, get_args

import torch

from sparse_sr_attn.errors import BackendError
from sparse_sr_attn.functional._torch import is_transformed, needs_plain_code
from sparse_sr_attn.functional.flops import teach_flop_counters

Backend = Literal["auto", "eager", "tiles", "flex", "sdpa", "triton"]
"""How cluster attention is computed."""

_PLAIN = "forward-mode derivatives and transforms of torch.func (vmap, grad, jacrev, ...) need"

HAS_TRITON = importlib.util.find_spec("triton") is not None


def resolve_backend(backend: Backend, device: torch.device | str) -> Backend:
    """Return the backend of cluster attention that runs on a device.

    Args:
        backend: "eager", "tiles", "flex", "sdpa" or "triton" to require that one; "auto" for tiles on the CPU, on CUDA
            devices triton if it is installed and their compute capability is 8.0 or higher and sdpa otherwise, and
            eager everywhere else, for export, for forward-mode derivatives and in transforms of `torch.func`.
        device: the device of the tensors.

    Returns:
        A backend other than "auto".

    Raises:
        BackendError: `backend` is unknown, or was requested by name and cannot run on `device`.

    Examples:
        >>> resolve_backend("auto", "cpu")
        'tiles'
        >>> resolve_backend("eager", "cuda")
        'eager'
    """
    teach_flop_counters()
    if backend not in get_args(Backend):
        raise BackendError(f"backend must be one of {', '.join(map(repr, get_args(Backend)))}, got {backend!r}")
    device = torch.device(device)
    if backend == "auto":
        return _best_backend(device)
    if backend != "eager" and is_transformed():
        raise BackendError(f"{_PLAIN} backend 'eager' or 'auto', got {backend!r}")
    if backend == "triton" and not HAS_TRITON:
        raise BackendError(
            "backend 'triton' needs the package triton, which is not installed; 'eager' works on any device"
        )
    if backend == "triton" and device.type != "cuda" and not interpreting():
        raise BackendError(
            f"backend 'triton' runs on GPUs, got tensors on {device.type!r}; 'eager' works on any device, 'tiles' is "
            "made for the CPU (and TRITON_INTERPRET=1, set before Python starts, runs the kernels there, slowly)"
        )
    if backend == "flex" and device.type not in ("cpu", "cuda"):
        raise BackendError(
            f"backend 'flex' runs on 'cpu' and 'cuda', got tensors on {device.type!r}; 'eager' works there"
        )
    return backend


def uses_operator(backend: str, operator: str) -> bool:
    """Return whether an operation with two backends, eager code and a custom operator, uses the operator.

    Args:
        backend: "eager", the name of the operator, or "auto" for the operator wherever it can run.
        operator: the name of the operator's backend.

    Raises:
        BackendError: `backend` is unknown, or was requested by name and cannot run.

    Examples:
        >>> uses_operator("auto", "tiles"), uses_operator("eager", "tiles")
        (True, False)
    """
    teach_flop_counters()
    if backend not in ("auto", "eager", operator):
        raise BackendError(f"backend must be 'auto', 'eager' or {operator!r}, got {backend!r}")
    plain = needs_plain_code()
    if backend == operator and is_transformed():
        raise BackendError(f"{_PLAIN} backend 'eager' or 'auto', got {backend!r}")
    return backend == operator or (backend == "auto" and not plain)


def _best_backend(device: torch.device) -> Backend:
    if needs_plain_code():
        return "eager"
    if device.type == "cpu":
        return "tiles"
    if device.type == "cuda":
        return "triton" if HAS_TRITON and torch.cuda.get_device_capability(device) >= (8, 0) else "sdpa"
    return "eager"


def runs_kernels(device: torch.device) -> bool:
    """Return whether operations run as Triton kernels on a device now, if they have one.

    Not in code that is compiled: the compiler joins small operations itself.

    Examples:
        >>> runs_kernels(torch.device("cpu"))
        False
    """
    return device.type != "cpu" and not torch.compiler.is_compiling() and _best_backend(device) == "triton"


def interpreting() -> bool:
    """Return whether Triton's interpreter is on, which runs kernels on the CPU.

    Examples:
        >>> interpreting()  # after TRITON_INTERPRET=1 python  # doctest: +SKIP
        True
    """
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")
