"""Our networks as architectures of spandrel: how it knows their weights, and what it tells a program about them."""

from collections.abc import Mapping
from typing import Any

from spandrel import MAIN_REGISTRY, Architecture, ArchRegistry, ArchSupport, ImageModelDescriptor, ModelTiling

from sparse_sr_attn.backbones.base import OPTIONS, ResidualNetwork, options_of
from sparse_sr_attn.backbones.edsr import EDSR
from sparse_sr_attn.backbones.lcoan import LCoAN
from sparse_sr_attn.backbones.rcan import RCAN
from sparse_sr_attn.checkpoints import LAYOUTS, load_model

_OURS = {OPTIONS, "conv_first.weight", "conv_last.weight"}
_UNITS = {"num_feat": "nf", "num_group": "ng", "num_block": "nb"}


class NetworkArchitecture(Architecture):  # type: ignore[misc]  # spandrel says nothing about its types
    """One of our networks.

    Its weights are known by the names that `load_model` knows and by the options that they carry. So the plain EDSR and
    RCAN, which carry none, stay with whoever else claims them.

    Args:
        name: as programs show it.
        network: what is built.
    """

    def __init__(self, name: str, network: type[ResidualNetwork]) -> None:
        super().__init__(id=f"sparse_sr_attn.{name}", name=name, detect=self._recognises)
        self.network = network

    def _recognises(self, state_dict: Mapping[str, Any]) -> bool:
        layouts = (layout for layout in LAYOUTS if layout.build is self.network)
        return state_dict.keys() >= _OURS and any(layout.recognises(state_dict) for layout in layouts)

    def load(self, state_dict: Mapping[str, Any]) -> ImageModelDescriptor:
        """Return the network with these weights, all its options recovered, and what programs want to know of it.

        Raises:
            CheckpointError: as in `load_model`.
        """
        model = load_model(state_dict)
        return ImageModelDescriptor(
            model,
            model.state_dict(),
            architecture=self,
            purpose="SR",
            tags=_tags(options_of(model) or {}),
            # float16 ends at 65504, which features of images in 0..255 may pass; in 0..1 it errs less than 8 bits do.
            supports_half=model.img_range <= 1,
            supports_bfloat16=True,
            scale=model.upscale,
            input_channels=model.num_in_ch,
            output_channels=model.conv_last.out_channels,
            tiling=ModelTiling.DISCOURAGED,  # attention looks farther than a tile
        )


def _tags(options: Mapping[str, Any]) -> list[str]:
    """Return sizes in spandrel's short form and the attention layers: `64nf`, `16nb`, `LCoA`."""
    sizes = [f"{options[name]}{unit}" for name, unit in _UNITS.items() if name in options]
    attention = options.get("attention", [])
    maps = [attention] if isinstance(attention, Mapping) else attention
    return sizes + sorted({item["type"] for item in maps})


ARCHITECTURES = (
    NetworkArchitecture("LCoAN", LCoAN),
    NetworkArchitecture("SparseEDSR", EDSR),
    NetworkArchitecture("SparseRCAN", RCAN),
)
"""All of ours, named as in BasicSR option files."""


def install(registry: ArchRegistry = MAIN_REGISTRY) -> None:
    """Let spandrel load our networks. Again and again does no harm.

    Args:
        registry: where to; spandrel's main one, which all programs use, unless you give a registry of your own, say
            `MAIN_REGISTRY.copy()`, for `ModelLoader(registry=...)`. What is in a registry cannot be taken out.
    """
    registry.add(*map(ArchSupport.from_architecture, ARCHITECTURES), ignore_duplicates=True)
