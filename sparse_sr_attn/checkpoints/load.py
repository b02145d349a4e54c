"""Load weights, from this library or other code bases, into their network."""

import importlib
import json
import math
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparse_sr_attn.backbones.attach import (
    SLOT,
    detach,
    is_attended,
    reattach,
    without_attention,
    without_records,
)
from sparse_sr_attn.backbones.base import OPTIONS, Network
from sparse_sr_attn.backbones.edsr import EDSR
from sparse_sr_attn.backbones.lcoan import LCoAN
from sparse_sr_attn.backbones.rcan import RCAN
from sparse_sr_attn.blocks.attention_config import default_config
from sparse_sr_attn.checkpoints.foreign import WITH_ATTENTION, ForeignNetwork, carry_options
from sparse_sr_attn.checkpoints.layouts import LAYOUTS, Layout, Options, State
from sparse_sr_attn.checkpoints.read import carried_options, find_weights, is_plain, listed, read_file, records_in
from sparse_sr_attn.config import fields, old_names_allowed, read, renamed
from sparse_sr_attn.errors import CheckpointError, ConfigError, Problem
from sparse_sr_attn.registry import suggestion

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_TAIL = ("upsample.", "conv_last.")
_OTHERS = {"MDSR, one network for several factors": r"pre_process\.\d+\.\d+\.body\.\d+\.\w+"}
_ELSEWHERE = "use them in their own code, where `attach` adds attention"
_UNUSABLE = "the options stored with the weights cannot be used here:\n"


def load_model(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    model: nn.Module | None = None,
    allow_tail_reinit: bool = False,
    **overrides: Any,
) -> Network:
    """Build the network that weights belong to and load them, in evaluation mode.

    Args:
        source: a file (`.safetensors` or from `torch.save`), a state dict, or the name of weights included in the
            library (see `trained_weights`). Weights may be nested in containers (`params`, `state_dict`, ...) and keys
            may have a prefix (`module.`, `net.`, ...) of any name. Averaged weights (EMA, SWA) take precedence. Half
            precision becomes float32.
        model: a third-party network like the one that the weights were trained in, without attention. What `attach`
            added to it is recorded in the weights and attached again, in place. Images in and out are in
            0..`img_range`, the only override (default: 1).
        allow_tail_reinit: allow another `upscale` than that of the weights: the body is loaded, `upsample` and
            `conv_last` are reinitialised.
        overrides: options of the network (see `LCoAN`, `EDSR`, `RCAN`) that are not recorded in the weights or differ;
            `attention=...` adds new layers to weights without attention.

    Raises:
        CheckpointError: the file cannot be read, its weights match no known layout or not the network that they and the
            overrides describe, or they are not finite; names the keys.
        ConfigError: an override is unknown or invalid.

    Note:
        Files are read as data; no code in them runs. Our networks with attention store their options in the state dict.
        `docs/checkpoints.md` lists what is assumed for all others.

    Examples:
        >>> model = load_model("LCoAN-light_x2")  # or a file, or a state dict
        >>> model(torch.rand(1, 3, 12, 12)).shape
        torch.Size([1, 3, 24, 24])
        >>> load_model(EDSR(num_block=4, upscale=2).state_dict(), img_range=1.0).img_range
        1.0
    """
    return load_and_tell(source, overrides, model=model, allow_tail_reinit=allow_tail_reinit)[0]


def load_and_tell(
    source: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Options,
    *,
    model: nn.Module | None = None,
    allow_tail_reinit: bool = False,
) -> tuple[Network, str | None]:
    """Load like `load_model`; also return a note if averaged weights were chosen over others.

    Raises:
        CheckpointError: as in `load_model`.
        ConfigError: as in `load_model`.
    """
    if not isinstance(model, nn.Module | None):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise ConfigError.at("model", f"must be a network, a torch.nn.Module, such as Net(...), got {what}")
    where = "the state dict" if isinstance(source, Mapping) else str(source)
    try:
        content = source if isinstance(source, Mapping) else read_file(source)
        weights, beside, found = find_weights(content, model)
        told = None
        if found is not None and found.chosen.averaged and found.others:
            told = f"using the averaged weights ({found.chosen.name}, not {' or '.join(found.others)})"
        if model is not None:
            return _load_into(model, weights, beside, overrides), told
        return _load(weights, beside, overrides, allow_tail_reinit), told
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error.__cause__


