"""What works around torch: export and compilers, precision, recomputation, processes."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor
from torch.autograd import forward_ad

from sparse_sr_attn.errors import ExportError, ProcessError


def is_exporting() -> bool:
    """Return whether `torch.export` is at work; `torch.compile` is not that.

    Older torch (seen in 2.11) answers `torch.compiler.is_exporting()` with True in `torch.compile`, too. The flag
    behind it is right there as well, and is what newer ones read.
    """
    return torch.compiler._is_exporting_flag


def is_exporting_to_old_onnx() -> bool:
    """Return whether the TorchScript-based exporter of ONNX (`dynamo=False`) is at work."""
    traced = not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None
    return traced and torch.onnx.is_in_onnx_export()


def is_transformed() -> bool:
    """Return whether forward-mode derivatives are computed, or a transform of `torch.func` is at work, of any kind."""
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


# To compilers the answer is a constant; they guard by themselves on what it depends on. The decorator
# `torch.compiler.assume_constant_result` does the same, and imports all of the compiler.
is_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def needs_plain_code() -> bool:
    """Return whether operations must consist of torch's own operators, because ours are opaque to what reads them.

    `torch.export` translates torch's operators only; forward-mode derivatives and transforms of `torch.func` (`vmap`,
    `grad`, `jacrev`) exist for them only.

    Raises:
        ExportError: the TorchScript-based exporter of ONNX is at work, which can translate neither.
    """
    if is_exporting_to_old_onnx():
        raise ExportError(
            "sparse attention must be exported to ONNX with dynamo=True, got the TorchScript-based exporter; "
            "call torch.onnx.export(..., dynamo=True) or sparse_sr_attn.inference.onnx.export_onnx"
        )
    return is_exporting() or is_transformed()


def smaller(one: int, other: int) -> int:
    """Return the smaller of two sizes, which may be symbolic: export must be told so, older compilers must not."""
    return torch.sym_min(one, other) if is_exporting() else min(one, other)


def larger(one: int, other: int) -> int:
    """Return the larger of two sizes, as `smaller` does."""
    return torch.sym_max(one, other) if is_exporting() else max(one, other)


def modulo(numbers: Int[Tensor, "*s"], divisor: int) -> Int[Tensor, "*s"]:
    """Return `numbers % divisor`, which ONNX export cannot translate for a divisor that depends on the image."""
    return numbers - numbers // divisor * divisor


def working_precision(tensor: Tensor) -> torch.dtype:
    """Return the precision of scores, softmax and k-means over `tensor`: float32 for anything lower."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def lower_precision(first: Tensor, second: Tensor) -> torch.dtype:
    """Return the precision of a product of two: that of the one with fewer bits, of the second if they have as many."""
    return first.dtype if first.dtype.itemsize < second.dtype.itemsize else second.dtype


def without_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """Return a context without autocast on the device of `tensor`, if that device has one (meta has none)."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def backward_is_running() -> bool:
    """Return whether this is called from inside a backward, as activation checkpointing does to compute again."""
    # The question activation checkpointing itself asks.
    return torch._C._current_graph_task_id() != -1


def several_processes() -> bool:
    """Return whether this process trains together with others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gathered(statistics: Tensor, what: str) -> Tensor:
    """Return the statistics of all processes, those of the first one first: the same bits on each.

    Args:
        statistics: of this process; of one shape and dtype on all.
        what: gathers them, for the message.

    Raises:
        ProcessError: a process ended, or did not come here within the timeout of the process group.
    """
    parts = [torch.empty_like(statistics) for _ in range(dist.get_world_size())]
    try:
        dist.all_gather(parts, statistics)
    except RuntimeError as error:
        raise ProcessError(
            f"process {dist.get_rank()} of {len(parts)}: {what} joins the statistics of all processes in each forward "
            "in training, so all must make the same number of forwards; another one ended, or made none within the "
            "timeout of the process group. If one of them runs out of batches first, "
            "`with model.join(throw_on_early_termination=True):` (of DistributedDataParallel) ends all at once. "
            f"({error})"
        ) from error
    return torch.stack(parts)
