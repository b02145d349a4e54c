"""Insert attention into third-party models, and remove it again."""

import functools
import itertools
import json
import logging
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparse_sr_attn.backbones.base import as_json, decode_options, encode_options
from sparse_sr_attn.backbones.caller import run_on_view
from sparse_sr_attn.backbones.trunks import (
    Calls,
    Probe,
    Site,
    besides,
    difference,
    find_trunks,
    matching,
    watch_calls,
)
from sparse_sr_attn.blocks.attention_config import AttentionConfig, default_config, full_options, read_attention
from sparse_sr_attn.blocks.body import SiteAttention
from sparse_sr_attn.config import checked, join_path, old_names_allowed
from sparse_sr_attn.errors import ConfigError
from sparse_sr_attn.layers.base import LAYERS, warn_of_range
from sparse_sr_attn.registry import suggestion

SLOT = "sparse_sr_attn"
"""Name of the child with the attention, and last part of the key of its record in a state dict."""

_LOG = logging.getLogger(__name__)
_OLD_SLOT = "attention"
_SHOWN = 4  # trunks that a message offers
_SMALL_SHARE = 0.05  # of the parameters: below it, a warning says so
_DEEPEST = 8  # levels of attention inside attention that are recorded under the key of one weight


class Attended(nn.Module):
    """What modules with attached attention have in common. They stay the same objects; `attach` changes their class.

    Their state dict has a record of the attention, under the key of a weight of the host with `.sparse_sr_attn` after
    it. So `load_model` can attach the same again, and code that does not know the attention cannot load the weights
    without noticing.
    """

    _host: type[nn.Module]
    sparse_sr_attn: SiteAttention
    _record: Mapping[str, Any]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        key = self._record_key(prefix)
        while key in destination:  # of attention around this one
            key = f"{key}.{SLOT}"
        destination[key] = encode_options(self._record)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        keys = (self._record_key(prefix) + f".{SLOT}" * depth for depth in range(_DEEPEST))
        key = next((key for key in keys if key in state_dict), None)
        recorded = state_dict.pop(key, None)
        if recorded is not None:  # not an error, which `load_state_dict` raises even if it is not strict
            _, _, _, unexpected, _ = args
            unexpected += [f"{key}: {difference}" for difference in _differences(recorded, self._record)]
        if _OLD_SLOT not in self._modules:  # the name before there was a record
            for key in [key for key in state_dict if key.startswith(f"{prefix}{_OLD_SLOT}.")]:
                state_dict[f"{prefix}{SLOT}.{key[len(prefix) + len(_OLD_SLOT) + 1 :]}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _record_key(self, prefix: str) -> str:
        return f"{prefix}{self._record['key']}.{SLOT}"


class _Children(nn.Sequential):
    """An `nn.Sequential` whose length, iteration, indexing and slicing cover only its blocks, not the attention."""

    def _children(self) -> list[tuple[str, nn.Module]]:
        return [(name, module) for name, module in self._modules.items() if name != SLOT and module is not None]

    def __len__(self) -> int:
        return len(self._children())

    def __iter__(self) -> Iterator[nn.Module]:
        return iter([module for _, module in self._children()])

    def __getitem__(self, index: Any) -> Any:
        found = self._children()[index]
        return nn.Sequential(OrderedDict(found)) if isinstance(found, list) else found[1]

    def __setitem__(self, index: int, module: nn.Module) -> None:
        setattr(self, self._children()[index][0], module)

    def _refuse(self, *_: object) -> NoReturn:
        raise TypeError("attention was placed for these children: detach, change them, and attach again")

    append = insert = extend = pop = __delitem__ = __iadd__ = __imul__ = _refuse  # type: ignore[assignment]


class AttendedSequential(Attended, _Children):
    """The class that `attach` gives to an `nn.Sequential`: the same object with attention between its children.

    Length, iteration, indexing and slicing cover only the children, not the attention.
    """

    _host = nn.Sequential

    @property
    def attention(self) -> SiteAttention:
        """The layers."""
        return self.sparse_sr_attn

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Run the children and the attention between them."""
        return self.sparse_sr_attn.run(self, x)


class _Derived(Attended):
    """A subclass of the host's class, made when it is needed.

    It is copied with all its attributes, whatever the host defines: that could not know the attention.
    """

    __deepcopy__ = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _remake, (_kind_of(self), self._host), dict(vars(self))

    def __setstate__(self, state: Any) -> None:
        nn.Module.__setstate__(self, state)


class AttendedModule(_Derived):
    """The class that `attach` gives to a module that returns a feature map: the same object with attention after it."""

    def forward(self, *args: Any, **kwargs: Any) -> Float[Tensor, "b c h w"]:
        """Run the module and its attention."""
        return self.sparse_sr_attn.after(0, super().forward(*args, **kwargs), {})[0]


class AttendedCaller(_Derived):
    """The class that `attach` gives to a module that runs its blocks itself: the same object with attention in between.

    The host's `forward` runs on a view of the module, which is made for the call and holds its states.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the host's forward, with attention after some of the modules that it calls."""
        return run_on_view(self, self._host, self._record["sites"], *args, **kwargs)


_CLASSES: dict[tuple[str, type[nn.Module]], type[Attended]] = {}


def _class_for(kind: type[Attended], host: type[nn.Module]) -> type[Attended]:
    if kind is AttendedSequential:
        return kind
    if (kind.__name__, host) not in _CLASSES:
        bases = (kind, _Children, host) if issubclass(host, nn.Sequential) else (kind, host)
        content = {"_host": host, "__module__": __name__, "__doc__": kind.__doc__}
        _CLASSES[kind.__name__, host] = type(f"Attended{host.__name__}", bases, content)
    return _CLASSES[kind.__name__, host]


def _kind_of(module: Attended) -> type[Attended]:
    return next(kind for kind in (AttendedSequential, AttendedModule, AttendedCaller) if isinstance(module, kind))


def _remake(kind: type[Attended], host: type[nn.Module]) -> Attended:
    made = _class_for(kind, host)
    return made.__new__(made)


@checked
def attach(
    model: nn.Module,
    body: str | Sequence[str] | None = None,
    attention: str | Mapping[str, Any] | Sequence[Any] = "LCoA",
    every: int | None = None,
    share: int | None = None,
    *,
    example: Tensor | tuple[Any, ...] | None = None,
    **options: Any,
) -> nn.Module:
    """Insert attention into the trunk of a model: after some of its blocks, which may share states.

    The model is changed in place. Its parameters keep their names; new ones have `sparse_sr_attn` in theirs. Its
    output is bit-identical as long as the layers are the identity (`zero_init`, the default for layers that have it).
    Attach before `DistributedDataParallel`, before `torch.compile` and before creating the optimizer.

    Args:
        model: any module.
        body: path of the trunk, as in `state_dict` (`"body"`, `"net.trunk"`); or a path with `*` (`"B*"`,
            `"layers.*.conv"`) or several paths, which name the modules that attention may follow. Each must return one
            feature map. If omitted, the longest run of numbered modules that return maps of one size and width and have
            most of the parameters; a warning says which, if there are others of that size.
        attention: name of a registered layer, a mapping, or a list of mappings, as in the option `attention` of `EDSR`.
        every: a layer after every `every` blocks of the trunk: 4 means after blocks 3, 7, 11, ..., counted from 0.
            Default: 4, or less so that there are two layers. Alternatively, list the blocks in `after=[...]`.
        share: one layer computes a state and the next `share - 1` reuse it, if their maps have the same shape.
            Default: 4 if possible, else 1.
        example: images that the model accepts, or a tuple with all arguments of its `forward`. A copy of the model is
            run on them to see which modules return feature maps. Default: black images of 16x16 or more.
        options: options of the layer; only if `attention` is a name.

    Returns:
        The same model.

    Raises:
        ConfigError: there is no such trunk, it cannot hold attention, or an option is invalid; says what would work.
            The model is unchanged.

    Note:
        States are passed as arguments: inside an `nn.Sequential` that the model calls; or, if the model runs its blocks
        itself, on a view of the model that is made for each call. So copies, threads, activation checkpointing and
        `DistributedDataParallel` work as before; `torch.compile` breaks the graph at the view. `docs/attach.md` lists
        models that were tried.

    Examples:
        >>> body = torch.nn.Sequential(*(torch.nn.Conv2d(16, 16, 3, padding=1) for _ in range(4)))
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, padding=1), body)
        >>> model = attach(model, "1", "LCoA", every=2, share=2, num_clusters=32)
        >>> model(torch.rand(1, 3, 12, 12)).shape, len(body.attention)
        (torch.Size([1, 16, 12, 12]), 2)
    """
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ConfigError.at("model", "must not be in DistributedDataParallel yet, which would miss the new parameters")
    place = _find_place(model, body, example)
    given = _as_configs(attention, every, share, options, num_blocks=len(place.sites))
    configs = read_attention(given, len(place.sites))
    for changing in sorted({config.type for config in configs if "zero_init" not in config.options}):
        warnings.warn(
            f"{changing} has no option zero_init, so {type(model).__name__} gives another output until it is trained",
            stacklevel=3,
        )
    explicit = share is not None or not isinstance(attention, str)
    built = type(model)._host if isinstance(model, Attended) else type(model)
    host = f"{built.__module__}.{built.__qualname__}"
    for path, kind, layers, record in _placed(model, place, configs, explicit=explicit):
        _give(model.get_submodule(path), kind, layers, {"path": path, "host": host, **record})
    warn_of_range(model, _range_of(model))
    return model


def detach(model: nn.Module) -> nn.Module:
    """Remove all attention that `attach` inserted into a model.

    Args:
        model: the model, changed in place. Its own weights stay as they are, trained or not.

    Returns:
        The same model.

    Raises:
        ConfigError: the model has no attached attention.

    Examples:
        >>> body = torch.nn.Sequential(*(torch.nn.Conv2d(16, 16, 3, padding=1) for _ in range(4)))
        >>> model = attach(torch.nn.Sequential(torch.nn.Conv2d(3, 16, 1), body), "1", "LCoA")
        >>> is_attended(model), is_attended(detach(model))
        (True, False)
    """
    found = [module for module in model.modules() if isinstance(module, Attended)]
    if not found:
        raise ConfigError.at("model", f"must have attention from attach, but {type(model).__name__} has none")
    for module in found:
        host = module._host
        module.__class__ = host  # type: ignore[assignment]
        del module._modules[SLOT]
        del module.__dict__["_record"]
    return model


def is_attended(model: nn.Module) -> bool:
    """Return whether a model has attention from `attach`.

    Examples:
        >>> is_attended(EDSR(num_block=4, attention="LCoA"))  # attention of its own, not attached
        False
    """
    return any(isinstance(module, Attended) for module in model.modules())


def reattach(model: nn.Module, records: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """Insert attention where and as it was when weights were saved.

    Args:
        model: a model like the one that had the attention, without it; changed in place.
        records: what state dicts of attended models record, by path of the module (see `read_records`).

    Raises:
        ConfigError: the model has no such module, or an option is invalid. The model is unchanged.
    """
    kinds = {kind.__name__: kind for kind in (AttendedSequential, AttendedModule, AttendedCaller)}
    modules = dict(model.named_modules(remove_duplicate=False))
    placed = []
    for path, record in records.items():
        module = modules.get(path)
        if module is None or isinstance(module, Attended):
            what = "has none" if module is None else "has attention there already"
            raise ConfigError.at(
                "model", f"must have a module {path!r} without attention, but {type(model).__name__} {what}"
            )
        gone = [site for site in record["sites"] if join_path(path, site) not in modules]
        if gone:
            raise ConfigError.at(
                "model", f"must have a module {join_path(path, gone[0])!r}, but {type(model).__name__} has none"
            )
        kind, widths = kinds[record["kind"]], record["widths"]
        if kind is AttendedSequential and type(module) is not nn.Sequential:
            raise ConfigError.at("model", f"must have an nn.Sequential at {path!r}, got a {type(module).__name__}")
        if kind is AttendedSequential and len(module) < len(widths):
            raise ConfigError.at(
                "model",
                f"must have at least {len(widths)} modules in {path!r}, as when it was attached, got {len(module)}",
            )
        configs = read_attention(record["attention"], len(widths))
        layers = _layers(configs, widths, record["shapes"], module, model)
        placed.append((module, kind, layers, {**record, "path": path}))
    for module, kind, layers, record in placed:
        _give(module, kind, layers, record)
    return model


def without_attention(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a state dict that belong to the host."""
    return {key: value for key, value in state.items() if SLOT not in key.split(".")}


