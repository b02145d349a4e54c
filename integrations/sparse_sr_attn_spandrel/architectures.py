"""Our networks as architectures of spandrel: how spandrel recognises their weights, and what it reports about them."""

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from spandrel import (
    MAIN_REGISTRY,
    Architecture,
    ArchRegistry,
    ArchSupport,
    ImageModelDescriptor,
    ModelTiling,
    UnsupportedModelError,
)
from torch import Tensor, nn

from sparse_sr_attn.backbones.attach import SLOT, is_record, reattach, without_attention
from sparse_sr_attn.backbones.base import OPTIONS, options_of
from sparse_sr_attn.checkpoints.load import load_model
from sparse_sr_attn.checkpoints.read import carried_options, records_in
from sparse_sr_attn.config import join_path, old_names_allowed
from sparse_sr_attn.errors import CheckpointError, ConfigError

_UNITS = {"num_feat": "nf", "num_group": "ng", "num_block": "nb"}


class NetworkArchitecture(Architecture):  # type: ignore[misc]  # spandrel says nothing about its types
    """One of our networks, recognised by the options stored with its weights.

    A plain EDSR or RCAN stores none, so another architecture may recognise it.

    Args:
        name: as programs show it.
        network: the name of its class.
    """

    def __init__(self, name: str, network: str) -> None:
        super().__init__(id=f"sparse_sr_attn.{name}", name=name, detect=self._recognises)
        self.network = network

    def _recognises(self, state_dict: Mapping[str, Any]) -> bool:
        carried = state_dict.get(OPTIONS)
        try:
            return isinstance(carried, Tensor) and carried_options(carried).get("type") == self.network
        except CheckpointError:  # not one of ours
            return False

    def load(self, state_dict: Mapping[str, Any]) -> ImageModelDescriptor:
        """Return the network with these weights and all its options, and what spandrel reports about it.

        Raises:
            CheckpointError: as in `load_model`.
        """
        model = load_model(state_dict)
        options = options_of(model) or {}
        return ImageModelDescriptor(
            model,
            model.state_dict(),
            architecture=self,
            purpose="SR",
            tags=_tags(options),
            # float16 ends at 65504, which features of images in 0..255 may pass; in 0..1 it errs less than 8 bits do.
            supports_half=model.img_range <= 1,
            supports_bfloat16=True,
            scale=model.upscale,
            input_channels=options["num_in_ch"],
            output_channels=options["num_out_ch"],
            tiling=ModelTiling.DISCOURAGED,  # attention looks farther than a tile
        )


def _tags(options: Mapping[str, Any]) -> list[str]:
    """Return sizes in spandrel's short form and the layers that were chosen: `64nf`, `16nb`, `LCoA`."""
    sizes = [f"{options[name]}{unit}" for name, unit in _UNITS.items() if name in options]
    choices = [options.get("block"), options.get("attention")]
    configs = [one for choice in choices if choice for one in ([choice] if isinstance(choice, Mapping) else choice)]
    return sizes + sorted({one["type"] for one in configs})


