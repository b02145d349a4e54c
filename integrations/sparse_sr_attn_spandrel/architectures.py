"""Our networks as architectures of spandrel: how it knows their weights, and what it tells a program about them."""

from collections.abc import Mapping
from typing import Any

from spandrel import MAIN_REGISTRY, Architecture, ArchRegistry, ArchSupport, ImageModelDescriptor, ModelTiling
from torch import Tensor

from sparse_sr_attn.backbones.base import OPTIONS, options_of
from sparse_sr_attn.checkpoints.load import load_model
from sparse_sr_attn.checkpoints.read import carried_options
from sparse_sr_attn.errors import CheckpointError

_UNITS = {"num_feat": "nf", "num_group": "ng", "num_block": "nb"}


class NetworkArchitecture(Architecture):  # type: ignore[misc]  # spandrel says nothing about its types
    """One of our networks, known by the options that its weights carry.

    The plain EDSR and RCAN carry none, so they stay with whoever else claims them.

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
        except CheckpointError:  # somebody else's
            return False

    def load(self, state_dict: Mapping[str, Any]) -> ImageModelDescriptor:
        """Return the network with these weights, all its options recovered, and what programs want to know of it.

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
    maps = [one for choice in choices if choice for one in ([choice] if isinstance(choice, Mapping) else choice)]
    return sizes + sorted({one["type"] for one in maps})


ARCHITECTURES = (
    NetworkArchitecture("LCoAN", "LCoAN"),
    NetworkArchitecture("ELAN", "ELAN"),
    NetworkArchitecture("SparseEDSR", "EDSR"),
    NetworkArchitecture("SparseRCAN", "RCAN"),
)
"""All of ours, named as in BasicSR option files."""


def install(registry: ArchRegistry = MAIN_REGISTRY) -> None:
    """Let spandrel load our networks. Again and again does no harm.

    Args:
        registry: where to; spandrel's main one, which all programs use, unless you give a registry of your own, say
            `MAIN_REGISTRY.copy()`, for `ModelLoader(registry=...)`. What is in a registry cannot be taken out.
    """
    registry.add(*map(ArchSupport.from_architecture, ARCHITECTURES), ignore_duplicates=True)