def without_records(state: Mapping[str, Any], model: nn.Module | None = None) -> dict[str, Any]:
    """Return a state dict without the records of attention; with a model, under the names that it has now.

    Args:
        state: a state dict of an attended model, of any version of the library.
        model: the attended model.
    """
    modules = model.named_modules() if model is not None else ()
    old = {join_path(path, f"{_OLD_SLOT}."): module for path, module in modules if isinstance(module, Attended)}
    starts = [start for start, module in old.items() if _OLD_SLOT not in module._modules]
    named = {}
    for key, value in state.items():
        start = next((start for start in starts if key.startswith(start)), None)
        ours = key if start is None else f"{start[: -len(_OLD_SLOT) - 1]}{SLOT}.{key[len(start) :]}"
        if not is_record(ours):
            named[ours] = value
    return named


def is_record(key: str) -> bool:
    """Return whether a key of a state dict is that of a record of attention."""
    return key.rpartition(".")[2] == SLOT


def _give(module: nn.Module, kind: type[Attended], layers: SiteAttention, record: Mapping[str, Any]) -> None:
    module.add_module(SLOT, layers)
    module.__dict__["_record"] = record
    module.__class__ = _class_for(kind, type(module))


def _range_of(model: nn.Module) -> float:
    """Return the image range of a model if it has one of the attributes of EDSR, RCAN or SwinIR; else 1."""
    named = (getattr(module, name, 1) for module in model.modules() for name in ("img_range", "rgb_range"))
    return max((float(value) for value in named if isinstance(value, (int, float))), default=1.0)


