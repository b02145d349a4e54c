"""EDSR-PyTorch's networks, on images in 0..255; written from their key names and their papers."""

import torch
from torch import Tensor, nn


class Conv(nn.Conv2d):
    def __init__(self, i: int, o: int, k: int = 3) -> None:
        super().__init__(i, o, k, padding=k // 2)


class MeanShift(nn.Conv2d):
    """A fixed 1x1 convolution."""

    def __init__(self, mean: float) -> None:
        super().__init__(3, 3, 1)
        self.weight.data = torch.eye(3).view(3, 3, 1, 1)
        self.bias.data = mean * torch.tensor((0.4488, 0.4371, 0.4040))


class Scaled(nn.Module):
    """A residual block, `body` its branch."""

    def __init__(self, body: list[nn.Module], res_scale: float = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)
        self.res_scale = res_scale

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.res_scale + x


class Gate(nn.Module):
    def __init__(self, n: int, r: int) -> None:
        super().__init__()
        self.conv_du = nn.Sequential(Conv(n, n // r, 1), nn.ReLU(), Conv(n // r, n, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv_du(x.mean(dim=(2, 3), keepdim=True))


class Theirs(nn.Module):
    """An EDSR, or an RCAN if there are groups, of 8 channels."""

    def __init__(
        self, upscale: int, *, groups: int = 0, blocks: int = 3, res_scale: float = 1, rgb_range: float = 255
    ) -> None:
        super().__init__()

        def block() -> nn.Module:
            return Scaled([Conv(8, 8), nn.ReLU(), Conv(8, 8), *([Gate(8, 4)] if groups else [])], res_scale)

        def row() -> list[nn.Module]:
            return [block() for _ in range(blocks)]

        self.sub_mean, self.add_mean = MeanShift(-rgb_range), MeanShift(rgb_range)
        self.head = nn.Sequential(Conv(3, 8))
        body = [Scaled([*row(), Conv(8, 8)]) for _ in range(groups)] if groups else row()
        self.body = nn.Sequential(*body, Conv(8, 8))
        up: list[nn.Module] = []
        for step in [3] if upscale == 3 else [2] * (upscale.bit_length() - 1):
            up += [Conv(8, step * step * 8), nn.PixelShuffle(step)]
        self.tail = nn.Sequential(nn.Sequential(*up), Conv(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.sub_mean(x))
        return self.add_mean(self.tail(x + self.body(x)))
