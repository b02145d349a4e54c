"""What export needs to be told, and compilers of older torch must not be."""

import torch
from torch.autograd import forward_ad

from sparse_sr_attn.errors import ExportError


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