# --- what goes where --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """Where attention can go.

    Attributes:
        sites: the blocks that it can follow.
        sequential: path of the `nn.Sequential` whose children they all are, if the model calls it.
        calls: what the model called.
    """

    sites: tuple[Site, ...]
    sequential: str | None
    calls: Calls

    @property
    def widths(self) -> list[int]:
        """Channels of the map after each block."""
        return [site.shape[0] for site in self.sites]

    @property
    def shapes(self) -> list[int]:
        """A number for the shape of each map; equal shapes have equal numbers."""
        known = list(dict.fromkeys(site.shape for site in self.sites))
        return [known.index(site.shape) for site in self.sites]


_Placed = tuple[str, type[Attended], SiteAttention, Mapping[str, Any]]


def _as_configs(
    attention: object, every: int | None, share: int | None, options: Mapping[str, Any], *, num_blocks: int
) -> object:
    """Return the mapping for a name and keywords; mappings unchanged."""
    if not isinstance(attention, str):
        if not attention:
            raise ConfigError.at("attention", f"must be a name, a mapping or a list of mappings, got {attention!r}")
        given = {"every": every, "share": share, **options}
        extra = [name for name, value in given.items() if value is not None]
        if extra:
            raise ConfigError.at(extra[0], "must be in the mapping that attention is")
        return attention
    found = {**default_config(attention), "every": max(1, min(4, num_blocks // 2))}
    if every is None and "after" in options:
        del found["every"]
    given = {"every": every, "share": share}
    return {**found, **{name: value for name, value in given.items() if value is not None}, **options}


def _placed(model: nn.Module, place: _Place, configs: Sequence[AttentionConfig], *, explicit: bool) -> list[_Placed]:
    """Return the modules that get attention, with their layers and what is recorded of them.

    Each way is tried on a copy of the model, because a model may look at the classes of its blocks, or run them by
    other references than their names.
    """
    shares = _layers(configs, place.widths, place.shapes, None, model).shares
    ways: list[Callable[..., list[_Placed]]]
    ways = [_inside] if place.sequential is not None else [] if shares else [_after_each]
    ways += [_around, functools.partial(_around, owner="")]
    faults: list[str] = []
    for way in ways:
        placed = way(model, place, configs)
        attended = [path for path, *_ in placed if isinstance(model.get_submodule(path), Attended)]
        if attended and not faults:
            raise _occupied(attended[0])
        fault = "it has attention" if attended else _fault(model, place, placed)
        if fault is None:
            return placed
        faults.append(fault)
    reason, remedy = faults[0], "choose other modules with body=..."
    if shares and not explicit:
        placed = _after_each(model, place, [replace(attention, share=1) for attention in configs])
        if _fault(model, place, placed) is None:
            warnings.warn(f"attached without sharing: {reason}; {remedy}, or share=1 if this is meant", stacklevel=4)
            return placed
    raise ConfigError.at("body", f"must name modules that can be followed by attention, but {reason}; {remedy}")


def _fault(model: nn.Module, place: _Place, placed: Sequence[_Placed]) -> str | None:
    """Return why attention in a model would not run, or would change more than it should; `None` if all is well."""
    for path, *_ in placed:
        if "forward" in vars(model.get_submodule(path)):
            what = _named(model, path)
            return f"the `forward` of {what} is set on the module, not its class, and would run without attention"

    def give(twin: nn.Module) -> list[Probe]:
        probes = [Probe(len(record["widths"])) for *_, record in placed]
        for probe, (path, kind, _, record) in zip(probes, placed, strict=True):
            _give(twin.get_submodule(path), kind, cast(SiteAttention, probe), record)
        return probes

    return difference(model, place.calls.inputs, give)


def _named(model: nn.Module, path: str) -> str:
    """Return what to call a module in a message."""
    return f"{path!r} of {type(model).__name__}" if path else type(model).__name__


def _inside(model: nn.Module, place: _Place, configs: Sequence[AttentionConfig]) -> list[_Placed]:
    """Return the `nn.Sequential` that runs the blocks, with the layers."""
    path = cast(str, place.sequential)
    module = model.get_submodule(path)
    layers = _layers(configs, place.widths, place.shapes, module, model)
    return [
        (path, AttendedSequential, layers, _record(AttendedSequential, module, configs, place.widths, place.shapes))
    ]


def _around(
    model: nn.Module, place: _Place, configs: Sequence[AttentionConfig], owner: str | None = None
) -> list[_Placed]:
    """Return the module whose forward runs the blocks, with the layers; or a module around it."""
    owner = _caller_of_all(place) if owner is None else owner
    module = model.get_submodule(owner)
    sites = [site.path.removeprefix(join_path(owner, "")) for site in place.sites]
    layers = _layers(configs, place.widths, place.shapes, module, model)
    record = _record(AttendedCaller, module, configs, place.widths, place.shapes, sites)
    return [(owner, AttendedCaller, layers, record)]


def _after_each(model: nn.Module, place: _Place, configs: Sequence[AttentionConfig]) -> list[_Placed]:
    """Return the blocks that get layers of their own."""
    found: list[_Placed] = []
    chosen = [set(attention.sites(len(place.sites))) for attention in configs]
    turns = [0] * len(configs)
    for index, site in enumerate(place.sites):
        own = []
        for number, attention in enumerate(configs):
            if index in chosen[number]:
                options = full_options(attention, turns[number])
                own.append(replace(attention, every=None, after=(0,), share=1, options=options))
                turns[number] += 1
        if own:
            module = model.get_submodule(site.path)
            layers = _layers(own, [site.shape[0]], [0], module, model)
            record = _record(AttendedModule, module, own, [site.shape[0]], [0])
            found.append((site.path, AttendedModule, layers, record))
    return found


def _layers(
    configs: Sequence[AttentionConfig],
    widths: Sequence[int],
    shapes: Sequence[int],
    beside: nn.Module | None,
    model: nn.Module,
) -> SiteAttention:
    """Return the layers, with the device and dtype of the parameters of `beside`; without it, on the meta device."""
    if beside is None:
        with torch.device("meta"):
            return SiteAttention(configs, len(widths), widths, shapes)
    layers = SiteAttention(configs, len(widths), widths, shapes)
    parameters = itertools.chain(beside.parameters(), model.parameters())
    weight = next((p for p in parameters if p.is_floating_point()), None)
    if weight is not None:
        layers.to(weight.device, weight.dtype)
    return layers.train(beside.training)


def _caller_of_all(place: _Place) -> str:
    """Return the path of the module whose forward, with those of modules in it, calls all sites."""
    callers = [site.caller.split(".") if site.caller else [] for site in place.sites]
    common = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*callers, strict=False))
    parts = [names[0] for names in common]
    while parts and ".".join(parts) not in place.calls.called:
        parts.pop()
    return ".".join(parts)


# --- what is recorded -------------------------------------------------------------------------------------------------


def _record(
    kind: type[Attended],
    module: nn.Module,
    configs: Sequence[AttentionConfig],
    widths: Sequence[int],
    shapes: Sequence[int],
    sites: Sequence[str] = (),
) -> dict[str, Any]:
    """Return what `reattach` needs."""
    start = join_path(sites[0], "") if sites else ""
    names = [name for name, _ in itertools.chain(module.named_parameters(), module.named_buffers())]
    return {
        "kind": kind.__name__,
        "key": next((name for name in names if name.startswith(start)), names[0] if names else "weight"),
        "attention": _described(configs, len(widths)),
        "widths": list(widths),
        "shapes": list(shapes),
        "sites": list(sites),
    }


def _described(configs: Sequence[AttentionConfig], num_blocks: int) -> Any:
    """Return mappings for JSON; `None` if it cannot represent an option: enough to refuse the weights with a reason."""
    described = [
        {
            "type": attention.type,
            "after": list(attention.sites(num_blocks)),
            **({"share": attention.share} if attention.share > 1 else {}),
            **full_options(attention),
        }
        for attention in configs
    ]
    text = as_json({"attention": described})
    return None if text is None else json.loads(text)["attention"]


_INITIAL = ("zero_init",)  # options without effect on a layer whose weights are loaded


def _differences(recorded: Tensor, own: Mapping[str, Any]) -> list[str]:
    """Return how attention that was recorded with weights differs from a model's own."""
    try:
        found = decode_options(recorded)
        with old_names_allowed():
            configs = read_attention(found["attention"], len(found["widths"]))
    except (ConfigError, ArithmeticError, KeyError, RecursionError, TypeError, ValueError) as error:
        return [f"records attention that cannot be read ({type(error).__name__}: {error})"]
    theirs = {**found, "attention": _described(configs, len(found["widths"]))}
    if None in (theirs["attention"], own["attention"]):
        return []
    told = [
        f"{name} is {theirs.get(name)} in the weights, and {own[name]} in the model"
        for name in ("sites", "widths", "shapes")
        if theirs.get(name) != own[name]
    ]
    pairs: list[tuple[dict[str, Any], dict[str, Any]]]
    pairs = list(itertools.zip_longest(theirs["attention"], own["attention"], fillvalue={}))
    for number, (their, our) in enumerate(pairs):
        at = f"attention.{number}" if len(pairs) > 1 else "attention"
        for name in [*their, *(name for name in our if name not in their)]:
            values = [mapping.get(name, 1 if name == "share" and mapping else "missing") for mapping in (their, our)]
            if values[0] != values[1] and name not in _INITIAL:
                told.append(f"{join_path(at, name)} is {values[0]} in the weights, and {values[1]} in the model")
    return [f"{text}; attach as recorded, or load with strict=False" for text in told]


