"""Convert weights to the names of other code bases, and write them to files."""

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from sparse_sr_attn.backbones.base import OPTIONS, Network, options_of
from sparse_sr_attn.backbones.edsr import EDSR
from sparse_sr_attn.checkpoints.foreign import network_name
from sparse_sr_attn.checkpoints.layouts import LAYOUTS, Layout, key_pattern
from sparse_sr_attn.checkpoints.load import load_model
from sparse_sr_attn.data.atomic import written
from sparse_sr_attn.errors import CheckpointError

Names = Literal["ours", "released"]
"""`ours` are BasicSR's for EDSR and RCAN; `released` are EDSR-PyTorch's and, for LCoAN and ELAN, their authors'."""


def convert_weights(model: Network, names: Names = "ours") -> dict[str, Tensor]:
    """Return the weights of `model` under other names, for strict loading in another code base.

    Args:
        model: a network of this library.
        names: naming scheme, see `Names`.

    Returns:
        A state dict on the CPU. With released names it has all keys that the released code expects, with zeros for
        those that it never uses; the pending update of k-means, which has no name there, is dropped.

    Raises:
        CheckpointError: the layout cannot represent part of the network (attention in EDSR or RCAN; cosines, ordered
            clusters or several patterns in an LCoAN; an ELAN without three window sizes; a mean that does not have
            three channels).

    Note:
        The result has been read back with `load_model`, and every weight compared.

    Examples:
        >>> weights = convert_weights(load_model("ELAN-light_x2"), "released")
        >>> len(weights)
        368
    """
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    if names == "ours":
        return state
    layout = next((x for x in LAYOUTS if x.build is type(model) and x.extra_keys), None)
    if layout is None or layout.extra_keys is None:
        raise CheckpointError(f"the released names of {network_name(model)} are not known; use names 'ours'")
    renamed = _renamed(layout, {key: value for key, value in state.items() if key != OPTIONS})
    named = {**layout.inverse(renamed, model), **layout.extra_keys(model)}
    _check(layout, model, named)
    return named


def at_img_range(model: Network, img_range: float) -> EDSR:
    """Return an EDSR with another `img_range` that gives the same image: its biases are scaled.

    Attention does not scale with its input, nor do the sigmoids of an RCAN.

    Args:
        model: an EDSR without attention and with its own blocks.
        img_range: the new range, 1 for EDSR-PyTorch's `--rgb_range 1`.

    Raises:
        CheckpointError: it is another network, which has to be trained again at another range.

    Examples:
        >>> model = EDSR(num_feat=8, num_block=2, upscale=2, img_range=255.0)
        >>> x = torch.rand(1, 3, 8, 8)
        >>> torch.allclose(at_img_range(model, 1.0)(x), model(x), atol=1e-4)
        True
    """
    options = options_of(model) or {}
    if type(model) is not EDSR or options.get("attention") or options.get("block") or not options:
        what = f"an {type(model).__name__} with attention" if type(model) is EDSR else f"a {type(model).__name__}"
        raise CheckpointError(
            f"img_range can be changed only for an EDSR without attention, got {what}, whose other operations do not "
            "scale with the image; train it at the new range"
        )
    scaled = EDSR(**{name: value for name, value in options.items() if name != "type"} | {"img_range": img_range})
    scaled.load_state_dict({name: value for name, value in model.state_dict().items() if name != OPTIONS})
    scale_biases(scaled, img_range / model.img_range)
    return scaled.train(model.training)


@torch.no_grad()
def scale_biases(model: nn.Module, factor: float, *, but: Collection[str] = ()) -> None:
    """Multiply the biases of an EDSR, except for some, so that it gives the same image at another range.

    Convolutions, ReLU and residual sums scale with their input if the biases scale along.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(".bias") and name not in but:
            parameter.mul_(factor)


def write_weights(state: dict[str, Tensor], file: Path, *, nested: bool, overwrite: bool = False) -> None:
    """Write a state dict to a file, completely or not at all.

    Args:
        state: state dict on the CPU.
        file: path whose suffix gives the format: `.safetensors`, or `.pth` or `.pt` for `torch.save`.
        nested: store it under `params`, where BasicSR looks; not in `.safetensors`.
        overwrite: whether to replace an existing file.

    Raises:
        CheckpointError: the suffix is unknown, or the file already exists or cannot be written.
    """
    if file.suffix not in (".safetensors", ".pth", ".pt"):
        raise CheckpointError(f"{file} must end in .safetensors, .pth or .pt")
    try:
        with written(file, CheckpointError, overwrite=overwrite) as stream:
            if file.suffix == ".safetensors":
                from safetensors.torch import save  # noqa: PLC0415

                stream.write(save(state))
            else:
                torch.save({"params": state} if nested else state, stream)
    except ImportError as error:
        raise CheckpointError("writing .safetensors needs safetensors: pip install safetensors") from error


def unsaid_options(model: Network, state: dict[str, Tensor]) -> list[str]:
    """Return the options of `model` that are not recorded in `state` and differ from what `load_model` assumes.

    Empty for networks with options that JSON cannot represent.
    """
    ours = options_of(model)
    if ours is None:
        return []
    again = load_model(state)
    theirs = options_of(again) or {}
    if "rgb_mean" in ours and torch.allclose(again.mean, model.mean.cpu(), atol=1e-6):
        theirs["rgb_mean"] = ours["rgb_mean"]  # written out, or by name
    return [f"{name}={json.dumps(value)}" for name, value in ours.items() if value != theirs.get(name)]


def _renamed(layout: Layout, state: dict[str, Tensor]) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    after_the_last: dict[str, Tensor] = {}
    for key, value in state.items():
        theirs = _their_key(layout, key)
        if theirs is not None:
            (after_the_last if "<" in theirs else named)[theirs] = value
        elif not re.fullmatch(layout.may_be_missing, key):
            raise CheckpointError(f"{layout.name} has no name for {key}")
    # Where ours have a name and theirs a number, it is the next one: the convolution that follows the last block.
    numbered = dict(named)
    for theirs, value in after_the_last.items():
        start = theirs.partition("<")[0]
        last = max(int(key.removeprefix(start).partition(".")[0]) for key in numbered if key.startswith(start))
        named[re.sub(r"<\w>", str(last + 1), theirs)] = value
    # The released k-means has one more axis, of length 1.
    return {key: value[None] if key.endswith(".kmeans.means") else value for key, value in named.items()}


def _their_key(layout: Layout, key: str) -> str | None:
    """Return their name of our key, with `<b>` for a number that our key lacks, or `None` if they have no such key."""
    for pattern, ours in layout.names.items():
        if ours is not None and (found := key_pattern(ours).fullmatch(key)):
            numbers = found.groupdict()
            theirs = pattern.replace("*", numbers.pop("rest", "*"))
            for letter, number in numbers.items():
                theirs = theirs.replace(f"<{letter}>", number)
            return theirs
    return None


def _check(layout: Layout, model: Network, named: dict[str, Tensor]) -> None:
    """Raise CheckpointError if weights would change in a round trip."""
    again = load_model(named).state_dict()
    before = {key: value.cpu() for key, value in model.state_dict().items() if key != OPTIONS}
    kept = [key for key in before if not re.fullmatch(layout.may_be_missing, key)]
    if wrong := [key for key in kept if key not in again or not torch.equal(again[key], before[key])]:
        raise CheckpointError(f"{layout.name} has no name for {wrong[0]}, which would be lost")
    if more := (again.keys() ^ before.keys()) - {OPTIONS}:
        raise CheckpointError(f"{layout.name} has no name for {min(more)}")
