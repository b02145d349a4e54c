"""How a map of some size is cut into windows: arithmetic on the numbers of its pixels, so that data move once."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional as F

from sparse_sr_attn.functional._torch import is_exporting, modulo


@dataclass(frozen=True)
class WindowGrid:
    """A map of `height` by `width` pixels, padded at the right and at the bottom to whole windows.

    The padded map is rolled to the left and up by a shift, cyclically; windows follow each other in raster order, and
    so do the slots of each.
    """

    height: int
    width: int
    window_size: int

    def __post_init__(self) -> None:
        if self.window_size < 1:
            raise ValueError(f"window_size must be >= 1, got {self.window_size}")

    @property
    def rows(self) -> int:
        """Windows in a column of them."""
        return (self.height + self.window_size - 1) // self.window_size  # of what is >= 0: ONNX rounds to 0

    @property
    def columns(self) -> int:
        """Windows in a row of them."""
        return (self.width + self.window_size - 1) // self.window_size

    @property
    def num_windows(self) -> int:
        """Windows of the padded map; in a program that is exported one of pads more.

        A dimension of 1 is another program for export. So there are two of them at least.
        """
        return self.rows * self.columns + int(is_exporting())

    @property
    def is_whole(self) -> bool:
        """Whether the map is known to have no pads; a program that is exported for all sizes is not asked."""
        if is_exporting():
            return False
        return self.height % self.window_size == 0 and self.width % self.window_size == 0

    def cut(self, x: Tensor, shift: int) -> Tensor:
        """Return the windows of a map `(b, c, h, w)` as `(b, k, i, c)`; pads are zeros."""
        rows = x.flatten(2).transpose(1, 2)
        rows = rows.contiguous() if self.is_whole else F.pad(rows, (0, 0, 0, 1))  # the last one is what pads read
        cut: Tensor = rows.index_select(1, self.pixels(shift, x.device))
        return cut.view(x.shape[0], self.num_windows, self.window_size**2, x.shape[1])

    def join(self, windows: Tensor, shift: int) -> Tensor:
        """Return the map `(b, c, h, w)` of windows `(b, k, i, c)`: the inverse of `cut`."""
        rows = windows.flatten(1, 2).index_select(1, self.slots(shift, windows.device))
        return rows.transpose(1, 2).unflatten(2, (self.height, self.width))

    def pixels(self, shift: int, device: torch.device) -> Int[Tensor, "ki"]:
        """Return the number of the pixel in each slot; one past the last for pads."""
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
        """Return which slots hold a pixel."""
        return (self.pixels(shift, device) < self.height * self.width).view(-1, self.window_size**2)