def _load(state: dict[str, Tensor], beside: State, overrides: Options, allow_tail_reinit: bool) -> Network:
    carried = carried_options(state.pop(OPTIONS, beside.get(OPTIONS)))
    records = records_in(state)
    if carried.get("type") in (WITH_ATTENTION, "Attended"):
        return _load_foreign(state, beside, carried, overrides, records)
    if records:
        state, attention = _as_ours(state, records)
        overrides = {"attention": attention, **overrides}
    _refuse_others(state)
    family = carried.pop("type", None)
    layout = next((layout for layout in LAYOUTS if layout.build.__name__ == family), None)
    layout = layout or next((layout for layout in LAYOUTS if layout.recognises(state)), None)
    if layout is None:
        tried = "".join(f"\n  {layout.name}, with keys like {layout.signature}" for layout in LAYOUTS)
        keys = [f"{key} {tuple(value.shape)}" for key, value in state.items()]
        raise CheckpointError(
            f"must be of a known layout. Tried:{tried}\nGot {len(keys)} keys: {listed(keys)}\n"
            "For another network, pass it: load_model(..., model=...), or on the command line --host FILE.py:NAME"
        )
    overrides = read(layout.build, overrides, siblings=["allow_tail_reinit"])
    named = _renamed(layout, layout.convert(state, overrides))
    shapes = layout.shapes(named)
    needs = {} if carried else layout.required
    needed = [n for n, start in needs.items() if n not in overrides and any(key.startswith(start) for key in named)]
    if needed:
        called = ", ".join(f"{name}={_EXAMPLES[name]!r}" for name in needed)
        typed = shlex.join(f"{name}={json.dumps(_EXAMPLES[name])}" for name in needed)
        raise CheckpointError(
            f"{' and '.join(needed)} {'is' if len(needed) == 1 else 'are'} not recorded in weights of {layout.name}; "
            f"pass {'it' if len(needed) == 1 else 'them'} when loading: load_model(..., {called}), or on the command "
            f"line --set {typed}"
        )
    trained = carried.get("upscale", shapes["upscale"])
    upscale = overrides.get("upscale", trained)
    fresh = [layout.may_be_missing]
    if upscale != trained:
        if not allow_tail_reinit:
            raise CheckpointError(
                f"upscale must be {trained}, that of the weights, got {upscale}; allow_tail_reinit=True "
                "keeps the body and reinitialises the tail"
            )
        named = {key: value for key, value in named.items() if not key.startswith(_TAIL)}
        fresh += [rf"{re.escape(start)}.*" for start in _TAIL]
    if "attention" in overrides and not any(key.startswith("attention.") for key in named):
        fresh.append(r"attention\..*")
    for name in carried.keys() & shapes.keys():  # before as much is built as a hostile file asks for
        if name.startswith("num_") and carried[name] != shapes[name]:
            raise CheckpointError(f"the options say {name} {carried[name]}, but the weights have {shapes[name]}")
    size = sum(value.numel() for value in state.values())
    _refuse_giants(carried, limit=size)
    names = {*named, *beside}
    if any(name.startswith("attention.") for name in named):
        overrides = _as_written(overrides, False, names)
    found = _as_written({**layout.defaults(state, shapes), **shapes, **carried}, layout.build is LCoAN, names)
    with _Budget(size):
        model = _built(layout, found, overrides)
    if beside:  # averages of parameters only, whose buffers are those of the network itself
        kept = _renamed(layout, layout.convert({k: v for k, v in beside.items() if k != OPTIONS}, overrides))
        buffers = {name for name, _ in model.named_buffers()} & kept.keys()
        named = {**{name: kept[name] for name in buffers}, **named}
    _check(model, named, "|".join(fresh))
    model.load_state_dict(named, strict=False)
    return model.eval()


def _refuse_others(state: Iterable[str]) -> None:
    """Raise CheckpointError for networks that have the keys of a known layout and more."""
    for other, pattern in _OTHERS.items():
        if any(re.fullmatch(pattern, key) for key in state):
            raise CheckpointError(f"these are weights of {other}, which this library does not have; {_ELSEWHERE}")


def _as_ours(state: dict[str, Tensor], records: Mapping[str, Options]) -> tuple[dict[str, Tensor], object]:
    """Return the weights of an attended EDSR or RCAN under the names of ours, and their option `attention`.

    Raises:
        CheckpointError: they are of another network.
    """
    layout = next((layout for layout in LAYOUTS if layout.recognises(without_attention(state))), None)
    if layout is None or layout.build not in (EDSR, RCAN) or records.keys() != {"body"}:
        hosts = ", ".join(sorted({str(record.get("host")) for record in records.values()}))
        places = " and ".join(repr(path) if path else "the top level" for path in records)
        raise CheckpointError(
            f"these weights have attention that sparse_sr_attn attached to {places} of a "
            f"third-party network ({hosts}), which only its own code can build; pass the network without attention: "
            "load_model(..., model=...), or on the command line --host FILE.py:NAME"
        )
    start = f"body.{SLOT}."
    named = {f"attention.{key.removeprefix(start)}" if key.startswith(start) else key: v for key, v in state.items()}
    return without_records(named), records["body"]["attention"]


