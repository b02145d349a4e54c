"""Maps in channels-last memory: pixels are rows, and what happens to each of them alone is a plain matrix product."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def channels_last(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Return the same map in channels-last memory."""
    if torch.compiler.is_compiling() or x.is_contiguous(memory_format=torch.channels_last):
        return x.contiguous(memory_format=torch.channels_last)
    # Matrix by matrix: torch transposes a single one in blocks, five times as fast.
    rows = torch.stack([sample.flatten(1).t().contiguous() for sample in x])
    return rows.view(x.shape[0], x.shape[2], x.shape[3], x.shape[1]).permute(0, 3, 1, 2)


def pointwise_conv2d(
    x: Float[Tensor, "b c h w"], weight: Float[Tensor, "o c 1 1"], bias: Float[Tensor, "o"] | None
) -> Float[Tensor, "b o h w"]:
    """Return a 1x1 convolution.

    With one thread torch hands 1x1 convolutions of fewer than 16 images in float32 to a slower routine than otherwise.
    A pixel does not care in which image it is; so the lines of a map are images here.
    """
    if torch.compiler.is_exporting() or not x.is_cpu or x.dtype != torch.float32:
        return F.conv2d(x, weight, bias)
    lines = channels_last(x).permute(0, 2, 3, 1).flatten(0, 1)[:, None].permute(0, 3, 1, 2)
    rows = F.conv2d(lines, weight, bias).permute(0, 2, 3, 1)
    return rows.reshape(x.shape[0], x.shape[2], x.shape[3], weight.shape[0]).permute(0, 3, 1, 2)
