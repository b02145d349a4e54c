"""1x1 convolutions computed as matrix products."""

import pytest
import torch
from torch import nn

from sparse_sr_attn.layers.base import PointwiseConv2d


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"padding": 1}, {"stride": 2}, {"groups": 2}], ids=str)
def test_like_a_convolution_of_torch(device: torch.device, options: dict[str, int]) -> None:
    """Of any number of maps, and of one that is no batch."""
    conv = PointwiseConv2d(6, 6, 1, **options).to(device)
    plain = nn.Conv2d(6, 6, 1, **options).to(device)
    plain.load_state_dict(conv.state_dict())
    for shape in ((6, 6, 5), (6, 5, 6), (0, 6, 4, 5), (2, 6, 4, 5), (2, 6, 1, 1)):
        x = torch.randn(shape, device=device)
        torch.testing.assert_close(conv(x), plain(x))


def test_with_a_bias_the_output_is_in_channels_last_memory(device: torch.device) -> None:
    conv = PointwiseConv2d(6, 4, 1).to(device)
    assert conv(torch.randn(2, 6, 4, 5, device=device)).is_contiguous(memory_format=torch.channels_last)
