"""Workarounds for torch: export and compilers, precision, recomputation, processes."""

import functools
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor
from torch._C._dynamo.eval_frame import set_eval_frame
from torch.autograd import forward_ad

from sparse_sr_attn.errors import ExportError, ProcessError

P = ParamSpec("P")
R = TypeVar("R")


def is_exporting() -> bool:
    """Return whether `torch.export` is running; `torch.compile` does not count.

    In older versions (seen in 2.11), `torch.compiler.is_exporting()` is also True inside `torch.compile`. The flag read
    here, which newer versions use, is correct in all of them.
    """
    return torch.compiler._is_exporting_flag


def is_exporting_to_old_onnx() -> bool:
    """Return whether the TorchScript-based exporter of ONNX (`dynamo=False`) is running."""
    traced = not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None
    return traced and torch.onnx.is_in_onnx_export()


def run_while_compiling(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function that compilers call while they compile, and whose result they take as a constant.

    Does what `torch.compiler.assume_constant_result` does, which imports all of the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def unseen_by_compilers(function: Callable[..., R]) -> Callable[..., R]:
    """Return a function that runs as it is even where `torch.compile` would compile what it finds.

    Does what `torch.compiler.disable` does, which imports all of the compiler.
    """

    def unseen(*args: Any) -> R:
        compiler = set_eval_frame(None)
        try:
            return function(*args)
        finally:
            set_eval_frame(compiler)

    return unseen


@run_while_compiling  # compilers guard by themselves on what it depends on
def is_transformed() -> bool:
    """Return whether forward-mode derivatives are being computed or any transform of `torch.func` is active."""
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def needs_plain_code() -> bool:
    """Return whether operations must consist of torch's own operators, because the caller cannot see into ours.

    `torch.export` translates only torch's operators. Forward-mode derivatives and transforms of `torch.func` (`vmap`,
    `grad`, `jacrev`) are defined only for them.

    Raises:
        ExportError: the TorchScript-based ONNX exporter is running, which can translate neither.
    """
    if is_exporting_to_old_onnx():
        raise ExportError(
            "sparse attention must be exported to ONNX with dynamo=True, got the TorchScript-based exporter; "
            "call torch.onnx.export(..., dynamo=True) or sparse_sr_attn.inference.onnx.export_onnx"
        )
    return is_exporting() or is_transformed()


def smaller(one: int, other: int) -> int:
    """Return the smaller of two sizes. They may be symbolic: export needs `sym_min`, older compilers reject it."""
    return torch.sym_min(one, other) if is_exporting() else min(one, other)


def larger(one: int, other: int) -> int:
    """Return the larger of two sizes; see `smaller`."""
    return torch.sym_max(one, other) if is_exporting() else max(one, other)


def modulo(numbers: Int[Tensor, "*s"], divisor: int) -> Int[Tensor, "*s"]:
    """Return `numbers % divisor`, in a form that ONNX export can translate if `divisor` depends on the image size."""
    return numbers - numbers // divisor * divisor


def working_precision(tensor: Tensor) -> torch.dtype:
    """Return the dtype for scores, softmax and k-means over `tensor`: float32 or higher."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def product_precision(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype for matrix products of numbers of `dtype`, which all sum in float32 or higher.

    On a CPU bfloat16 stays as it is only where oneDNN multiplies it; elsewhere, and for float16, torch's own loops are
    many times slower than products in float32.
    """
    if device.type != "cpu" or (dtype == torch.bfloat16 and _multiplies_bfloat16()):
        return dtype
    return torch.promote_types(dtype, torch.float32)


@functools.cache
def _multiplies_bfloat16() -> bool:
    """Return whether oneDNN multiplies bfloat16 on this CPU."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


_LARGE_PRODUCT = 1_750_000  # multiplications; below, calls cost more than MKL loses


def multiply(one: Tensor, other: Tensor, out: Tensor) -> None:
    """Write the products of matrices to `out`, whatever its precision."""
    if _prefers_onednn(one, other):
        for left, right, product in zip(one.unbind(), other.transpose(1, 2).unbind(), out.unbind(), strict=True):
            product.copy_(torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], ""))
    elif out.dtype == one.dtype:
        torch.bmm(one, other, out=out)
    else:
        out.copy_(torch.bmm(one, other))


def _prefers_onednn(one: Tensor, other: Tensor) -> bool:
    """Return whether oneDNN, called for one matrix after the other, is faster than MKL, which `torch.bmm` calls.

    It is with one thread and large matrices, where MKL uses half of each vector. With more threads it would have to
    start all of them for each matrix.
    """
    if one.device.type != "cpu" or one.dtype != torch.float32 or one.stride(-1) != 1 or torch.get_num_threads() > 1:
        return False
    return one.shape[1] * one.shape[2] * other.shape[2] > _LARGE_PRODUCT and _mkl_halves_vectors()


@functools.cache
def _mkl_halves_vectors() -> bool:
    """Return whether MKL uses 256 of the 512 bits of this CPU's vectors: AMD since Zen 5, recognised on Linux only."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    about = Path("/proc/cpuinfo")
    text = about.read_text(encoding="utf-8") if about.is_file() else ""
    family = re.search(r"AuthenticAMD\ncpu family\s*: (\d+)", text)
    return family is not None and int(family[1]) >= 26


def may_keep(device: torch.device) -> bool:
    """Return whether a tensor computed on a device now can be kept for later calls."""
    if torch.compiler.is_compiling():
        return False
    # What a CUDA graph allocates holds its values only in the graph.
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def kept_on_device(compute: Callable[..., tuple[Tensor | None, ...]]) -> Any:
    """Return `compute` with a memory of its 16 last results, for tensors that depend on sizes only.

    Args:
        compute: its last argument is the device. It runs on the CPU; its results are copied to that device.
    """

    @functools.lru_cache(maxsize=16)
    def kept(*sizes_and_device: Any) -> tuple[Tensor | None, ...]:
        *sizes, device = sizes_and_device
        with torch.inference_mode(mode=False):
            # From the CPU, whose copies have arrived when `to` returns: any stream may read them.
            found = compute(*sizes, torch.device("cpu"))
            return tuple(None if tensor is None else tensor.to(device) for tensor in found)

    return kept


def conv_precision(x: Tensor) -> torch.dtype:
    """Return the dtype of a convolution of `x` here: that of autocast if it is on, otherwise that of `x`."""
    if x.dtype == torch.float64 or not autocast_is_on(x):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def autocast_is_on(x: Tensor) -> bool:
    """Return whether autocast is enabled on the device of `x`."""
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def lower_precision(first: Tensor, second: Tensor) -> torch.dtype:
    """Return the dtype for the product of two tensors: the one with fewer bits, on a tie that of `second`."""
    return first.dtype if first.dtype.itemsize < second.dtype.itemsize else second.dtype


def without_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """Return a context that disables autocast on the device of `tensor`, if that device supports it (meta does not)."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def backward_is_running() -> bool:
    """Return whether a backward pass is running. Activation checkpointing recomputes the forward pass inside one."""
    # The question activation checkpointing itself asks.
    return torch._C._current_graph_task_id() != -1


def several_processes() -> bool:
    """Return whether this process is one of several in distributed training."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gathered(statistics: Tensor, what: str) -> Tensor:
    """Return the statistics of all processes, in order of rank. The result is bit-identical on each process.

    Args:
        statistics: those of this process; shape and dtype must agree on all.
        what: name of the operation, for error messages.

    Raises:
        ProcessError: a process ended, or did not get here within the timeout of the process group.
    """
    parts = [torch.empty_like(statistics) for _ in range(dist.get_world_size())]
    try:
        dist.all_gather(parts, statistics)
    except RuntimeError as error:
        raise ProcessError(
            f"process {dist.get_rank()} of {len(parts)}: {what} joins the statistics of all processes in each "
            "forward pass in training, so all must run the same number of them; another one ended, or ran none within "
            "the timeout of the process group. If processes have different numbers of batches, "
            "`with model.join(throw_on_early_termination=True):` (of DistributedDataParallel) stops all together. "
            f"({error})"
        ) from error
    return torch.stack(parts)
