"""How much memory sparse attention takes, counted allocation by allocation."""

import pytest
import torch

from sparse_sr_attn import LCoA
from sparse_sr_attn.testing.memory import in_maps, new_memory

pytestmark = pytest.mark.promise("R25")

SIDE, CHANNELS = 256, 64


def test_a_layer_alone_stores_no_weights() -> None:
    """At 256x256x64: at most 8 feature maps at once, and no tensor as large as the weights, 4 * N * 3w bytes."""
    layer = LCoA(CHANNELS).eval()
    x = torch.rand(1, CHANNELS, SIDE, SIDE)
    with torch.no_grad():
        taken = new_memory(lambda: layer(x))
    weights = 4 * SIDE**2 * 3 * layer.lsp.chunk_size
    assert in_maps(taken.peak, x) <= 8
    assert taken.largest < weights
