"""Losses that BasicSR lacks, for option files."""

from typing import Literal, cast

import torch
from torch import Tensor, nn

from sparse_sr_attn.config import NonNegative, checked


class FFTLoss(nn.Module):
    """L1 distance between the Fourier transforms of two images, over their real and imaginary parts.

    Args:
        loss_weight: factor on the loss.
        reduction: `mean` or `sum`.
    """

    @checked
    def __init__(self, loss_weight: NonNegative = 1.0, reduction: Literal["mean", "sum"] = "mean") -> None:
        super().__init__()
        self.loss_weight = loss_weight
        self.reduction = reduction

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """Return the loss.

        Args:
            pred: images, (N, C, H, W).
            target: images of the same size.
        """
        # The transform is linear: one of the difference is enough.
        difference = torch.view_as_real(torch.fft.rfft2(pred - target)).abs()
        return self.loss_weight * cast(Tensor, getattr(difference, self.reduction)())
