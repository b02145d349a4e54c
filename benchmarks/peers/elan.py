"""The code of ELAN's authors (Zhang et al., ECCV 2022), from a folder where you cloned it.

    git clone https://github.com/xindongzhang/ELAN
    python -m benchmarks.speed --networks --methods ELAN-light --peer "benchmarks/peers/elan.py:ELAN:folder='ELAN'"
    python -m benchmarks.speed --methods GMSA --embed-dim 60 --peer "benchmarks/peers/elan.py:GMSA:folder='ELAN'"

It needs einops. Its files import names of timm that they do not use; they get others, so timm need not be installed.
"""

import importlib
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import cast

from torch import Tensor, nn

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
    if not (Path(folder) / "models" / "elan_block.py").is_file():
        raise ValueError(f"folder must hold models/elan_block.py, as a clone of their repository does, got {folder!r}")
    with _found_in(folder):
        return importlib.import_module(name)


@contextmanager
def _found_in(folder: str) -> Iterator[None]:
    """Let imports find their package, and the names of timm; afterwards all is as before."""
    stand_ins = {name: types.ModuleType(name) for name in _TIMM}
    for unused in ("DropPath", "to_2tuple", "trunc_normal_"):
        setattr(stand_ins[_TIMM[-1]], unused, None)
    replaced = {name: sys.modules.pop(name) for name in _replaced()}
    path = str(Path(folder).resolve())
    sys.modules.update(stand_ins)
    sys.path.insert(0, path)
    try:
        yield
    finally:
        sys.path.remove(path)
        for name in _replaced():
            del sys.modules[name]
        sys.modules.update(replaced)


def _replaced() -> list[str]:
    """Return the imported modules of timm, and of any package that is named like theirs."""
    return [name for name in sys.modules if name.partition(".")[0] in ("models", "timm")]
