"""Weights of other people and of our own: read as data, recognised by their keys, put into our networks.

`LAYOUTS` is the table of what is recognised. Each row says how a code base names the weights of a network; what options
the network had is read from the shapes.
"""

import functools
import importlib
import json
import math
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sparse_sr_attn import unwrapping
from sparse_sr_attn.backbones.base import OPTIONS, Network
from sparse_sr_attn.backbones.edsr import EDSR
from sparse_sr_attn.backbones.elan import ELAN
from sparse_sr_attn.backbones.lcoan import LCoAN
from sparse_sr_attn.backbones.rcan import RCAN
from sparse_sr_attn.config import read
from sparse_sr_attn.errors import CheckpointError, ConfigError, Problem
from sparse_sr_attn.foreign import ATTENDED, ForeignNetwork
from sparse_sr_attn.functional.shift import taps
from sparse_sr_attn.layers.gmsa import group_widths
from sparse_sr_attn.registry import suggestion

State = Mapping[str, Tensor]
Options = dict[str, Any]

_NESTS = ("params_ema", "params", "state_dict", "model_state_dict", "model", "net")
_WRAPPERS = r"(?:(?:module|_orig_mod)\.)*"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_TAIL = ("upsample.", "conv_last.")
_MOST_OPTIONS = 2**20  # bytes
_TRAINED = Path(__file__).with_name("weights")
_UNUSABLE = "the options that belong to the weights cannot be used here:\n"
_SHOWN = 6  # keys or problems that a message lists before it counts the rest


@dataclass(frozen=True)
class Layout:
    r"""How one code base names the weights of one network.

    In patterns of keys, `<g>` stands for a number and `*` for a last part such as `weight`.

    Attributes:
        name: for messages.
        build: our network.
        sign: pattern of keys that no other layout has.
        shapes: reads the options that the shapes of (renamed) weights tell.
        names: patterns of keys, the first that fits counts, and our names for them; `None` for what we do not need.
            Keys that fit none keep their names.
        convert: what is to be done before the names are changed, given the options said by the caller.
        defaults: the options that shapes do not tell, as these weights expect them, from the weights as they are and
            the options that shapes tell; the constructor's defaults go for the rest.
        needs: options that nobody can guess, each with the beginning of the keys whose presence raises the question.
        fresh: regular expression of our keys that may be missing.
        revert: undoes `convert`, after the names are theirs again.
        filling: what the code base expects beyond what we need, from our network; `None` where that is not known.
    """

    name: str
    build: Callable[..., Network]
    sign: str
    shapes: Callable[[State], Options]
    names: Mapping[str, str | None] = field(default_factory=dict)
    convert: Callable[[State, Options], State] = lambda state, options: state
    defaults: Callable[[State, Options], Options] = lambda state, shapes: {}
    needs: Mapping[str, str] = field(default_factory=dict)
    fresh: str = "(?!)"
    revert: Callable[[State, Network], State] = lambda state, model: state
    filling: Callable[[Network], dict[str, Tensor]] | None = None

    def our_key(self, key: str) -> str | None:
        """Return our name of a key; `None` for what we do not need."""
        for pattern, ours in self.names.items():
            if found := key_pattern(pattern).fullmatch(key):
                return ours and re.sub(r"<(\w)>|\*", lambda part: found[part[1] or "rest"], ours)
        return key

    def recognises(self, state: Iterable[str]) -> bool:
        """Return whether these are keys of this layout."""
        return any(key_pattern(self.sign).fullmatch(key) for key in state)


@functools.cache
def key_pattern(pattern: str) -> re.Pattern[str]:
    """Return a pattern of keys, as `Layout` has it, as a regular expression with the groups `g`, ..., and `rest`."""
    return re.compile(re.sub(r"<(\w)>", r"(?P<\1>\\d+)", re.escape(pattern).replace(r"\*", r"(?P<rest>\w+)")))


