"""Shift convolution and local feature extraction, the convolutional parts of ELAN.

Zhang et al., "Efficient Long-Range Attention Network for Image Super-resolution", ECCV 2022, arXiv 2203.06697.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_sr_attn.config import PositiveInt, checked
from sparse_sr_attn.functional.backend import runs_kernels
from sparse_sr_attn.functional.channels_last import channels_last
from sparse_sr_attn.functional.shift import Form, shift2d, shift_conv2d
from sparse_sr_attn.layers.base import LAYERS, PointwiseConv2d, check_map, is_unmodified

_STRIP = 2**19
"""Elements between the two convolutions of an LFE that are computed at a time without gradients, to stay in cache."""

_SOURCE = "Zhang et al., arXiv 2203.06697"


@LAYERS.register("ShiftConv2d", kind="operator", source=_SOURCE)
class ShiftConv2d(nn.Module):
    """1x1 convolution that reads four fifths of the channels from the neighbouring pixels: right, left, below, above.

    It has the reach of a 3x3 convolution with a ninth of the products and weights.

    Args:
        in_channels: channels of the input, >= 1; with fewer than 5, nothing is shifted.
        out_channels: channels of the output; `in_channels` by default.
        form: "slices", or "masked", which takes less memory in training and more time. The results are equal.

    Raises:
        ConfigError: options are invalid; the message names all of them.

    Source:
        Shift-conv of ELAN. Deviation: the released code stores its one-hot kernels as weights, and its two forms have
        different parameters.

    Examples:
        >>> ShiftConv2d(10, 16)(torch.rand(1, 10, 12, 12)).shape
        torch.Size([1, 16, 12, 12])
    """

    @checked
    def __init__(
        self, in_channels: PositiveInt, out_channels: PositiveInt | None = None, *, form: Form = "slices"
    ) -> None:
        super().__init__()
        conv = nn.Conv2d(in_channels, out_channels or in_channels, 1)
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.weight, self.bias = conv.weight, conv.bias
        self.form = form

    def extra_repr(self) -> str:
        """Return the options that are not visible from shapes."""
        return f"{self.in_channels}, {self.out_channels}, form={self.form!r}"

    def forward(self, x: Float[Tensor, "b c_in h w"]) -> Float[Tensor, "b c_out h w"]:
        """Return a map of `out_channels` channels, of the same height and width, for any h, w >= 1.

        Raises:
            ShapeError: `x` is not a map of `in_channels` channels.
        """
        check_map(x, self.in_channels, "in_channels")
        return shift_conv2d(x, self.weight, self.bias, form=self.form)


@LAYERS.register("LFE", kind="operator", source=_SOURCE)
class LFE(nn.Module):
    r"""Local feature extraction: $\mathrm{shiftconv}(\mathrm{ReLU}(\mathrm{shiftconv}(x)))$, without residual.

    Args:
        embed_dim: channels of the feature map, >= 1.
        expansion: ratio of the channels between the two convolutions to `embed_dim`, >= 1.
        form: as in `ShiftConv2d`.

    Raises:
        ConfigError: options are invalid; the message names all of them.

    Source:
        LFE of ELAN, with ReLU as in all its configurations.

    Examples:
        >>> LFE(60)(torch.rand(1, 60, 12, 12)).shape
        torch.Size([1, 60, 12, 12])
    """

    @checked
    def __init__(self, embed_dim: PositiveInt, *, expansion: PositiveInt = 2, form: Form = "slices") -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.expansion = expansion
        self.form = form
        self.conv1 = PointwiseConv2d(embed_dim, expansion * embed_dim, 1)
        self.conv2 = PointwiseConv2d(expansion * embed_dim, embed_dim, 1)

    def extra_repr(self) -> str:
        """Return the options that are not visible from shapes."""
        return f"form={self.form!r}"

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return a map of the same size.

        Raises:
            ShapeError: `x` is not a map of `embed_dim` channels.
        """
        check_map(x, self.embed_dim)
        step = max(1, _STRIP // (self.expansion * self.embed_dim * x.shape[3]))
        whole = torch.is_grad_enabled() or torch.compiler.is_compiling() or not self._is_unmodified()
        if whole or not x.is_cpu or x.dtype != torch.float32 or step >= x.shape[2]:
            return self._whole(x)
        x = channels_last(x)
        return torch.cat([self._lines(x, start, start + step) for start in range(0, x.shape[2], step)], dim=2)

    def add_to(self, x: Float[Tensor, "b c h w"], scale: float) -> Float[Tensor, "b c h w"]:
        """Return `x + scale * self(x)`; on GPUs with Triton, the sum takes no kernel of its own."""
        if not runs_kernels(x.device) or not is_unmodified(self, LFE) or not self._is_unmodified():
            return torch.add(x, self(x), alpha=scale)
        check_map(x, self.embed_dim)
        inner = self._shift_conv(self.conv1, x)
        options: dict[str, Any] = {"form": self.form, "relu": True, "residual": x, "scale": scale}
        return shift_conv2d(inner, self.conv2.weight, self.conv2.bias, **options)

    def _whole(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return self._shift_conv(self.conv2, self._shift_conv(self.conv1, x), relu=True)

    def _shift_conv(
        self, conv: PointwiseConv2d, x: Float[Tensor, "b c_in h w"], *, relu: bool = False
    ) -> Float[Tensor, "b c_out h w"]:
        """Return the shift convolution of `x`, or of `relu(x)`."""
        if is_unmodified(conv, PointwiseConv2d) and (self.form == "masked" or runs_kernels(x.device)):
            return shift_conv2d(x, conv.weight, conv.bias, form=self.form, relu=relu)
        return conv(shift2d(F.relu(x) if relu else x))

    def _is_unmodified(self) -> bool:
        return is_unmodified(self.conv1, PointwiseConv2d) and is_unmodified(self.conv2, PointwiseConv2d)

    def _lines(self, x: Float[Tensor, "b c h w"], start: int, stop: int) -> Float[Tensor, "b c _ w"]:
        """Return some rows of the result, computed only from the rows of the map that they depend on."""
        above = min(start, 2)
        lines: Tensor = self._whole(x[:, :, start - above : stop + 2])[:, :, above:]
        return lines[:, :, : stop - start]
