"""Attention in a model that runs its blocks itself: its forward, with states that travel from block to block.

Two ways, neither of which stores anything in the model. `run_on_view` runs the forward of the host as it is, on copies
of the blocks and the modules around them, which are made for one call, share all tensors with the originals and hold
the states of that call. `trace` generates code with `torch.fx` that `torch.compile` and exporters can follow, in which
Python's control flow and attributes are those of the moment of tracing.
"""

import functools
import itertools
import linecache
import operator
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any, cast

import torch
from torch import fx, nn

from sparse_sr_attn.blocks.body import SiteAttention
from sparse_sr_attn.config import join_path
from sparse_sr_attn.errors import first_line
from sparse_sr_attn.functional._torch import backward_is_running

Forward = Callable[..., Any]


class TraceError(Exception):
    """The forward cannot be traced; says why."""


def trace(module: nn.Module, kind: type[nn.Module], sites: Sequence[str], *, training: bool) -> Forward:
    """Return the forward of a module with attention after some of the modules that it calls.

    Args:
        module: the module; it has the layers as `sparse_sr_attn` when the forward is called, with one block per site.
        kind: the class whose `forward` is traced.
        sites: paths in the module, each called once.
        training: the mode in which the forward is traced.

    Returns:
        A function of a module like this one and the arguments of its forward.

    Raises:
        TraceError: Python's control flow depends on values of tensors or shapes, or a site is not called once.
    """
    shadow = _shadow(module, kind, sites, training)
    named = shadow.named_modules()
    through = {inner for path, inner in named if any(site.startswith(join_path(path, "")) for site in sites)}
    tracer = _Tracer({shadow, *through})
    try:
        graph = tracer.trace(shadow)
    except Exception as error:  # somebody else's forward can raise anything for stand-ins of tensors
        raise TraceError(f"{kind.__name__} cannot be traced: {first_line(error)}") from error
    for node in graph.nodes:
        if node.op == "get_attr" and "_tensor_constant" in str(node.target):
            raise TraceError(f"{kind.__name__} makes tensors while it runs, which a trace would freeze")
    _insert(graph, kind, sites)
    return _compiled(graph)


class _Tracer(fx.Tracer):
    """Traces through the modules on the way to the sites; all others are called as they are."""

    proxy_buffer_attributes = True

    def __init__(self, through: set[nn.Module]) -> None:
        super().__init__(autowrap_functions=_opaque())
        self.through = through

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether a module is called, not traced."""
        return m not in self.through


def _opaque() -> tuple[Callable[..., Any], ...]:
    """Return functions that are called, not traced, because they look at the type of their arguments."""
    einops = sys.modules.get("einops")
    return () if einops is None else (einops.rearrange, einops.repeat, einops.reduce)


def _shadow(module: nn.Module, kind: type[nn.Module], sites: Sequence[str], training: bool) -> nn.Module:
    """Return a module with the same children whose own attributes, and those on the way to the sites, may be set."""
    shadow = object.__new__(kind)
    values = _rebound(module, shadow)
    shadow.__dict__.update({name: dict(value) if isinstance(value, dict) else value for name, value in values.items()})
    shadow.__dict__["training"] = training
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        shadow.__dict__[hooks] = OrderedDict()
    children = shadow.__dict__["_modules"]
    children.pop("sparse_sr_attn", None)
    for name, child in children.items():
        inner = [site.removeprefix(f"{name}.") for site in sites if site.startswith(f"{name}.")]
        if inner and child is not None:
            children[name] = _shadow(child, type(child), inner, training)
    return shadow


def _insert(graph: fx.Graph, kind: type[nn.Module], sites: Sequence[str]) -> None:
    """Insert attention after the calls of the sites."""
    calls: dict[str, list[fx.Node]] = {site: [] for site in sites}
    for node in graph.nodes:
        if node.op == "call_module" and node.target in calls:
            calls[node.target].append(node)
    wrong = [site for site, found in calls.items() if len(found) != 1]
    if wrong:
        raise TraceError(f"{kind.__name__} must call {wrong[0]!r} once in a trace, got {len(calls[wrong[0]])} times")
    order = {node: place for place, node in enumerate(graph.nodes)}
    places = [order[calls[site][0]] for site in sites]
    if places != sorted(places):
        raise TraceError(f"{kind.__name__} calls its blocks in another order than before")
    states: Any = {}
    for number, site in enumerate(sites):
        call = calls[site][0]
        users = list(call.users)
        with graph.inserting_after(call):
            layers = graph.get_attr("sparse_sr_attn")
        with graph.inserting_after(layers):
            both = graph.call_function(after, (layers, number, call, states))
        with graph.inserting_after(both):
            x = graph.call_function(operator.getitem, (both, 0))
        with graph.inserting_after(x):
            states = graph.call_function(operator.getitem, (both, 1))
        for user in users:
            user.replace_input_with(call, x)


def after(attention: SiteAttention, number: int, x: torch.Tensor, states: Mapping[int, Any]) -> Any:
    """Return the features after the layers of a site, and the states that later sites need."""
    return attention.after(number, x, states)


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


def _compiled(graph: fx.Graph) -> Forward:
    code = graph.python_code("self")
    scope = dict(code.globals)
    name = f"<sparse_sr_attn {next(_count)}>"
    exec(compile(code.src, name, "exec"), scope)  # noqa: S102  (generated from the model's own forward)
    linecache.cache[name] = (len(code.src), None, code.src.splitlines(keepends=True), name)  # for tracebacks
    forward: Forward = scope["forward"]
    return forward


_count = itertools.count()