def trained_weights() -> dict[str, Path]:
    """Return the files of the trained weights that come with the library, by name: `{"LCoAN-light_x2": ..., ...}`.

    `docs/weights.md` tells how they were trained and how good they are.
    """
    return {file.stem: file for file in sorted(_TRAINED.glob("*.safetensors"))}


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

    Example:
        `load_model("EDSR_Lx4.pth", img_range=255.0)`, `load_model("LCoAN-light_x2")`
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
        content = source if isinstance(source, Mapping) else _read_file(source)
        weights, beside, found = _weights(content)
        told = None
        if found is not None and found.chosen.averaged and found.others:
            told = f"the averaged weights are taken ({found.chosen.name}, not {' or '.join(found.others)})"
        return _load(weights, beside, overrides, allow_tail_reinit), told
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error.__cause__


def _read_file(source: object) -> object:
    if not isinstance(source, (str, os.PathLike)):
        raise CheckpointError(f"source must be a file or a state dict, got a {type(source).__name__}")
    path = Path(source).expanduser()
    if not path.is_file():
        known = trained_weights()
        if str(source) not in known:
            names = "" if path.suffix else f", nor are they weights of the library: {', '.join(known)}"
            raise CheckpointError(f"there is no such file{names}")
        path = known[str(source)]
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # noqa: PLC0415  (only here is it needed)

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise CheckpointError("reading .safetensors needs safetensors: pip install safetensors") from error
    except Exception as error:  # a malformed file can make the reader raise anything
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            "must be weights that can be read as data, from a .safetensors or a whole torch.save file without code; "
            f"got {type(error).__name__}: {reason}"
        ) from error


def _weights(content: object) -> tuple[dict[str, Tensor], State, unwrapping.Found | None]:
    """Return the weights that a file holds, without wrappers, and what is beside them; see `unwrapping.Found`."""
    found = unwrapping.find(content, is_known)
    if found is None:
        return _checked(_innermost(content)), {}, None
    own = found.chosen.state.items()
    # Numbers and texts beside weights, an epoch say, are none. Those in place of weights have a dot in their key.
    weights = {k: v for k, v in own if isinstance(v, Tensor) or k == OPTIONS or not isinstance(k, str) or "." in k}
    return _checked(weights), {k: v for k, v in found.beside.items() if _is_plain(k, v)}, found


def is_known(state: State) -> bool:
    """Return whether some layout has such keys, or the options beside them name a network."""
    if any(layout.recognises(state) for layout in LAYOUTS):
        return True
    try:
        return "type" in carried_options(state.get(OPTIONS))
    except CheckpointError:
        return False


def _innermost(content: object) -> object:
    """Return what is closest to weights in a file without a known network, so that messages are about that."""
    for _ in _NESTS:  # no deeper: a map may hold itself
        inner = [
            content[key] for key in _NESTS if isinstance(content, Mapping) and isinstance(content.get(key), Mapping)
        ]
        content = inner[0] if inner else content
    if isinstance(content, Mapping) and content and all(isinstance(key, str) for key in content):
        wrapped = [re.match(_WRAPPERS, key) for key in content]
        depth = min(len(found[0]) if found else 0 for found in wrapped)
        if depth and len({key[:depth] for key in content}) == 1:
            return {key[depth:]: value for key, value in content.items()}
    return content


def _checked(content: object) -> dict[str, Tensor]:
    """Refuse what is no state dict of dense tensors."""
    if not isinstance(content, Mapping):
        raise CheckpointError(f"must hold a state dict, a map from keys to tensors, got a {type(content).__name__}")
    if not content:
        raise CheckpointError("must hold weights, got an empty map")
    strange = [f"{key!r}: {type(value).__name__}" for key, value in content.items() if not _is_plain(key, value)]
    if strange:
        hint = f", or such a map under one of {', '.join(_NESTS)}"
        if {"epoch", "iter"} & content.keys():
            hint = "; this looks like a training state, and the weights are in a file of their own (models/net_g_*.pth)"
        raise CheckpointError(f"must hold a map from keys to dense tensors, got {listed(strange)}{hint}")
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in content.values()}
    if sum(value.nbytes for value in content.values()) > sum(storages.values()):
        raise CheckpointError("must hold each number of its weights, got weights that repeat numbers or share them")
    return dict(content)


