"""Weights that a run starts from: what their file may be, what they leave untrained, and for which range they are."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_sr_attn.attachment import evaluating
from sparse_sr_attn.backbones.base import OPTIONS
from sparse_sr_attn.checkpoints import carried_options, listed
from sparse_sr_attn.errors import CheckpointError
from sparse_sr_attn.layers.base import AttentionLayer

RANGES = (1.0, 255.0)
"""What `img_range` is in practice."""

_RAW, _AVERAGED = "params", "params_ema"
_CLOSE = 0.1  # distance of images at which a network may count as trained


def read_weights(path: str, key: str | None) -> tuple[dict[Any, Any], str | None]:
    """Return the weights in a file, and the entry of the file that they are.

    Args:
        path: `.safetensors`, which has no entries, or a file that `torch.save` wrote.
        key: of the entry; `None` for the whole file. `params_ema` may be missing beside `params`.

    Raises:
        CheckpointError: safetensors is missing.
        KeyError: there is no such entry.
        Exception: whatever a malformed file leads to.
    """
    if Path(path).suffix == ".safetensors":
        try:
            from safetensors.torch import load_file  # noqa: PLC0415  (only here is it needed)
        except ImportError as error:
            raise CheckpointError("reading .safetensors needs safetensors: pip install safetensors") from error
        weights, key = load_file(path), None
    else:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        if key is not None:
            key = _RAW if key not in weights and _RAW in weights else key
            weights = weights[key]
    return {name.removeprefix("module."): value for name, value in weights.items()}, key


def entry_to_test(path: str, asked: str | None, *, given: bool) -> tuple[str | None, str]:
    """Return the entry of a file that is tested, and a remark on it: the average, unless another is asked for.

    Args:
        path: the file.
        asked: `param_key_g`.
        given: whether the option file says `param_key_g`.

    Raises:
        Exception: whatever a malformed file leads to.
    """
    if Path(path).suffix == ".safetensors":
        return None, f"testing the weights in {path}"
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
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


def why_unreadable(path: str, error: Exception) -> str:
    """Return that a file cannot be read as weights, and why."""
    reason = str(error).strip().partition("\n")[0]
    return f"{path}: must be a map of weights that can be read as data; got {type(error).__name__}: {reason}"


@dataclass(frozen=True)
class Differences:
    """What distinguishes the entries of a file from those of a network.

    Attributes:
        fresh: entries of attention that the file does not have.
        untrained: all others that it does not have.
        resized: entries of another size.
        unused: entries that the network does not have.
    """

    fresh: list[str]
    untrained: list[str]
    resized: list[str]
    unused: list[str]

    def __bool__(self) -> bool:
        return bool(self.fresh or self.untrained or self.resized or self.unused)

    def lines(self) -> list[str]:
        """Return a line for each kind."""
        told = {
            "not in the file, outside attention": self.untrained,
            "of another size": self.resized,
            "in the file only": self.unused,
            "not in the file, of attention": self.fresh,
        }
        return [f"{kind}: {listed(names)}" for kind, names in told.items() if names]


def differences(network: nn.Module, weights: Mapping[str, Any]) -> Differences:
    """Return what distinguishes weights from those that a network has."""
    expected = {name: value for name, value in network.state_dict().items() if name != OPTIONS}
    missing = [name for name in expected if name not in weights]
    inside = tuple(f"{path}." for path, module in network.named_modules() if isinstance(module, AttentionLayer))
    return Differences(
        fresh=[name for name in missing if name.startswith(inside)],
        untrained=[name for name in missing if not name.startswith(inside)],
        resized=[
            f"{name} {tuple(weights[name].shape)} instead of {tuple(value.shape)}"
            for name, value in expected.items()
            if isinstance(weights.get(name), Tensor) and weights[name].shape != value.shape
        ],
        unused=[name for name in weights if name not in expected and name != OPTIONS],
    )


def range_told(weights: Mapping[str, Any]) -> float | None:
    """Return the `img_range` that weights carry among their options, if they do."""
    options = carried_options(weights.get(OPTIONS))
    value = options.get("img_range")
    return float(value) if isinstance(value, (int, float)) else None


def range_seen(network: nn.Module) -> tuple[str, float]:
    """Return how the `img_range` of a network goes with its weights, as far as an image shows.

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
