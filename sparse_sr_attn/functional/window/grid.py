"""How a map is cut into windows: arithmetic on pixel indices, so that data are moved only once.

`tiles.py` cuts by blocks instead, which is faster on the CPU.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional as F

from sparse_sr_attn.functional._torch import is_exporting, modulo


@dataclass(frozen=True)
class WindowGrid:
    """A map of `height` by `width` pixels, padded at the right and the bottom to whole windows.

    The padded map is rolled cyclically to the left and up by a shift. Windows, and the slots of each, are in raster
    order.
    """

    height: int
    width: int
    window_size: int

    def __post_init__(self) -> None:
        if self.window_size < 1:
            raise ValueError(f"window_size must be >= 1, got {self.window_size}")

    @property
    def rows(self) -> int:
        """Number of rows of windows."""
        return (self.height + self.window_size - 1) // self.window_size  # of what is >= 0: ONNX rounds to 0

    @property
    def columns(self) -> int:
        """Number of columns of windows."""
        return (self.width + self.window_size - 1) // self.window_size

    @property
    def num_windows(self) -> int:
        """Number of windows of the padded map; in export, one more, of padding.

        Export specialises on dimensions of 1, so there are always at least two windows.
        """
        return self.rows * self.columns + int(is_exporting())

    @property
    def is_whole(self) -> bool:
        """Whether the map is known to need no padding; always `False` in export, which is for all sizes."""
        if is_exporting():
            return False
        return self.height % self.window_size == 0 and self.width % self.window_size == 0

    def cut(self, x: Tensor, shift: int) -> Tensor:
        """Return the windows of a map `(b, c, h, w)` as `(b, k, i, c)`; padding is zero."""
        rows = x.flatten(2).transpose(1, 2)
        rows = rows.contiguous() if self.is_whole else F.pad(rows, (0, 0, 0, 1))  # the last one is what pads read
        cut: Tensor = rows.index_select(1, self.pixels(shift, x.device))
        return cut.view(x.shape[0], self.num_windows, self.window_size**2, x.shape[1])

    def join(self, windows: Tensor, shift: int) -> Tensor:
        """Join windows `(b, k, i, c)` to a map `(b, c, h, w)`; the inverse of `cut`."""
        rows = windows.flatten(1, 2).index_select(1, self.slots(shift, windows.device))
        return rows.transpose(1, 2).unflatten(2, (self.height, self.width))

    def pixels(self, shift: int, device: torch.device) -> Int[Tensor, "ki"]:
        """Return the index of the pixel in each slot; the number of pixels for padding."""
        size = self.window_size
        slot = torch.arange(self.num_windows * size**2, device=device)
        window, place = slot // size**2, slot % size**2
        y = modulo(window // self.columns * size + place // size + shift, self.rows * size)
        x = modulo(modulo(window, self.columns) * size + place % size + shift, self.columns * size)
        real = (window < self.rows * self.columns) & (y < self.height) & (x < self.width)
        return torch.where(real, y * self.width + x, self.height * self.width)

    def slots(self, shift: int, device: torch.device) -> Int[Tensor, "n"]:
        """Return the slot of each pixel."""
        size = self.window_size
        pixel = torch.arange(self.height * self.width, device=device)
        y = modulo(pixel // self.width - shift, self.rows * size)
        x = modulo(modulo(pixel, self.width) - shift, self.columns * size)
        window = y // size * self.columns + x // size
        return window * size**2 + y % size * size + x % size

    def is_real(self, shift: int, device: torch.device) -> Bool[Tensor, "k i"]:
        """Return a mask of the slots that hold a pixel."""
        return (self.pixels(shift, device) < self.height * self.width).view(-1, self.window_size**2)


def group_widths(channels: int, num_groups: int) -> list[int]:
    """Return the channels of each group, as even as possible, larger groups first, without empty groups."""
    least, larger = divmod(channels, num_groups)
    widths = [least + (index < larger) for index in range(num_groups)]
    return [width for width in widths if width]