def _is_plain(key: object, value: object) -> bool:
    return isinstance(key, str) and isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta


def _load(state: dict[str, Tensor], beside: State, overrides: Options, allow_tail_reinit: bool) -> Network:
    carried = carried_options(state.pop(OPTIONS, beside.get(OPTIONS)))
    if carried.get("type") == ATTENDED:
        return _load_foreign(state, beside, carried, overrides)
    family = carried.pop("type", None)
    layout = next((layout for layout in LAYOUTS if layout.build.__name__ == family), None)
    layout = layout or next((layout for layout in LAYOUTS if layout.recognises(state)), None)
    if layout is None:
        tried = "".join(f"\n  {layout.name}, with keys like {layout.sign}" for layout in LAYOUTS)
        keys = [f"{key} {tuple(value.shape)}" for key, value in state.items()]
        raise CheckpointError(f"must be of a layout known here. Tried:{tried}\nGot {len(keys)} keys: {listed(keys)}")
    overrides = read(layout.build, overrides, siblings=["allow_tail_reinit"])
    named = _renamed(layout, layout.convert(state, overrides))
    shapes = layout.shapes(named)
    needs = {} if carried else layout.needs
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
    fresh = [layout.fresh]
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


def carried_options(tensor: Tensor | None) -> Options:
    """Return the options that the weights of our networks carry, and the network's name as `type`.

    Raises:
        CheckpointError: this is not how they are carried.
    """
    if tensor is None:
        return {}
    try:
        if tensor.numel() > _MOST_OPTIONS:
            raise ValueError(f"got {tensor.numel()} numbers")
        return dict(json.loads(bytes(round(value) for value in tensor.tolist())))
    except (TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise CheckpointError(
            f"the key {OPTIONS!r} must hold the bytes of a JSON map ({error}); take it away and say the options"
        ) from error


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
        if not _is_plain(key, value) or value.dtype not in (_FLOATS if ours.dtype in _FLOATS else (ours.dtype,))
    ]
    infinite = [] if types else [key for key, (_, value) in common.items() if not value.isfinite().all()]
    return _lines({"of wrong type": types, "not finite": infinite})


