"""Operators of torch that cost the host little: on a GPU, small networks wait for Python."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from sparse_sr_attn.functional._torch import is_transformed, unseen_by_compilers

_kernels = torch.library.Library("sparse_sr_attn", "FRAGMENT")


class Operator:
    """A custom operator of torch, as from `torch.library.custom_op`, with a shorter way to it for eager code.

    In eager code the autograd function of an operator with gradients is ours, and the operator is called below torch's,
    so dispatch modes and profilers see it as before. Compilers, exporters and transforms find what torch registers.

    Args:
        function: the operator on all devices. Its results share no memory with its arguments.
        name: without the namespace.
        mutates_args: names of the arguments that `function` changes.
    """

    def __init__(self, function: Callable[..., object], name: str, mutates_args: Sequence[str]) -> None:
        self._definition = torch.library.custom_op(f"sparse_sr_attn::{name}", function, mutates_args=mutates_args)
        self._overload = getattr(torch.ops.sparse_sr_attn, name).default
        self._autograd: type[torch.autograd.Function] | None = None
        self.register_fake = self._definition.register_fake
        for device in ("CPU", "CUDA"):  # where they replace the kernel of `custom_op`, which first runs code of torch
            _kernels.impl(name, unseen_by_compilers(function), device)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """Register a backward; no argument of the operator may be a list of tensors."""
        self._definition.register_autograd(backward, setup_context=setup_context)

        def forward(ctx: Any, *args: Any) -> Any:
            output = self._below_autograd(*args)
            setup_context(ctx, args, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._autograd = type(self._overload.__name__, (torch.autograd.Function,), methods)

    def __call__(self, *args: Any) -> Any:
        """Call the operator, with positional arguments."""
        if torch.compiler.is_compiling() or is_transformed() or torch._C._get_tracing_state() is not None:
            return self._overload(*args)
        if not torch.is_grad_enabled() or not torch._C._any_requires_grad(*args):
            return self._below_autograd(*args)
        # Without a backward of ours, torch's raises an error.
        return self._overload(*args) if self._autograd is None else self._autograd.apply(*args)

    def _below_autograd(self, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return self._overload(*args)


def operator(name: str, *, mutates_args: Sequence[str] = ()) -> Callable[[Callable[..., object]], Operator]:
    """Decorate a function to make it an `Operator`."""
    return lambda function: Operator(function, name, mutates_args)
