"""Weights that a run starts from: read, compared with the network, loaded, and checked for their `img_range`."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_sr_attn.backbones.attach import without_records
from sparse_sr_attn.backbones.base import OPTIONS, Network
from sparse_sr_attn.backbones.trunks import evaluating
from sparse_sr_attn.checkpoints.load import unusable
from sparse_sr_attn.checkpoints.read import carried_options, listed, read_file
from sparse_sr_attn.errors import CheckpointError, first_line
from sparse_sr_attn.layers.base import AttentionLayer

RANGES = (1.0, 255.0)
"""What `img_range` is in practice."""

_RAW, _AVERAGED = "params", "params_ema"
_CLOSE = 0.1  # distance of images at which a network may count as trained


@dataclass(frozen=True)
class Differences:
    """How the entries of a file differ from those of a network.

    Attributes:
        fresh: entries of attention that the file does not have.
        untrained: all others that it does not have.
        resized: entries of another size, with both sizes.
        unused: entries that the network does not have.
    """

    fresh: list[str]
    untrained: list[str]
    resized: dict[str, str]
    unused: list[str]

    def __bool__(self) -> bool:
        return bool(self.fresh or self.untrained or self.resized or self.unused)

    def lines(self) -> list[str]:
        """Return a line for each kind."""
        kinds = {
            "not in the file, outside attention": self.untrained,
            "of another size": [f"{name} {sizes}" for name, sizes in self.resized.items()],
            "in the file only": self.unused,
            "not in the file, of attention": self.fresh,
        }
        return [f"{kind}: {listed(names)}" for kind, names in kinds.items() if names]


@dataclass(frozen=True)
class Loaded:
    """What `load` loaded.

    Attributes:
        weights: all entries of the file.
        key: the entry of the file that they are.
        different: how they differ from the network.
    """

    weights: dict[str, Any]
    key: str | None
    different: Differences

    @property
    def missing(self) -> list[str]:
        """Entries of the network that did not come from the file."""
        return [*self.different.fresh, *self.different.untrained, *self.different.resized]


def load(network: nn.Module, path: str, *, strict: bool, key: str | None) -> Loaded:
    """Load weights as BasicSR does, also from `.safetensors`.

    Args:
        network: takes the weights.
        path: `.safetensors`, which has no entries, or a file that `torch.save` wrote.
        strict: `strict_load_g`.
        key: `param_key_g`, the entry of the file; `None` for the whole file. `params_ema` may be missing beside
            `params`.

    Raises:
        CheckpointError: the file cannot be read or does not fit; says what to do. The network is unchanged.
    """
    try:
        weights, found = _read_weights(path, key)
        weights = without_records(weights, network)
        expected = _entries(network)
        if faults := unusable(expected, weights):
            raise CheckpointError(f"does not fit the network.{faults}")
        different = differences(network, weights)
        if not strict and not weights.keys() & expected.keys():
            raise CheckpointError(f"no entry of it is one of the network's, got {listed(list(weights))}")
        if strict and different:
            _try_strictly(network, weights, different)
        unread = {OPTIONS} if isinstance(network, Network) else set()  # `check_img_range` compares them
        fitting = {name: value for name, value in weights.items() if name not in {*different.resized, *unread}}
        network.load_state_dict(fitting, strict=strict)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except KeyError as error:
        raise CheckpointError(
            f"{path}: must hold the weights under {key!r} (path: param_key_g), but has no such entry; "
            "for a file that is a bare state dict write param_key_g: ~"
        ) from error
    except Exception as error:  # what is no mapping of tensors can raise anything
        raise CheckpointError(f"{path}: must hold weights, got {type(error).__name__}: {first_line(error)}") from error
    return Loaded(weights, found, different)


def entry_to_test(path: str, asked: str | None, *, given: bool) -> tuple[str | None, str]:
    """Return the entry of a file to test, by default the averaged weights, and a remark on it.

    Args:
        path: the file.
        asked: `param_key_g`.
        given: whether the option file says `param_key_g`.

    Raises:
        CheckpointError: the file cannot be read.
    """
    if Path(path).suffix == ".safetensors":
        return None, f"testing the weights in {path}"
    try:
        content = read_file(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    entries = [name for name in (_AVERAGED, _RAW) if isinstance(content, Mapping) and name in content]
    if not given:
        found = entries[0] if entries else None
        what = {_AVERAGED: "the averaged weights (params_ema), as validation does,", _RAW: "the weights (params)"}
        return found, f"testing {what.get(str(found), 'the weights')} in {path}"
    if asked not in entries and _RAW in entries:
        return asked, f"testing params in {path}, which has no {asked}"
    if asked == _RAW and _AVERAGED in entries:
        return asked, (
            f"testing params in {path}, as param_key_g says; validation and `sparse-sr upscale` take the averaged "
            "weights, params_ema"
        )
    return asked, f"testing {asked or 'the weights'} in {path}"


def _entries(network: nn.Module) -> dict[str, Any]:
    """Return the state dict without the options and the attached attention that are recorded in it."""
    return {name: value for name, value in without_records(network.state_dict()).items() if name != OPTIONS}


def differences(network: nn.Module, weights: Mapping[str, Any]) -> Differences:
    """Return how weights differ from those of a network."""
    expected = _entries(network)
    missing = [name for name in expected if name not in weights]
    inside = tuple(f"{path}." for path, module in network.named_modules() if isinstance(module, AttentionLayer))
    return Differences(
        fresh=[name for name in missing if name.startswith(inside)],
        untrained=[name for name in missing if not name.startswith(inside)],
        resized={
            name: f"{tuple(weights[name].shape)} instead of {tuple(value.shape)}"
            for name, value in expected.items()
            if isinstance(weights.get(name), Tensor) and weights[name].shape != value.shape
        },
        unused=[name for name in weights if name not in expected and name != OPTIONS],
    )


def check_img_range(network: nn.Module, loaded: Loaded, path: str) -> str | None:
    """Compare the `img_range` of a network with that of the training of its weights.

    Returns:
        A remark if that range is unknown; `None` otherwise.

    Raises:
        CheckpointError: they differ.
    """
    ours = getattr(network, "img_range", None)
    if not isinstance(ours, (int, float)):
        return None
    carried = carried_options(loaded.weights.get(OPTIONS)).get("img_range")
    if isinstance(carried, (int, float)):
        verdict, best = ("fits" if carried == ours else "differs"), float(carried)
    elif loaded.different.untrained or loaded.different.resized:
        verdict, best = "unknown", float(ours)
    else:
        verdict, best = range_seen(network)
    if verdict == "differs":
        raise CheckpointError(
            f"{path}: was trained with img_range {best:g}, but network_g.img_range is {ours:g}; write img_range: "
            f"{best:g}, or for a SparseEDSR train: pretrain_img_range: {best:g}, which scales its biases"
        )
    if verdict == "fits":
        return None
    return (
        f"{path} does not record the img_range of its training, and network_g.img_range is {ours:g}; "
        "if they differ, images are wrong at first: set train: pretrain_img_range"
    )


def range_seen(network: nn.Module) -> tuple[str, float]:
    """Return whether the `img_range` of a network fits its weights, as far as an image shows.

    A trained network returns a larger version of its input. So the input is compared with the output, made as small
    as the input, at the network's range and at the usual ones. Weights of range 255 at range 1 are far off, because
    their biases count 255 times as much.

    Returns:
        `"fits"`, `"differs"` or `"unknown"`, and the range that fits best.
    """
    ours = float(network.img_range)  # type: ignore[arg-type]
    weight = next(network.parameters())
    channels = next((m.in_channels for m in network.modules() if isinstance(m, nn.Conv2d)), 3)
    image = torch.rand(1, channels, 5, 5, generator=torch.Generator().manual_seed(0)).to(weight)
    image = F.interpolate(image, size=24, mode="bicubic").clamp(0, 1)
    distances: dict[float, float] = {}
    with evaluating(network):
        try:
            for img_range in dict.fromkeys((ours, *RANGES)):
                network.img_range = img_range  # type: ignore[assignment]
                output = F.interpolate(network(image), size=image.shape[-2:], mode="area")
                distances[img_range] = float((output - image).square().mean().sqrt())
        finally:
            network.img_range = ours  # type: ignore[assignment]
    best = min(distances, key=lambda img_range: distances[img_range])
    if not distances[best] < _CLOSE:
        return "unknown", best
    if best == ours:
        return "fits", ours
    return ("differs" if 2 * distances[best] < distances[ours] else "unknown"), best


def _read_weights(path: str, key: str | None) -> tuple[dict[Any, Any], str | None]:
    """Return the weights in a file and their entry, or raise anything that a malformed file leads to."""
    weights: Any = read_file(path)
    if Path(path).suffix == ".safetensors":
        key = None
    elif key is not None:
        key = _RAW if key not in weights and _RAW in weights else key
        weights = weights[key]
    return {name.removeprefix("module."): value for name, value in weights.items()}, key


def _try_strictly(network: nn.Module, weights: Mapping[str, Any], different: Differences) -> None:
    """Load weights into a copy, as a network may know how to read entries of other names; or raise CheckpointError."""
    try:
        copy.deepcopy(network).load_state_dict(dict(weights), strict=True)
    except RuntimeError as error:
        text = "\n  ".join(["does not fit the network.", *different.lines()])
        if different.fresh and not (different.untrained or different.resized or different.unused):
            text += (
                "\nIf these are attention layers that the checkpoint was trained without, write strict_load_g: false "
                "under path: they then start untrained."
            )
        raise CheckpointError(text) from error
