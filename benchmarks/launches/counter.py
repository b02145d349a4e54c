"""Counts the kernels that a GPU would launch, on the meta device: nothing is computed.

Code takes the path of CUDA devices, inside our operators too. How many kernels an operator of torch launches is a
model: one, but none for a view or empty memory, and the exceptions in `_SEVERAL`.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_sr_attn.functional import backend
from sparse_sr_attn.functional._torch import needs_plain_code

_NONE = {"_local_scalar_dense", "_reshape_alias", "_unsafe_view", "empty", "empty_like", "empty_strided"}
_NONE |= {"lift_fresh", "new_empty", "new_empty_strided", "resize_", "set_"}
_SMALL_SORT = 4096
"""Most keys of a row that a single kernel sorts."""


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *_: object) -> int:
    return 1 if bias is None else 2


def _convolution_backward(*args: Any) -> int:
    return sum(args[-1])  # which of the three gradients are wanted


def _sort(keys: Tensor, *_: object, **__: object) -> int:
    """Return the launches of a radix sort: a pass for each byte of a key, and six for what is around it."""
    return 2 if keys.shape[-1] <= _SMALL_SORT else 6 + keys.element_size()


_SEVERAL: Mapping[str, Callable[..., int]] = {
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "sort": _sort,
    "topk": lambda *_, **__: 4,
    "baddbmm": lambda bias, *_, **__: 1 if bias.ndim == 3 else 2,  # a bias is first copied for each row
    "constant_pad_nd": lambda *_, **__: 2,  # zeros, and a copy into them
    "slice_backward": lambda *_, **__: 2,
    "select_backward": lambda *_, **__: 2,
    "scatter": lambda *_, **__: 2,
}


def launches_of(operator: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Return how many kernels an operator of torch launches on a GPU."""
    name = operator.__name__.partition(".")[0]
    if name in _NONE or operator.is_view:
        return 0
    return _SEVERAL[name](*args, **kwargs) if name in _SEVERAL else 1


class LaunchCounter(TorchDispatchMode):
    """Counts launches by the name of the operator or kernel, in `counts`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count an operator of torch; run ours, whose parts are counted."""
        kwargs = kwargs or {}
        if func.namespace == "sparse_sr_attn":
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        if func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):  # a part of one of ours
            with self:
                return func.decompose(*args, **kwargs)
        found = launches_of(func, args, kwargs)
        if found:
            self.counts[func.__name__.partition(".")[0]] += found
        output = func(*args, **kwargs)
        if func.__name__.startswith("convolution.") and args[0].is_contiguous(memory_format=torch.channels_last):
            return output.contiguous(memory_format=torch.channels_last)  # as cuDNN does, and the meta device does not
        return output


class _Kernel:
    """Stands in for a Triton kernel."""

    def __init__(self, name: str, counts: Counter[str]) -> None:
        self.name, self.counts = name, counts

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self.launch

    def launch(self, *_: object, **__: object) -> None:
        """Count a launch."""
        self.counts[f"triton {self.name}"] += 1


@contextmanager
def counted(chosen: str = "triton") -> Iterator[Counter[str]]:
    """Count the launches of what runs on meta tensors as if they were on a GPU.

    Args:
        chosen: backend of cluster attention that such a device resolves to.
    """
    from sparse_sr_attn.functional import conv_norm_kernels, map_kernels  # noqa: PLC0415
    from sparse_sr_attn.functional.cluster import triton_kernels as cluster_kernels  # noqa: PLC0415
    from sparse_sr_attn.functional.window import triton_kernels as window_kernels  # noqa: PLC0415

    def best_backend(device: torch.device) -> str:
        return "eager" if needs_plain_code() else chosen

    counter = LaunchCounter()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(backend, "_best_backend", best_backend))
        for module in (map_kernels, conv_norm_kernels, cluster_kernels, window_kernels):
            for name, found in list(vars(module).items()):
                if hasattr(found, "run"):
                    stack.enter_context(mock.patch.object(module, name, _Kernel(name, counter.counts)))
        stack.enter_context(counter)
        yield counter.counts