# --- where it can go --------------------------------------------------------------------------------------------------


def _find_place(model: nn.Module, body: str | Sequence[str] | None, example: Tensor | tuple[Any, ...] | None) -> _Place:
    """Return the blocks that `body` names, or those of the largest trunk."""
    modules = dict(model.named_modules(remove_duplicate=False))
    names = None if body is None else [name.strip() for name in body.split(",")] if isinstance(body, str) else body
    calls = watch_calls(model, example)
    paths = None if names is None else _paths(model, modules, names, calls)
    if paths is not None and (len(names or ()) > 1 or "*" in (names or ("",))[0]):
        sites = {path: _site(model, calls, path) for path in paths}
        return _Place(tuple(sites[path] for path in calls.sites if path in sites), None, calls)
    within = paths[0] if paths else ""
    trunks = find_trunks(model, calls, within)
    if paths is None:
        if not trunks:
            raise ConfigError.at("body", f"must be named; {_without_trunk(model, calls)}")
        others = besides(trunks[0], trunks)[:_SHOWN]
        offered = f"; body=... chooses another trunk: {', '.join(map(str, others))}" if others else ""
        _LOG.info("attached to %s%s", trunks[0], offered)
        share = trunks[0].num_parameters / max(1, sum(p.numel() for p in model.parameters()))
        if (others and share < _SMALL_SHARE) or any(
            4 * other.num_parameters > trunks[0].num_parameters for other in others
        ):
            small = f", which has {share:.1%} of the parameters" if share < _SMALL_SHARE else ""
            warnings.warn(f"attached to {trunks[0]}{small}{offered}", stacklevel=4)
        within = trunks[0].name
    elif isinstance(modules[within], Attended):
        raise _occupied(within)
    module = modules.get(within)
    children = _children(module, within, calls)
    whole = type(module) is nn.Sequential and len(children) == len(module) and within in calls.called
    if whole and {(site.shape[0], site.caller) for site in children} == {(children[0].shape[0], within)}:
        return _Place(tuple(children), within, calls)
    if trunks and (paths is None or trunks[0].name == within or not children):
        return _Place(trunks[0].sites, None, calls)
    return _Place(tuple(children) or (_site(model, calls, within),), None, calls)