class AttendedArchitecture(Architecture):  # type: ignore[misc]
    """A network that spandrel knows, with attention that `attach` put into it.

    Args:
        registry: where the network itself is looked up.
    """

    def __init__(self, registry: ArchRegistry = MAIN_REGISTRY) -> None:
        super().__init__(id="sparse_sr_attn.Attended", name="Attended", detect=_has_record)
        self._registry = registry

    def load(self, state_dict: Mapping[str, Any]) -> ImageModelDescriptor:
        """Return the network as spandrel builds it, with the attention that its weights record.

        Raises:
            CheckpointError: spandrel does not know the network, or the attention does not fit it.
        """
        plain = {key: value for key, value in without_attention(state_dict).items() if key != OPTIONS}
        records = records_in(state_dict)
        try:
            found = self._registry.load(plain)
        except UnsupportedModelError as error:
            hosts = ", ".join(sorted({str(record.get("host")) for record in records.values()}))
            raise CheckpointError(
                f"has attention in a network that spandrel does not know ({hosts}); sparse_sr_attn loads it with "
                "load_model(..., model=...), or on the command line with --host FILE.py:NAME"
            ) from error
        if not isinstance(found, ImageModelDescriptor):
            raise CheckpointError(f"must be of a network that takes one image, got {type(found).__name__}")
        places = {path: _place(path, plain, found.model) for path in records}
        moved = {place: _with_key(records[path], found.model.get_submodule(place)) for path, place in places.items()}
        try:
            with old_names_allowed():
                reattach(found.model, moved)
        except (ConfigError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise CheckpointError(f"the attention recorded with the weights cannot be attached: {error}") from error
        for path, place in places.items():
            start = join_path(path, f"{SLOT}.")
            layers = {key.removeprefix(start): value for key, value in state_dict.items() if key.startswith(start)}
            found.model.get_submodule(join_path(place, SLOT)).load_state_dict(layers)
        types = {attention["type"] for record in records.values() for attention in record["attention"]}
        return ImageModelDescriptor(
            found.model,
            found.model.state_dict(),
            architecture=self,
            purpose=found.purpose,
            tags=[found.architecture.name, *found.tags, *sorted(types)],
            supports_half=found.supports_half,
            supports_bfloat16=found.supports_bfloat16,
            scale=found.scale,
            input_channels=found.input_channels,
            output_channels=found.output_channels,
            size_requirements=found.size_requirements,
            tiling=ModelTiling.DISCOURAGED,
            call_fn=found._call_fn,
        )


def _has_record(state_dict: Mapping[str, Any]) -> bool:
    return any(is_record(key) for key in state_dict)


def _with_key(record: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """Return a record whose key is that of a weight of the module."""
    names = [name for name, _ in module.named_parameters()]
    return dict(record) if record["key"] in names else {**record, "key": names[0]}


def _place(path: str, plain: Mapping[str, Any], model: nn.Module) -> str:
    """Return the path of a trunk in the model that spandrel built, which may have other names than the file.

    Raises:
        CheckpointError: no module of the model has the weights of the trunk, one by one.
    """
    own = model.state_dict()
    if own.keys() >= plain.keys():
        return path
    known: dict[bytes, list[str]] = {}
    for key, value in own.items():
        known.setdefault(_bytes(value), []).append(key)
    start = join_path(path, "") if path else ""
    found = [known.get(_bytes(value), []) for key, value in plain.items() if key.startswith(start)]
    names = [keys[0].split(".") for keys in found if len(keys) == 1]
    common = [parts[0] for parts in itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*names, strict=False))]
    while common and type(model.get_submodule(".".join(common))) is not nn.Sequential:
        common.pop()
    if not names or not common:
        raise CheckpointError(f"no module of spandrel's {type(model).__name__} has the weights of {path!r}")
    return ".".join(common)


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() > 1 else b""


ARCHITECTURES = (
    NetworkArchitecture("LCoAN", "LCoAN"),
    NetworkArchitecture("ELAN", "ELAN"),
    NetworkArchitecture("SparseEDSR", "EDSR"),
    NetworkArchitecture("SparseRCAN", "RCAN"),
)
"""All of ours, named as in BasicSR option files."""


def install(registry: ArchRegistry = MAIN_REGISTRY) -> None:
    """Let spandrel load our networks. Calling it again has no effect.

    Args:
        registry: where to add them, for example `MAIN_REGISTRY.copy()` for `ModelLoader(registry=...)`. Default:
            spandrel's main registry, which all programs use. Entries cannot be removed from a registry.
    """
    others = tuple(support.architecture.id for support in registry)
    registry.add(*map(ArchSupport.from_architecture, ARCHITECTURES), ignore_duplicates=True)
    attended = AttendedArchitecture(registry)
    registry.add(ArchSupport.from_architecture(attended, before=others), ignore_duplicates=True)
