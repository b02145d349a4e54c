"""Read files of weights as data, and find the weights in their containers."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sparse_sr_attn.backbones.attach import SLOT, is_record
from sparse_sr_attn.backbones.base import OPTIONS, decode_options
from sparse_sr_attn.checkpoints import unwrap
from sparse_sr_attn.checkpoints.layouts import LAYOUTS, Options, State
from sparse_sr_attn.errors import CheckpointError, first_line
from sparse_sr_attn.registry import suggestion

_MOST_OPTIONS = 2**20  # bytes
_TRAINED = Path(__file__).with_name("trained")
_SHOWN = 6  # keys or problems that a message lists before it counts the rest


def trained_weights() -> dict[str, Path]:
    """Return the files of the trained weights included in the library, by name: `{"LCoAN-light_x2": ..., ...}`.

    See `docs/weights.md` for their training and quality.
    """
    return {file.stem: file for file in sorted(_TRAINED.glob("*.safetensors"))}


def find_file(source: object) -> Path:
    """Return the file of weights, or of the trained weights of that name.

    Raises:
        CheckpointError: it does not exist.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise CheckpointError(f"source must be a file or a state dict, got a {type(source).__name__}")
    path = Path(source).expanduser()
    if path.is_file():
        return path
    known = trained_weights()
    if str(source) not in known:
        message = "there is no such file"
        if not path.suffix:
            message += f", nor are there included weights of that name{suggestion(source, list(known))}"
            if re.fullmatch(r".*_x\d", str(source)) is None:  # a name of networks, not of weights
                message += "; create_model builds an untrained network by name"
        raise CheckpointError(message)
    return known[str(source)]


def read_file(source: object) -> object:
    """Return the content of a file, or of the trained weights of that name.

    Raises:
        CheckpointError: the file does not exist or cannot be read as data.
    """
    path = find_file(source)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # noqa: PLC0415  (only here is it needed)

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise CheckpointError("reading .safetensors needs safetensors: pip install safetensors") from error
    except Exception as error:  # a malformed file can make the reader raise anything
        reason = first_line(error)
        raise CheckpointError(
            "must be weights that can be read as data, from a .safetensors or a whole torch.save file without code; "
            f"got {type(error).__name__}: {reason}"
        ) from error


def find_weights(
    content: object, model: nn.Module | None = None
) -> tuple[dict[str, Tensor], State, unwrap.Found | None]:
    """Return the weights in a file without wrappers, and the entries next to them; see `unwrap.Found`.

    Args:
        content: what is in the file.
        model: a network whose keys the weights must have; by default, any known one.
    """
    if model is None:
        found = unwrap.find(content, is_known)
    else:
        names = {name for name, _ in model.named_parameters()}
        found = unwrap.find(content, lambda state: names <= state.keys(), min(names, default=""))
    if found is None:
        return _checked(_largest(content)), {}, None
    own = found.chosen.state.items()
    # A number or string next to weights, such as an epoch, is not a weight. One in place of a weight has a dotted key.
    weights = {k: v for k, v in own if isinstance(v, Tensor) or k == OPTIONS or not isinstance(k, str) or "." in k}
    return _checked(weights), {k: v for k, v in found.beside.items() if is_plain(k, v)}, found


def is_known(state: State) -> bool:
    """Return whether the keys match a layout, or the options stored with them name a network."""
    if any(layout.recognises(state) for layout in LAYOUTS):
        return True
    try:
        records = records_in(state)
        return "type" in carried_options(state.get(OPTIONS)) or any(
            r.get("path") == path for path, r in records.items()
        )
    except CheckpointError:
        return False


def _largest(content: object) -> object:
    """Return the largest mapping of tensors in a file without a known network, for better messages."""
    mappings = [mapping for _, mapping in unwrap.containers(content) if all(map(is_plain, mapping, mapping.values()))]
    return max(mappings, key=len, default=content)


def _checked(content: object) -> dict[str, Tensor]:
    """Raise CheckpointError unless `content` is a state dict of dense tensors."""
    if not isinstance(content, Mapping):
        raise CheckpointError(f"must hold a state dict, a mapping from keys to tensors, got a {type(content).__name__}")
    if not content:
        raise CheckpointError("must hold weights, got an empty mapping")
    strange = [f"{key!r}: {type(value).__name__}" for key, value in content.items() if not is_plain(key, value)]
    if strange:
        hint = ", or such a mapping inside"
        if {"epoch", "iter"} & content.keys():
            hint = "; this looks like a training state, and the weights are in a file of their own (models/net_g_*.pth)"
        raise CheckpointError(f"must hold a mapping from keys to dense tensors, got {listed(strange)}{hint}")
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in content.values()}
    if sum(value.nbytes for value in content.values()) > sum(storages.values()):
        raise CheckpointError("must store every element of its weights, got expanded or overlapping tensors")
    return dict(content)


def is_plain(key: object, value: object) -> bool:
    """Return whether the key is a string and the value a dense tensor."""
    return isinstance(key, str) and isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta


def records_in(state: State) -> dict[str, Options]:
    """Return what a state dict records of attached attention, by path of the module that has it.

    Raises:
        CheckpointError: a record cannot be read.
    """
    records: dict[str, Options] = {}
    for key, value in state.items():
        if not is_record(key):
            continue
        record = carried_options(value, key)
        end = f".{record.get('key')}.{SLOT}"
        place = f".{key}"
        while place.endswith(f".{SLOT}.{SLOT}"):  # of attention inside attention
            place = place.removesuffix(f".{SLOT}")
        if not place.endswith(end) or not isinstance(record.get("attention"), list):
            raise CheckpointError(f"the key {key!r} must hold a record of attention that can be attached again")
        records[place.removesuffix(end).removeprefix(".")] = record
    return records


def carried_options(tensor: Tensor | None, key: str = OPTIONS) -> Options:
    """Decode the options stored with the weights of our networks, with the network's name as `type`.

    Raises:
        CheckpointError: the tensor does not encode options.
    """
    if tensor is None:
        return {}
    try:
        if tensor.numel() > _MOST_OPTIONS:
            raise ValueError(f"got {tensor.numel()} numbers")
        return decode_options(tensor)
    except (TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise CheckpointError(
            f"the key {key!r} must hold the bytes of a JSON mapping ({error}); remove it and pass the options"
        ) from error


def listed(items: list[str]) -> str:
    """Return names for a message: the first ones, and the total number."""
    rest = f", ... ({len(items)})" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + rest