def _load_into(model: nn.Module, state: dict[str, Tensor], beside: State, overrides: Options) -> Network:
    """Attach what weights record to a third-party network, and load them.

    Raises:
        CheckpointError: the weights do not fit the network, or another one.
    """
    img_range = float(overrides.get("img_range", 1.0))
    if unknown := [name for name in overrides if name != "img_range"]:
        raise ConfigError(Problem(name, "unknown; with model=..., only img_range can be given") for name in unknown)
    if is_attended(model):
        raise ConfigError.at("model", "must have no attention yet, because the weights say what to attach")
    records = records_in(state)
    size = sum(value.numel() for value in state.values())
    _refuse_giants(list(records.values()), limit=size)
    try:
        with _Budget(size), old_names_allowed():
            reattach(model, records)
    except (ConfigError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}" if not isinstance(error, ConfigError) else f"{error}{_hint(error)}"
        raise CheckpointError(f"the attention recorded with the weights cannot be attached: {reason}") from error
    try:
        return _filled(model, None, state, beside, img_range=img_range)
    except BaseException:
        if records:
            detach(model)
        raise


def _filled(
    network: nn.Module, options: Options | None, state: dict[str, Tensor], beside: State, *, img_range: float = 1.0
) -> Network:
    """Load weights into a third-party network, after checking them; return it behind the interface of ours."""
    buffers = {name for name, _ in network.named_buffers()} & beside.keys() - {OPTIONS}
    state = without_records({**{name: beside[name] for name in buffers}, **state}, network)
    state.pop(OPTIONS, None)
    _check(network, state, "(?!)")
    model = ForeignNetwork(network, options, img_range=img_range)
    model.load_state_dict(state)
    return model.eval()


def _load_foreign(
    state: dict[str, Tensor], beside: State, carried: Options, overrides: Options, records: Mapping[str, Options]
) -> Network:
    """Load a network of BasicSR with attached attention."""
    unknown = [name for name in overrides if name not in carried]
    if unknown:
        known = [name for name in carried if name != "type"]
        raise ConfigError(Problem(name, f"unknown{suggestion(name, known)}") for name in unknown)
    options = {**carried, **overrides, "type": WITH_ATTENTION}
    rest = {name: value for name, value in options.items() if name != "type"}
    if not records:
        rest = _as_attached_before(rest, state)
    size = sum(value.numel() for value in state.values())
    _refuse_giants(carried, limit=size)
    try:
        integration = importlib.import_module("sparse_sr_attn_basicsr.rebuild")
        with _Budget(size), old_names_allowed():
            if records and not overrides.keys() & {"attention", "body"}:
                network = reattach(integration.rebuild({**rest, "attention": None}), records)
                carry_options(network, options)
            else:
                network = integration.rebuild(rest)
    except CheckpointError:
        raise
    except ConfigError as error:
        if overrides and all(problem.path.split(".")[0] in overrides for problem in error.problems):
            raise
        raise CheckpointError(f"{_UNUSABLE}{error}{_hint(error)}") from error
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"these weights are of a network of BasicSR, which cannot be imported ({error}); see docs/basicsr.md for "
            "its installation"
        ) from error
    except Exception as error:  # user code can raise anything
        raise CheckpointError(f"{_UNUSABLE}{type(error).__name__}: {error}") from error
    return _filled(network, options, state, beside)


def _as_attached_before(options: Options, keys: Iterable[str]) -> Options:
    """Return the options of `Attended` with what was the default when weights had no record of their attention."""
    if isinstance(options.get("attention"), str):
        options["attention"] = default_config(options["attention"])
    if options.get("body") is None:
        options["body"] = next((start for key in keys if (start := key.partition(".attention.")[0]) != key), None)
    return options


def _as_written(options: Options, attends: bool, keys: Iterable[str]) -> Options:
    """Add the options of LCoA that did not exist when the weights were written, with their published values.

    Args:
        options: options of a network or an attention layer.
        attends: whether these are the options of LCoA itself.
        keys: keys of the weights.
    """
    options = dict(options)
    if attends and not any(".scale_logits." in key for key in keys):
        options.setdefault("similarity", "dot")
    if attends and not any(key.endswith(".rank") for key in keys):
        options.setdefault("cluster_order", "index")
    for name in ("attention", "block"):
        maps = options.get(name)
        if isinstance(maps, Mapping):
            options[name] = _as_written(dict(maps), maps.get("type") == "LCoA", keys)
        elif isinstance(maps, (list, tuple)):
            options[name] = [
                _as_written(dict(item), item.get("type") == "LCoA", keys) if isinstance(item, Mapping) else item
                for item in maps
            ]
    return options


