"""Attention in a model that runs its blocks itself: its forward, with states that travel from block to block.

`run_on_view` runs the forward of the host as it is, on copies of the blocks and the modules around them, which are made
for one call, share all tensors with the originals and hold the states of that call. Nothing is stored in the model.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any, cast

import torch
from torch import nn

from sparse_sr_attn.blocks.body import SiteAttention
from sparse_sr_attn.config import join_path
from sparse_sr_attn.functional._torch import backward_is_running

Forward = Callable[..., Any]


def run_on_view(module: nn.Module, kind: type[nn.Module], sites: Sequence[str], *args: Any, **kwargs: Any) -> Any:
    """Run the forward of a class on a view of a module, with attention after some of the modules that it calls.

    Args:
        module: the module, with the layers as `sparse_sr_attn`.
        kind: the class with the forward.
        sites: paths in the module, each called once.
        args: arguments of the forward.
        kwargs: keyword arguments of the forward.

    Raises:
        RuntimeError: blocks run without gradients inside a call with gradients, as in reentrant checkpointing; blocks
            that share states run more than once; the forward reached none of them through the module's children, so
            that no attention ran; or a module around them has a forward of its own that runs the module itself, not the
            view.
    """
    copies: list[_Copy] = []
    call = _Call(cast(SiteAttention, module.get_submodule("sparse_sr_attn")), list(sites), torch.is_grad_enabled())
    output = kind.forward(_view(module, kind, "", call, copies), *args, **kwargs)
    originals = {id(copied.view): copied.module for copied in copies}
    for copied in copies:
        copied.write_back(originals)
    if not call.ran:
        raise RuntimeError(
            f"no attention ran: {kind.__name__} calls {sites[0]!r} by another reference than its name, such as a list "
            "of modules; call it by its name, or attach with share=1"
        )
    return output


class _Copy:
    """A view of a module, and what it was like before the forward."""

    def __init__(self, module: nn.Module, view: nn.Module) -> None:
        self.module = module
        self.view = view
        self.values = dict(vars(view))
        self.children = dict(view._modules)

    def write_back(self, originals: Mapping[int, nn.Module]) -> None:
        """Set in the module what the forward has set in its view."""
        for name, value in vars(self.view).items():
            if name != "_modules" and self.values.get(name, self) is not value:
                self.module.__dict__[name] = value
        for name, child in self.view._modules.items():
            if self.children.get(name, self) is not child:
                self.module._modules[name] = child if child is None else originals.get(id(child), child)
        for name in self.children.keys() - self.view._modules.keys():
            self.module._modules.pop(name, None)


class _Call:
    """One call of a model: its layers, and the states that its blocks have computed so far."""

    def __init__(self, attention: SiteAttention, sites: list[str], with_grad: bool) -> None:
        self.attention = attention
        self.sites = sites
        self.with_grad = with_grad
        self.states: dict[int, Any] = {}
        self.ran: set[str] = set()

    def run(self, site: str, forward: Forward, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the forward of a site and the layers after it."""
        if site in self.ran and self.attention.shares and not backward_is_running():
            raise RuntimeError(
                f"{site} runs more than once in a call of the model, where blocks that share states must run once, "
                "because there is one state for all runs; attach with share=1"
            )
        x = forward(*args, **kwargs)
        self.ran.add(site)
        if self.with_grad and not torch.is_grad_enabled():
            raise RuntimeError(
                f"{site} runs without gradients inside a call with gradients, as in reentrant checkpointing, where "
                "shared states have no gradients; use checkpoint(..., use_reentrant=False), or attach with share=1"
            )
        x, states = self.attention.after(self.sites.index(site), x, self.states)
        self.states.update(states)  # all of them, because checkpointing may run a block again
        return x


def _view(module: nn.Module, kind: type[nn.Module], path: str, call: _Call, copies: list[_Copy]) -> nn.Module:
    """Return a copy of a module with the same class and tensors, in which what leads to the blocks are copies too."""
    view = object.__new__(kind)
    view.__dict__.update(_rebound(module, view))
    children = view.__dict__["_modules"] = {n: child for n, child in module._modules.items() if n != "sparse_sr_attn"}
    for name, child in children.items():
        inner = join_path(path, name)
        if child is not None and any(f"{site}.".startswith(f"{inner}.") for site in call.sites):
            children[name] = _view(child, type(child), inner, call, copies)
    own = view.__dict__.get("forward")
    on_view = getattr(own, "__self__", None) is view
    if path and own is not None and not on_view and any(site.startswith(f"{path}.") for site in call.sites):
        raise RuntimeError(
            f"{path} has a `forward` that is set on the module and not a method of it, which would run {path} without "
            "the attention inside; define it in the class, or set it as types.MethodType(function, module)"
        )
    if path in call.sites:
        forward = kind.forward.__get__(view) if own is None else own
        view.__dict__["forward"] = functools.partial(call.run, path, forward)
    copies.append(_Copy(module, view))
    return view


def _rebound(module: nn.Module, copied: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module, in which its own methods are those of a copy."""
    return {
        name: value.__func__.__get__(copied) if isinstance(value, MethodType) and value.__self__ is module else value
        for name, value in vars(module).items()
    }
