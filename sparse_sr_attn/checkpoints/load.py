"""Load weights, of other people and of our own, into the network that they belong to."""

import importlib
import json
import math
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sparse_sr_attn.backbones.base import OPTIONS, Network
from sparse_sr_attn.backbones.lcoan import LCoAN
from sparse_sr_attn.checkpoints.foreign import ATTENDED, ForeignNetwork
from sparse_sr_attn.checkpoints.layouts import LAYOUTS, Layout, Options, State
from sparse_sr_attn.checkpoints.read import carried_options, find_weights, is_plain, listed, read_file
from sparse_sr_attn.config import read
from sparse_sr_attn.errors import CheckpointError, ConfigError, Problem
from sparse_sr_attn.registry import suggestion

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_TAIL = ("upsample.", "conv_last.")
_UNUSABLE = "the options that belong to the weights cannot be used here:\n"


def load_model(
    source: str | os.PathLike[str] | Mapping[str, Any], *, allow_tail_reinit: bool = False, **overrides: Any
) -> Network:
    """Return the network that weights belong to, with these weights, in evaluation mode.

    Args:
        source: a file (`.safetensors`, or what `torch.save` wrote), a state dict, or the name of weights that come with
            the library (see `trained_weights`). The weights may be inside containers (`params`, `state_dict`, ...),
            and their keys may have a prefix (`module.`, `net.`, ...), whatever these are called. Averaged weights
            (EMA, SWA) go before the others. Half precision becomes float32.
        allow_tail_reinit: let `upscale` differ from that of the weights: the body is kept, `upsample` and `conv_last`
            start afresh.
        overrides: options of the network (see `LCoAN`, `EDSR`, `RCAN`) that its weights do not tell or tell otherwise;
            `attention=...` for weights without attention adds fresh layers.

    Raises:
        CheckpointError: the file cannot be read, or its weights fit no layout, or not the network that they and the
            overrides describe, or are not finite; says what was tried and names the keys.
        ConfigError: an override is unknown or breaks a rule.

    Note:
        Files are read as data; no code in them runs. Our networks with attention carry their options in their state
        dict. For all others, `docs/checkpoints.md` says what is assumed.

    Examples:
        >>> model = load_model("LCoAN-light_x2")  # or a file, or a state dict
        >>> model(torch.rand(1, 3, 12, 12)).shape
        torch.Size([1, 3, 24, 24])
        >>> load_model(EDSR(num_block=4, upscale=2).state_dict(), img_range=1.0).img_range
        1.0
    """
    return load_and_tell(source, overrides, allow_tail_reinit=allow_tail_reinit)[0]


def load_and_tell(
    source: str | os.PathLike[str] | Mapping[str, Any], overrides: Options, *, allow_tail_reinit: bool = False
) -> tuple[Network, str | None]:
    """Return what `load_model` does, and which weights were taken where there are averaged ones beside others.

    Raises:
        CheckpointError: as `load_model` does.
        ConfigError: as `load_model` does.
    """
    where = "the state dict" if isinstance(source, Mapping) else str(source)
    try:
        content = source if isinstance(source, Mapping) else read_file(source)
        weights, beside, found = find_weights(content)
        told = None
        if found is not None and found.chosen.averaged and found.others:
            told = f"the averaged weights are taken ({found.chosen.name}, not {' or '.join(found.others)})"
        return _load(weights, beside, overrides, allow_tail_reinit), told
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error.__cause__