def _hint(error: ConfigError) -> str:
    """Return advice for names that a module of the user would register."""
    if any(problem.path.endswith("type") for problem in error.problems):
        return "\nA layer or network of your own must be imported first; on the command line --import FILE.py does that"
    return ""


def _refuse_giants(options: object, limit: int, name: str = OPTIONS) -> None:
    """Raise CheckpointError for counts in the options that no network with so few weights can have."""
    if isinstance(options, Mapping):
        for key, value in options.items():
            _refuse_giants(value, limit, str(key))
    elif isinstance(options, list):
        for value in options:
            _refuse_giants(value, limit, name)
    elif name.startswith("num_") and isinstance(options, int) and options > limit:
        raise CheckpointError(f"the options say {name} {options}, but there are only {limit} numbers in the file")


class _Budget(TorchFunctionMode):
    """Limits the number and total size of tensors created inside to those of a file.

    So the options of a small file can neither fill the memory nor take forever.

    Args:
        size: number of elements in the file.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.left = 16 * size + 2**24

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function unless it would create a tensor over the limit."""
        shape = args[0] if args and isinstance(args[0], (list, tuple)) else args
        # `no_grad` goes through here with a bool when it ends, and must not fail then.
        if args and function is not torch.tensor and all(type(side) is int for side in shape):
            self.left -= math.prod(shape) + 4096
            if self.left < 0:
                raise CheckpointError(
                    f"the options ask for a far larger network than a file of {self.size} numbers can hold"
                )
        return function(*args, **(kwargs or {}))


def _renamed(layout: Layout, state: State) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for key, value in state.items():
        ours = layout.our_key(key)
        if ours in named:
            raise CheckpointError(f"keys of {layout.name} must be distinct, but {key!r} is a second {ours!r}")
        if ours is not None:
            named[ours] = value.squeeze(0) if ours.endswith(".centroids") and value.ndim == 3 else value
    return named


def _built(layout: Layout, found: Options, overrides: Options) -> Network:
    """Build the network; blame problems on the overrides or on the weights."""
    try:
        with old_names_allowed():  # in files that were written before
            found = renamed(found, fields(layout.build))
            rest = {name: value for name, value in found.items() if name not in overrides}
            return layout.build(**read(layout.build, rest), **overrides)
    except ConfigError as error:
        if all(problem.path.split(".")[0] in overrides for problem in error.problems):
            raise
        raise CheckpointError(f"{_UNUSABLE}{error}{_hint(error)}") from error


def _check(model: nn.Module, state: State, fresh: str) -> None:
    """Raise CheckpointError for weights that do not fit `model`; name missing, unexpected and unusable keys."""
    expected = {key: value for key, value in without_records(model.state_dict()).items() if key != OPTIONS}
    missing = [key for key in expected if key not in state and not re.fullmatch(fresh, key)]
    unexpected = [key for key in state if key not in expected]
    common = {key: (expected[key], value) for key, value in state.items() if key in expected}
    sizes = [
        f"{key} must be {tuple(ours.shape)}, got {tuple(value.shape)}"
        for key, (ours, value) in common.items()
        if ours.shape != value.shape
    ]
    faults = _lines({"missing": missing, "unexpected": unexpected, "of wrong size": sizes}) + unusable(expected, state)
    if faults:
        names = " (our names)" if isinstance(model, Network) else ""
        raise CheckpointError(f"does not fit {type(model).__name__}{names}:{faults}")


def unusable(expected: State, state: Mapping[str, Any]) -> str:
    """Return the entries of `state` that PyTorch would load although they are unusable, as lines for a message.

    These are entries that are not dense tensors, have another dtype than in `expected`, or are not finite.
    """
    common = {key: (expected[key], value) for key, value in state.items() if key in expected}
    types = [
        f"{key} must be {_kind(ours)}, got {_kind(value)}"
        for key, (ours, value) in common.items()
        if not is_plain(key, value) or value.dtype not in (_FLOATS if ours.dtype in _FLOATS else (ours.dtype,))
    ]
    infinite = [] if types else [key for key, (_, value) in common.items() if not value.isfinite().all()]
    return _lines({"of wrong type": types, "not finite": infinite})


def _kind(value: object) -> str:
    """Return the dtype of a dense tensor, or a description of anything else."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    dtype = str(value.dtype).removeprefix("torch.")
    return dtype if is_plain("", value) else f"{'meta' if value.is_meta else value.layout} {dtype}"


def _lines(faults: Mapping[str, list[str]]) -> str:
    return "".join(f"\n  {fault}: {listed(keys)}" for fault, keys in faults.items() if keys)


_EXAMPLES: Options = {
    "window_sizes": [4, 8, 16],
    "attention": {"type": "LCoA", "every": 4, "share": 4, "chunk_size": 144},
    "chunk_size": 384,
    "res_scale": 0.1,
}