def _kind(value: object) -> str:
    """Return the type of a tensor's numbers; of what is no dense tensor, what it is."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    dtype = str(value.dtype).removeprefix("torch.")
    return dtype if _is_plain("", value) else f"{'meta' if value.is_meta else value.layout} {dtype}"


def _lines(faults: Mapping[str, list[str]]) -> str:
    return "".join(f"\n  {fault}: {listed(keys)}" for fault, keys in faults.items() if keys)


def listed(items: list[str]) -> str:
    """Return names as messages show them: the first ones, and how many there are."""
    rest = f", ... ({len(items)})" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + rest


def _size(state: State, key: str) -> torch.Size:
    if key not in state:
        raise CheckpointError(f"must have the key {key!r} (our name), got none of it")
    if state[key].ndim != 4 or 0 in state[key].shape:
        raise CheckpointError(f"{key} (our name) must be weights of a convolution, got {tuple(state[key].shape)}")
    return state[key].shape


def _count(state: State, pattern: str) -> int:
    """Return how many different numbers stand at the group of `pattern` in the keys."""
    return len({found[1] for key in state if (found := re.match(pattern, key))})


def _ends(state: State) -> Options:
    """Return what the first and the last convolutions tell."""
    num_feat, num_in_ch = _size(state, "conv_first.weight")[:2]
    widths = [_size(state, key)[0] for key in state if re.fullmatch(r"upsample\.\d+\.weight", key)]
    upscales = {(4 * num_feat,) * n: 2**n for n in (1, 2, 3)} | {(9 * num_feat,): 3}
    if tuple(widths) not in upscales:
        raise CheckpointError(
            f"upsample must have one to three convolutions to 4 * num_feat channels (x2, x4, x8) or one to "
            f"9 * num_feat (x3), with num_feat {num_feat}; got {widths}"
        )
    num_out_ch = _size(state, "conv_last.weight")[0]
    upscale = upscales[tuple(widths)]
    return {"num_in_ch": num_in_ch, "num_out_ch": num_out_ch, "num_feat": num_feat, "upscale": upscale}


def _edsr(state: State) -> Options:
    return {**_ends(state), "num_block": _count(state, r"body\.(\d+)\.")}


def _rcan(state: State) -> Options:
    options = {
        **_ends(state),
        "num_group": _count(state, r"body\.(\d+)\."),
        "num_block": _count(state, r"body\.0\.residual_group\.(\d+)\."),
    }
    if any(".rcab." in key for key in state):  # its own blocks, not those of the option `block`
        squeezed = _size(state, "body.0.residual_group.0.rcab.3.attention.1.weight")[0]
        options["squeeze_factor"] = max(1, options["num_feat"] // squeezed)
    return options


def _elan(state: State) -> Options:
    num_feat, num_in_ch = _size(state, "conv_first.weight")[:2]
    width = _size(state, "body.0.lfe.0.conv1.weight")[0]
    last = _size(state, "conv_last.weight")[0]
    upscale = next((factor for factor in (2, 3, 4, 8) if last == num_in_ch * factor**2), None)
    upscale = upscale or next((factor for factor in (2, 3, 4, 8) if last % factor**2 == 0), None)
    if upscale is None:
        raise CheckpointError(f"conv_last must have channels for x2, x3, x4 or x8, got {last}")
    return {
        "num_in_ch": num_in_ch,
        "num_feat": num_feat,
        "num_block": _count(state, r"body\.(\d+)\."),
        "share": _count(state, r"body\.0\.lfe\.(\d+)\."),
        "expansion": max(1, width // num_feat),
        "upscale": upscale,
    }


def _elan_channels(state: State, shapes: Options) -> Options:
    """Return the channels of the output image: they and the factor are one number in the shapes."""
    key = next(key for key in ("conv_last.weight", "tail.0.weight") if key in state)
    return {"num_out_ch": len(state[key]) // shapes["upscale"] ** 2}


def _released_elan(state: State, options: Options) -> State:
    """Part each projection of a provider into query and value, and bring masked convolutions to their five taps."""
    num_groups = len(options.get("window_sizes", (4, 8, 16)))
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        if found := re.fullmatch(r"(body\.\d+\.modules_gmsa\.gmsa_0\.project)_inp(\..+)", key):
            parts = (value, value)
            if value.ndim:
                widths = [width for group in group_widths(len(value) // 2, num_groups) for width in (group, group)]
                if sum(widths) != len(value):
                    raise CheckpointError(f"{key} must have an even number of rows, got {len(value)}")
                rows = value.split(widths)
                parts = (torch.cat(rows[::2]), torch.cat(rows[1::2]))
            for name, part in zip(("query", "value"), parts, strict=True):
                converted[f"{found[1]}_{name}{found[2]}"] = part
        elif (found := re.fullmatch(r"(.+\.shift_conv)\.w", key)) and value.ndim == 4 and value.shape[2:] == (3, 3):
            converted[f"{found[1]}.conv1x1.weight"] = (value * taps(value)).sum(dim=(2, 3), keepdim=True)
        else:
            converted[key] = value
    return converted


def _lcoan(state: State) -> Options:
    options = {
        **_ends(state),
        "num_group": _count(state, r"body\.(\d+)\."),
        "num_block": _count(state, r"body\.0\.blocks\.(\d+)\."),
    }
    query_dim = _size(state, "body.0.attention.lsp.embed.weight")[0]
    options["reduction"] = max(1, options["num_feat"] // query_dim)
    providers = sorted(
        {int(found[1]) for key in state if (found := re.match(r"body\.(\d{1,9})\.attention\.lsp\.", key))}
    )
    options["share"] = providers[1] if len(providers) > 1 else None
    options["num_rounds"] = 1 + _count(state, r"body\.0\.attention\.lsp\.further_rounds\.(\d+)\.")
    centroids = state.get("body.0.attention.lsp.centroids")
    if centroids is not None and centroids.ndim > 0:
        options["num_clusters"] = len(centroids)
    return options


def _large_edsr(state: State, shapes: Options) -> Options:
    """EDSR was published in two sizes, of which the large one, 32 blocks of 256, scales its branches by 0.1."""
    return {"res_scale": 0.1} if (shapes["num_block"], shapes["num_feat"]) == (32, 256) else {}


def _mean_shift(state: State, img_range: float) -> Options:
    """Return the mean that a fixed first convolution, `sub_mean`, takes from the image, and the range it implies."""
    bias, weight = (
        state[key].detach().cpu().double().flatten() if key in state else None
        for key in ("sub_mean.bias", "sub_mean.weight")
    )
    if weight is not None and not torch.equal(weight, torch.eye(3).double().flatten()):
        raise CheckpointError("sub_mean.weight must be that of no change, because ours divides by no deviation")
    if bias is None or not bias.any():
        return {"img_range": img_range}
    img_range = 255.0 if bias.abs().max() > 1 else 1.0
    return {"img_range": img_range, "rgb_mean": (-bias / img_range).tolist()}


def _joined_projections(state: State, model: Network) -> State:
    """Put query and value of each provider together again, group by group."""
    num_groups = len(model.body[0].attention[0].window_sizes)  # type: ignore[index,union-attr]
    joined: dict[str, Tensor] = {}
    for key, query in state.items():
        if ".project_query." in key:
            value = state[key.replace(".project_query.", ".project_value.")]
            name = key.replace(".project_query.", ".project_inp.")
            if query.ndim:
                widths = group_widths(len(query), num_groups)
                pairs = zip(query.split(widths), value.split(widths), strict=True)
                joined[name] = torch.cat([part for pair in pairs for part in pair])
            else:
                joined[name] = query
        elif ".project_value." not in key:
            joined[key] = query
    return joined


def _one_hot_kernels(model: Network) -> dict[str, Tensor]:
    """Return what the released ELAN keeps beside what it learns: the kernels of its shifts, and its mean."""
    if model.conv_last.out_channels != 3 * model.upscale**2:  # type: ignore[union-attr]
        raise CheckpointError("this layout has images of 3 channels, the network makes others")
    kept = _mean_convolutions(model)
    for key, weight in model.state_dict().items():
        if found := re.fullmatch(r"body\.(\d+)\.lfe\.(\d+)\.conv([12])\.weight", key):
            block, pair, turn = map(int, found.groups())
            kept[f"body.{block}.modules_lfe.lfe_{pair}.conv{turn - 1}.shift_conv.weight"] = taps(weight)[:, None]
    return kept


def _mean_convolutions(model: Network) -> dict[str, Tensor]:
    """Return the fixed convolutions that take the mean from the image and add it again."""
    mean = model.mean.detach().cpu().flatten() * model.img_range
    if len(mean) != 3 or model.num_in_ch != 3:
        raise CheckpointError(f"this layout has a mean of 3 channels, but the network has {model.num_in_ch}")
    same = torch.eye(3).view(3, 3, 1, 1)
    return {
        "sub_mean.weight": same,
        "sub_mean.bias": -mean,
        "add_mean.weight": same.clone(),
        "add_mean.bias": mean,
    }


def _dead_weights(model: Network) -> dict[str, Tensor]:
    """Return what the released LCoAN has and never uses: queries and k-means of all groups but the first."""
    state = model.state_dict()
    weight, bias, means = (
        state[f"body.0.attention.lsp.{name}"] for name in ("embed.weight", "embed.bias", "centroids")
    )
    unused: dict[str, Tensor] = {"a": torch.zeros(1), **_mean_convolutions(model)}
    for group in range(_count(state, r"body\.(\d+)\.")):
        start = f"body.{group}.attention.0"
        unused[f"{start}.kmeans.initted"] = torch.tensor(1.0)
        if group:
            unused[f"{start}.conv_match.0.weight"] = torch.zeros_like(weight)
            unused[f"{start}.conv_match.0.bias"] = torch.zeros_like(bias)
            unused[f"{start}.kmeans.means"] = means[None].clone()
    return unused


_EXAMPLES: Options = {
    "window_sizes": [4, 8, 16],
    "attention": {"type": "LCoA", "every": 4, "share": 4, "chunk_size": 144},
    "chunk_size": 384,
    "res_scale": 0.1,
}

_MEAN_SHIFT = {"sub_mean.*": None, "add_mean.*": None}
_HEAD_AND_TAIL = {
    **_MEAN_SHIFT,
    "head.0.*": "conv_first.*",
    "tail.0.<k>.*": "upsample.<k>.*",
    "tail.1.*": "conv_last.*",
}

LAYOUTS = (
    Layout(
        "our LCoAN",
        LCoAN,
        sign="body.<g>.blocks.<b>.conv1.*",
        shapes=_lcoan,
        needs={"chunk_size": "", "res_scale": ""},
    ),
    Layout(
        "the released LCoAN",
        LCoAN,
        sign="body.<g>.local_body.<b>.body.0.*",
        shapes=_lcoan,
        names={
            **_HEAD_AND_TAIL,
            "a": None,
            "m_conv.0.*": "conv_after_body.*",
            "body.<g>.local_body.<b>.body.0.*": "body.<g>.blocks.<b>.conv1.*",
            "body.<g>.local_body.<b>.body.2.*": "body.<g>.blocks.<b>.conv2.*",
            "body.<g>.m_conv.0.*": "body.<g>.conv.*",
            "body.0.attention.0.conv_match.0.*": "body.0.attention.lsp.embed.*",
            "body.0.attention.0.conv_assembly.0.*": "body.0.attention.coa.value.*",
            "body.0.attention.0.kmeans.means": "body.0.attention.lsp.centroids",
            "body.<g>.attention.0.conv_assembly.0.*": "body.<g>.attention.value.*",
            "body.<g>.attention.0.conv_match.0.*": None,  # there, and never used
            "body.<g>.attention.0.kmeans.*": None,
        },
        defaults=lambda state, shapes: {
            **_mean_shift(state, 1.0),
            "chunk_size": 384,
            "res_scale": 0.1,
            "exact_keys": False,
        },
        fresh=r"body\.0\.attention\.lsp\.(?!embed\.|centroids$).*",
        filling=_dead_weights,
    ),
    Layout(
        "our ELAN",
        ELAN,
        sign="body.<b>.lfe.<j>.conv1.*",
        shapes=_elan,
        defaults=_elan_channels,
        needs={"window_sizes": ""},
    ),
    Layout(
        "the released ELAN",
        ELAN,
        sign="body.<b>.modules_gmsa.gmsa_<j>.project_inp.0.*",
        shapes=_elan,
        names={
            **_MEAN_SHIFT,
            "head.0.*": "conv_first.*",
            "tail.0.*": "conv_last.*",
            "body.<b>.modules_lfe.lfe_<j>.conv0.shift_conv.conv1x1.*": "body.<b>.lfe.<j>.conv1.*",
            "body.<b>.modules_lfe.lfe_<j>.conv1.shift_conv.conv1x1.*": "body.<b>.lfe.<j>.conv2.*",
            "body.<b>.modules_lfe.lfe_<j>.conv0.shift_conv.b": "body.<b>.lfe.<j>.conv1.bias",
            "body.<b>.modules_lfe.lfe_<j>.conv1.shift_conv.b": "body.<b>.lfe.<j>.conv2.bias",
            "body.<b>.modules_lfe.lfe_<j>.conv<k>.shift_conv.*": None,  # its one-hot kernels or its mask
            "body.<b>.modules_gmsa.gmsa_0.project_query.0.*": "body.<b>.attention.0.query.conv.*",
            "body.<b>.modules_gmsa.gmsa_0.project_query.1.*": "body.<b>.attention.0.query.norm.*",
            "body.<b>.modules_gmsa.gmsa_0.project_value.0.*": "body.<b>.attention.0.shared.value.conv.*",
            "body.<b>.modules_gmsa.gmsa_0.project_value.1.*": "body.<b>.attention.0.shared.value.norm.*",
            "body.<b>.modules_gmsa.gmsa_0.project_out.*": "body.<b>.attention.0.shared.output.*",
            "body.<b>.modules_gmsa.gmsa_<j>.project_inp.0.*": "body.<b>.attention.<j>.value.conv.*",
            "body.<b>.modules_gmsa.gmsa_<j>.project_inp.1.*": "body.<b>.attention.<j>.value.norm.*",
            "body.<b>.modules_gmsa.gmsa_<j>.project_out.*": "body.<b>.attention.<j>.output.*",
        },
        convert=_released_elan,
        revert=_joined_projections,
        filling=_one_hot_kernels,
        defaults=lambda state, shapes: {
            **_elan_channels(state, shapes),
            **_mean_shift(state, 255.0),
            "exact_shift": False,
        },
    ),
    Layout(
        "EDSR (ours and BasicSR's)",
        EDSR,
        sign="body.<b>.conv1.*",
        shapes=_edsr,
        defaults=_large_edsr,
        needs={"attention": "attention."},
    ),
    Layout(
        "EDSR of EDSR-PyTorch",
        EDSR,
        sign="body.<b>.body.0.*",
        shapes=_edsr,
        names={
            **_HEAD_AND_TAIL,
            "body.<b>.body.0.*": "body.<b>.conv1.*",
            "body.<b>.body.2.*": "body.<b>.conv2.*",
            "body.<b>.*": "conv_after_body.*",
        },
        defaults=lambda state, shapes: {**_large_edsr(state, shapes), **_mean_shift(state, 255.0)},
        filling=_mean_convolutions,
    ),
    Layout(
        "RCAN (ours and BasicSR's)",
        RCAN,
        sign="body.<g>.residual_group.<b>.rcab.0.*",
        shapes=_rcan,
        needs={"attention": "attention."},
    ),
    Layout(
        "RCAN of EDSR-PyTorch and of its authors",
        RCAN,
        sign="body.<g>.body.<b>.body.0.*",
        shapes=_rcan,
        names={
            **_HEAD_AND_TAIL,
            "body.<g>.body.<b>.body.0.*": "body.<g>.residual_group.<b>.rcab.0.*",
            "body.<g>.body.<b>.body.2.*": "body.<g>.residual_group.<b>.rcab.2.*",
            "body.<g>.body.<b>.body.3.conv_du.0.*": "body.<g>.residual_group.<b>.rcab.3.attention.1.*",
            "body.<g>.body.<b>.body.3.conv_du.2.*": "body.<g>.residual_group.<b>.rcab.3.attention.3.*",
            "body.<g>.body.<b>.*": "body.<g>.conv.*",
            "body.<g>.*": "conv_after_body.*",
        },
        defaults=lambda state, shapes: _mean_shift(state, 255.0),
        filling=_mean_convolutions,
    ),
)
"""The layouts that `load_model` tries, in this order."""