def _paths(model: nn.Module, modules: Mapping[str, nn.Module], names: Sequence[str], calls: Calls) -> list[str]:
    """Return the paths of the modules that names and patterns stand for."""
    found: list[str] = []
    for name in names:
        if "*" not in name and name not in modules:
            known = [trunk.name for trunk in find_trunks(model, calls)[:_SHOWN]]
            known = known or [child for child, _ in model.named_children()]
            layer = f"; for the layer, write attention={name!r}" if name in LAYERS else suggestion(name, known)
            raise ConfigError.at("body", f"must be the path of a module, got {name!r}{layer}")
        matched = [name] if "*" not in name else matching(name, modules)
        if not matched:
            message = f"must name modules, but {name!r} names nothing in {type(model).__name__}{_offer(model, calls)}"
            raise ConfigError.at("body", message)
        found += matched
    return list(dict.fromkeys(found))


def _site(model: nn.Module, calls: Calls, path: str) -> Site:
    """Return the module at a path as a site, or say why attention cannot follow it."""
    module = model.get_submodule(path)
    if isinstance(module, Attended):
        raise _occupied(path)
    if path in calls.sites:
        return calls.sites[path]
    fault = calls.faults.get(path, f"is not called by {type(model).__name__}")
    outer = _repeated(calls)
    if outer is not None and path.startswith(join_path(outer, "")):
        fault += f", because {outer!r} is; attach(model.get_submodule({outer!r})) gives it attention"
    own = [outer for outer, module in model.named_modules() if "forward" in vars(module)]
    if path not in calls.faults and own:
        fault += f", because the `forward` of {_named(model, own[0])} is set on the module, not its class"
    kind = f"a {type(module).__name__}"
    raise ConfigError.at(
        "body",
        f"must name modules that return one feature map, got {path!r}, {kind}, which {fault}{_offer(model, calls)}",
    )


