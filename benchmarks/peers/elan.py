"""The code of ELAN's authors (Zhang et al., ECCV 2022), from a folder where you cloned it.

    git clone https://github.com/xindongzhang/ELAN
    python -m benchmarks.speed --networks --methods ELAN-light --peer "benchmarks/peers/elan.py:ELAN:folder='ELAN'"
    python -m benchmarks.speed --methods GMSA --embed-dim 60 --peer "benchmarks/peers/elan.py:GMSA:folder='ELAN'"

It needs einops. Its files import names of timm that they do not use; they get others, so timm need not be installed.
"""

import types
from collections.abc import Sequence
from types import SimpleNamespace
from typing import cast

import torch
from torch import Tensor, nn

from benchmarks.peers.clone import load_from_clone

_WINDOWS = (4, 8, 16)
_TIMM = ("timm", "timm.models", "timm.models.layers")


class ELAN(nn.Module):
    """Their network; by default ELAN-light.

    Args:
        scale: super-resolution factor.
        folder: of their repository.
        channels: of the feature maps.
        num_block: number of blocks.
    """

    def __init__(self, scale: int, folder: str, channels: int = 60, num_block: int = 24) -> None:
        super().__init__()
        options = SimpleNamespace(
            scale=scale, colors=3, window_sizes=[*_WINDOWS], m_elan=num_block, c_elan=channels, n_share=1, r_expand=2,
            rgb_range=1,
        )  # fmt: skip
        self.network = _load(folder, "models.elan_network").ELAN(options)

    def forward(self, x: Tensor) -> Tensor:
        """Return the upscaled images."""
        return cast(Tensor, self.network(x))


class GMSA(nn.Module):
    """Their attention.

    Args:
        channels: of the feature map.
        folder: of their repository.
        shift: whether windows are shifted.
        window_sizes: sides of the windows.
    """

    def __init__(self, channels: int, folder: str, shift: bool = False, window_sizes: Sequence[int] = _WINDOWS) -> None:
        super().__init__()
        self.layer = _load(folder, "models.elan_block").GMSA(channels, int(shift), [*window_sizes])

    def forward(self, x: Tensor) -> Tensor:
        """Return the map plus its attention, which they leave to the block."""
        return x + cast(Tensor, self.layer(x)[0])


class SharedGMSA(GMSA):
    """Their attention with the weights of an earlier one, which are computed once for each size of map.

    For the arguments, see `GMSA`.
    """

    def __init__(self, channels: int, folder: str, shift: bool = False, window_sizes: Sequence[int] = _WINDOWS) -> None:
        super().__init__(channels, folder, shift, window_sizes)
        self.earlier = self.layer
        self.layer = type(self.earlier)(channels, int(shift), [*window_sizes], calc_attn=False)
        self.weights: dict[torch.Size, list[Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Return the map plus its attention, which they leave to the block."""
        if x.shape not in self.weights:
            with torch.no_grad():
                self.weights[x.shape] = self.earlier(x)[1]
        return x + cast(Tensor, self.layer(x, self.weights[x.shape])[0])


class LFE(nn.Module):
    """Their local feature extraction.

    Args:
        channels: of the feature map.
        folder: of their repository.
        expansion: ratio of the channels between its convolutions to `channels`.
    """

    def __init__(self, channels: int, folder: str, expansion: int = 2) -> None:
        super().__init__()
        self.layer = _load(folder, "models.elan_block").LFE(channels, channels, expansion)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same size."""
        return cast(Tensor, self.layer(x))


def _load(folder: str, name: str) -> types.ModuleType:
    """Return one of their modules."""
    stand_ins = {module: types.ModuleType(module) for module in _TIMM}
    for unused in ("DropPath", "to_2tuple", "trunc_normal_"):
        setattr(stand_ins[_TIMM[-1]], unused, None)
    return load_from_clone(folder, name, stand_ins)
