"""Shift convolution pixel by pixel, and as the published depthwise convolution with one-hot kernels."""

import torch
from torch import Tensor
from torch.nn import functional as F

STEPS = ((0, 1), (0, -1), (1, 0), (-1, 0))
"""Offset (down, right) from a pixel to the pixel that each of the first four fifths of the channels is read from."""


def step_of(channel: int, num_channels: int) -> tuple[int, int]:
    """Return the offset of one channel out of `num_channels`."""
    for share, step in enumerate(STEPS):
        if channel in range(share * (num_channels // 5), (share + 1) * (num_channels // 5)):
            return step
    return 0, 0


def shift2d(x: Tensor) -> Tensor:
    """Return each channel read from its neighbour, one pixel at a time; zero without a neighbour."""
    _, channels, height, width = x.shape
    maps = []
    for channel in range(channels):
        down, right = step_of(channel, channels)
        pixels = [
            x[:, channel, row + down, column + right]
            if 0 <= row + down < height and 0 <= column + right < width
            else torch.zeros_like(x[:, channel, 0, 0])
            for row in range(height)
            for column in range(width)
        ]
        maps.append(torch.stack(pixels, dim=-1).reshape(-1, height, width))
    return torch.stack(maps, dim=1)


def one_hot_kernels(num_channels: int) -> Tensor:
    """Return the published depthwise kernels, a single one in each: `(c, 1, 3, 3)`, float64."""
    kernels = torch.zeros(num_channels, 1, 3, 3, dtype=torch.float64)
    fifth = num_channels // 5
    kernels[:fifth, :, 1, 2] = 1
    kernels[fifth : 2 * fifth, :, 1, 0] = 1
    kernels[2 * fifth : 3 * fifth, :, 2, 1] = 1
    kernels[3 * fifth : 4 * fifth, :, 0, 1] = 1
    kernels[4 * fifth :, :, 1, 1] = 1
    return kernels


def depthwise(x: Tensor) -> Tensor:
    """Return the depthwise convolution of `x`, `(b, c, h, w)`, with the one-hot kernels, zeros outside."""
    channels = x.shape[1]
    return F.conv2d(x, one_hot_kernels(channels).to(x), padding=1, groups=channels)


def shift_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the 1x1 convolution of the depthwise convolution."""
    return F.conv2d(depthwise(x), weight, bias)