def _children(module: nn.Module | None, path: str, calls: Calls) -> list[Site]:
    """Return the children of a list of modules that return feature maps, in the order in which they run."""
    if not isinstance(module, (nn.Sequential, nn.ModuleList)):
        return []
    return [site for site in calls.sites.values() if site.path in {join_path(path, name) for name in module._modules}]


def _offer(model: nn.Module, calls: Calls) -> str:
    """Return what can be named instead."""
    trunks = find_trunks(model, calls)
    found = [str(trunk) for trunk in [*trunks[:1], *besides(trunks[0], trunks)][:_SHOWN]] if trunks else []
    return f"; body can be {' or '.join(found)}" if found else ""


def _without_trunk(model: nn.Module, calls: Calls) -> str:
    name = type(model).__name__
    repeated = _repeated(calls)
    if repeated is not None:
        return (
            f"{name} runs {repeated!r}, which has a trunk, several times in a forward pass; "
            f"attach(model.get_submodule({repeated!r})) gives it attention"
        )
    return f"{name} has no run of numbered modules that return feature maps of one size and width"


def _repeated(calls: Calls) -> str | None:
    """Return the path of the outermost module that is called several times and has several numbered modules."""
    several = sorted(path for path, fault in calls.faults.items() if path and "times" in fault)
    for outer in sorted(several, key=lambda path: path.count(".")):
        inside = [path for path in several if re.match(re.escape(outer) + r"\..*\d", path)]
        if len(inside) > 1:
            return outer
    return None


def _occupied(path: str) -> ConfigError:
    where = repr(path) if path else "the network itself"
    return ConfigError.at("body", f"must have no attention yet, got {where}; detach, or attach a list of mappings")
