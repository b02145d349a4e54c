r"""Shift convolution: a 1x1 convolution that sees five pixels, each with a fifth of the channels.

With $g = \lfloor c / 5 \rfloor$, the channels $[0, g)$ are read from the right neighbour of a pixel, $[g, 2g)$ from the
left one, $[2g, 3g)$ from the one below, $[3g, 4g)$ from the one above, and the rest from the pixel itself.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from sparse_sr_attn.errors import BackendError
from sparse_sr_attn.functional.backend import runs_kernels
from sparse_sr_attn.functional.channels_last import is_channels_last, pointwise_conv2d
from sparse_sr_attn.functional.conv_triton import conv1x1

Form = Literal["slices", "masked"]
"""How a shift convolution is computed: by shifted slices, or as a 3x3 convolution with five nonzero pixels."""

_NUM_GROUPS = 5
_NEIGHBORS = ((1, 2), (1, 0), (2, 1), (0, 1))  # row and column, in a 3x3 kernel, that each group of channels reads


def shift2d(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Shift the first four fifths of the channels by a pixel: left, right, up, down, with zero padding.

    Note:
        Computed by moving slices. On a CPU, channels-last maps use a depthwise 3x3 convolution with one-hot kernels,
        because their slices are fragmented. Both give bit-identical results.

    Source:
        ELAN (arXiv 2203.06697), which uses such a convolution.

    Examples:
        >>> x = torch.arange(3.0).expand(1, 5, 1, 3)  # five channels, each one row: 0, 1, 2
        >>> shift2d(x)[0, :, 0]
        tensor([[1., 2., 0.],
                [0., 0., 1.],
                [0., 0., 0.],
                [0., 0., 0.],
                [0., 1., 2.]])
    """
    if _is_faster_depthwise(x):
        return F.conv2d(x, shift_kernels(x)[:, None], padding=1, groups=x.shape[1])
    group = x.shape[1] // _NUM_GROUPS
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        moved = [
            F.pad(x[:, index * group : (index + 1) * group], (1 - column, column - 1, 1 - row, row - 1))
            for index, (row, column) in enumerate(_NEIGHBORS)
        ]
        return torch.cat([*moved, x[:, len(_NEIGHBORS) * group :]], dim=1)
    # Where nothing learns: written in place, so that all is copied once.
    result = torch.zeros_like(x)
    for index, (row, column) in enumerate(_NEIGHBORS):
        channels = slice(index * group, (index + 1) * group)
        (here_y, there_y), (here_x, there_x) = _moved(row - 1), _moved(column - 1)
        result[:, channels, there_y, there_x] = x[:, channels, here_y, here_x]
    result[:, len(_NEIGHBORS) * group :] = x[:, len(_NEIGHBORS) * group :]
    return result


def _moved(step: int) -> tuple[slice, slice]:
    """Return source and destination slices along a side, if each position reads the one `step` further."""
    return slice(max(step, 0), min(step, 0) or None), slice(max(-step, 0), min(-step, 0) or None)


def _is_faster_depthwise(x: Tensor) -> bool:
    if not x.is_cpu or torch.compiler.is_compiling() or x.dtype not in (torch.float32, torch.bfloat16):
        return False
    return is_channels_last(x) and not x.is_contiguous()


def shift_conv2d(
    x: Float[Tensor, "b c h w"],
    weight: Float[Tensor, "o c 1 1"],
    bias: Float[Tensor, "o"] | None = None,
    *,
    form: Form = "slices",
    relu: bool = False,
    residual: Float[Tensor, "b o h w"] | None = None,
    scale: float = 1.0,
) -> Float[Tensor, "b o h w"]:
    """Return the 1x1 convolution of `shift2d(x)`, or `residual` plus `scale` times this convolution.

    On GPUs with triton, one kernel does it all, for "slices" with a bias.

    Args:
        x: the feature map.
        weight: weight of the 1x1 convolution.
        bias: bias of the convolution.
        form: "slices" moves slices of the map; "masked" is one 3x3 convolution, which takes nine times the products but
            keeps no shifted copy of the map for the backward. The results agree up to rounding.
        relu: take `relu(x)` instead of `x`.
        residual: a map to add the convolution to.
        scale: factor on the convolution that is added.

    Raises:
        BackendError: `form` is unknown.

    Source:
        ELAN (arXiv 2203.06697), whose released code has both forms with different parameters; here they share them.

    Examples:
        >>> shift_conv2d(torch.rand(2, 10, 6, 7), torch.rand(16, 10, 1, 1)).shape
        torch.Size([2, 16, 6, 7])
    """
    if form not in get_args(Form):
        raise BackendError(f"form must be 'slices' or 'masked', got {form!r}")
    if form == "slices" and bias is not None and runs_kernels(x.device):
        return conv1x1(x, weight, bias, shift=True, relu=relu, residual=residual, scale=scale)
    if residual is not None:
        return torch.add(residual, shift_conv2d(x, weight, bias, form=form, relu=relu), alpha=scale)
    x = F.relu(x) if relu else x
    if form == "masked":
        return F.conv2d(x, spread(weight), bias, padding=1)
    shifted = shift2d(x)
    if is_channels_last(x):
        return pointwise_conv2d(shifted, weight, bias)
    return F.conv2d(shifted, weight, bias)


def spread(weight: Float[Tensor, "o c 1 1"]) -> Float[Tensor, "o c 3 3"]:
    """Return the 3x3 kernel equivalent to a shift and a 1x1 convolution: each input channel has one nonzero pixel.

    Examples:
        >>> spread(torch.rand(16, 10, 1, 1)).shape
        torch.Size([16, 10, 3, 3])
    """
    return weight * shift_kernels(weight)


def shift_kernels(weight: Float[Tensor, "o c _ _"]) -> Float[Tensor, "c 3 3"]:
    """Return a one-hot 3x3 kernel for each input channel, with the 1 at the pixel that the channel is read from.

    Examples:
        >>> shift_kernels(torch.rand(16, 5, 1, 1))[0]  # channel 0 is read from the right
        tensor([[0., 0., 0.],
                [0., 0., 1.],
                [0., 0., 0.]])
    """
    group = weight.shape[1] // _NUM_GROUPS
    kernels = weight.new_zeros(weight.shape[1], 3, 3)
    for index, (row, column) in enumerate(_NEIGHBORS):
        kernels[index * group : (index + 1) * group, row, column] = 1
    kernels[len(_NEIGHBORS) * group :, 1, 1] = 1
    return kernels