def _load(state: dict[str, Tensor], beside: State, overrides: Options, allow_tail_reinit: bool) -> Network:
    carried = carried_options(state.pop(OPTIONS, beside.get(OPTIONS)))
    if carried.get("type") == ATTENDED:
        return _load_foreign(state, beside, carried, overrides)
    family = carried.pop("type", None)
    layout = next((layout for layout in LAYOUTS if layout.build.__name__ == family), None)
    layout = layout or next((layout for layout in LAYOUTS if layout.recognises(state)), None)
    if layout is None:
        tried = "".join(f"\n  {layout.name}, with keys like {layout.signature}" for layout in LAYOUTS)
        keys = [f"{key} {tuple(value.shape)}" for key, value in state.items()]
        raise CheckpointError(f"must be of a layout known here. Tried:{tried}\nGot {len(keys)} keys: {listed(keys)}")
    overrides = read(layout.build, overrides, siblings=["allow_tail_reinit"])
    named = _renamed(layout, layout.convert(state, overrides))
    shapes = layout.shapes(named)
    needs = {} if carried else layout.required
    needed = [n for n, start in needs.items() if n not in overrides and any(key.startswith(start) for key in named)]
    if needed:
        called = ", ".join(f"{name}={_EXAMPLES[name]!r}" for name in needed)
        typed = shlex.join(f"{name}={json.dumps(_EXAMPLES[name])}" for name in needed)
        raise CheckpointError(
            f"weights of {layout.name} do not tell {' and '.join(needed)}; say it: load_model(..., {called}), or on "
            f"the command line --set {typed}"
        )
    trained = carried.get("upscale", shapes["upscale"])
    upscale = overrides.get("upscale", trained)
    fresh = [layout.may_be_missing]
    if upscale != trained:
        if not allow_tail_reinit:
            raise CheckpointError(
                f"upscale must be {trained}, that of the weights, got {upscale}; allow_tail_reinit=True "
                "keeps the body and starts what comes after it afresh"
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


def _load_foreign(state: dict[str, Tensor], beside: State, carried: Options, overrides: Options) -> Network:
    """Return a network of BasicSR into which attention was put."""
    unknown = [name for name in overrides if name not in carried]
    if unknown:
        known = [name for name in carried if name != "type"]
        raise ConfigError(Problem(name, f"unknown{suggestion(name, known)}") for name in unknown)
    options = {**carried, **overrides}
    rest = {name: value for name, value in options.items() if name != "type"}
    size = sum(value.numel() for value in state.values())
    _refuse_giants(carried, limit=size)
    try:
        integration = importlib.import_module("sparse_sr_attn_basicsr.rebuild")
        with _Budget(size):
            network = integration.rebuild(rest)
    except CheckpointError:
        raise
    except ConfigError as error:
        if overrides and all(problem.path.split(".")[0] in overrides for problem in error.problems):
            raise
        raise CheckpointError(f"{_UNUSABLE}{error}{_hint(error)}") from error
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"these weights are of a network of BasicSR, which cannot be imported ({error}); docs/basicsr.md tells how "
            "to install it"
        ) from error
    except Exception as error:  # somebody else's code can raise anything
        raise CheckpointError(f"{_UNUSABLE}{type(error).__name__}: {error}") from error
    model = ForeignNetwork(network, options)
    buffers = {name for name, _ in network.named_buffers()} & beside.keys() - {OPTIONS}
    state = {**{name: beside[name] for name in buffers}, **state}
    _check(model, state, "(?!)")
    model.load_state_dict(state)
    return model.eval()


def _as_written(options: Options, attends: bool, keys: Iterable[str]) -> Options:
    """Return options with those of LCoA that had no name when the weights were written: it was as published then.

    Args:
        options: of a network, or of an attention layer.
        attends: whether these are the options of LCoA themselves.
        keys: of the weights.
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
    """Return what to do about names that somebody's own module would register."""
    if any(problem.path.endswith("type") for problem in error.problems):
        return "\nA layer or network of your own must be imported first; on the command line --import FILE.py does that"
    return ""


def _refuse_giants(options: object, limit: int, name: str = OPTIONS) -> None:
    """Refuse counts that no network with so many weights can have, wherever they stand in the options."""
    if isinstance(options, Mapping):
        for key, value in options.items():
            _refuse_giants(value, limit, str(key))
    elif isinstance(options, list):
        for value in options:
            _refuse_giants(value, limit, name)
    elif name.startswith("num_") and isinstance(options, int) and options > limit:
        raise CheckpointError(f"the options say {name} {options}, but there are only {limit} numbers in the file")


class _Budget(TorchFunctionMode):
    """Within it nobody can make many more numbers than a file has, nor in very many pieces.

    So a small file, whatever its options say together, neither fills the memory nor takes forever.

    Args:
        size: how many numbers the file has.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.left = 16 * size + 2**24

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, unless it would make a tensor that is too much."""
        shape = args[0] if args and isinstance(args[0], (list, tuple)) else args
        # `no_grad` goes through here with a bool when it ends, and must not fail then.
        if args and function is not torch.tensor and all(type(side) is int for side in shape):
            self.left -= math.prod(shape) + 4096
            if self.left < 0:
                raise CheckpointError(
                    f"the options ask for far more than a file of {self.size} numbers can be weights of"
                )
        return function(*args, **(kwargs or {}))


def _renamed(layout: Layout, state: State) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for key, value in state.items():
        ours = layout.our_key(key)
        if ours in named:
            raise CheckpointError(f"two keys of {layout.name} must not mean the same, but {key!r} is {ours!r} again")
        if ours is not None:
            named[ours] = value.squeeze(0) if ours.endswith(".centroids") and value.ndim == 3 else value
    return named


def _built(layout: Layout, found: Options, overrides: Options) -> Network:
    """Return the network; what is wrong with it is the overrides' fault or that of the weights."""
    found = {name: value for name, value in found.items() if name not in overrides}
    try:
        return layout.build(**read(layout.build, found), **overrides)
    except ConfigError as error:
        if all(problem.path.split(".")[0] in overrides for problem in error.problems):
            raise
        raise CheckpointError(f"{_UNUSABLE}{error}{_hint(error)}") from error


def _check(model: Network, state: State, fresh: str) -> None:
    """Refuse weights that are not those of `model`; name what is missing, too much, of wrong size or not finite."""
    expected = {key: value for key, value in model.state_dict().items() if key != OPTIONS}
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
        raise CheckpointError(f"does not fit {type(model).__name__} (our names):{faults}")


def unusable(expected: State, state: Mapping[str, Any]) -> str:
    """Return what of `state` PyTorch would copy into a network although it is not such as `expected`.

    That is what is no dense tensor, of another type or not finite; as lines that begin a new one, empty if all is fine.
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
    """Return the type of a tensor's numbers; of what is no dense tensor, what it is."""
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
