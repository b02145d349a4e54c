"""RCAN with attention by config: what differs from EDSR, whose tests hold the common body to its rules."""

from typing import Any

import pytest
import torch

from sparse_sr_attn import ELAB, RCAN, CoA, ConfigError, LCoA
from sparse_sr_attn.blocks import ResidualGroup
from sparse_sr_attn.blocks.residual import ChannelAttention, ChannelAttentionBlock

SMALL: dict[str, Any] = {"num_feat": 8, "num_block": 2, "squeeze_factor": 4, "upscale": 2, "img_range": 1.0}
LCOA: dict[str, Any] = {"type": "LCoA", "num_clusters": 4, "chunk_size": 10, "reduction": 2, "zero_init": False}


def image(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_channel_attention_is_one_factor_a_channel() -> None:
    """sigmoid(W2 relu(W1 mean)), by hand."""
    layer, x = ChannelAttention(6, squeeze_factor=2).double(), image(2, 6, 3, 5).double()
    inner, outer = layer.attention[1], layer.attention[3]
    assert (inner.out_channels, outer.out_channels) == (3, 6)
    for sample, actual in zip(x, layer(x), strict=True):
        mean = torch.stack([channel.sum() / 15 for channel in sample])
        hidden = (inner.weight.flatten(1) @ mean + inner.bias).clamp(min=0)
        factor = 1 / (1 + (-(outer.weight.flatten(1) @ hidden + outer.bias)).exp())
        torch.testing.assert_close(actual, factor[:, None, None] * sample, rtol=1e-10, atol=1e-10)


def test_res_scale_enters_in_blocks_only() -> None:
    x = image(1, 8, 4, 5)
    block = ChannelAttentionBlock(8, squeeze_factor=4, res_scale=0.25)
    assert torch.equal(block(x), x + 0.25 * block.rcab(x))
    group = RCAN(num_group=1, res_scale=0.25, **SMALL).body[0]
    assert isinstance(group, ResidualGroup)
    assert [inner.res_scale for inner in group.residual_group] == [0.25, 0.25]
    assert torch.equal(group(x), x + group.conv(group.residual_group(x)))


def test_attention_stands_after_groups() -> None:
    """Children of the body are counted, not blocks: after groups 1 and 3, spelt out by hand."""
    model = RCAN(num_group=4, attention={**LCOA, "every": 2, "share": 2}, **SMALL).eval()
    first, second = model.attention
    assert (type(first), type(second)) == (LCoA, CoA)
    x = image(2, 8, 6, 7)
    deep = model.body[1](model.body[0](x))
    shared = first.attend(deep)
    deep = model.body[3](model.body[2](first(deep, shared)))
    assert torch.equal(model.features(x), second(deep, shared))


@pytest.mark.parametrize(("options", "message"), [
    ({"squeeze_factor": 9}, "squeeze_factor: must be at most num_feat, 8, got 9"),
    ({"num_group": 0}, "num_group must be >= 1, got 0"),
    ({"attention": {"type": "LCoA", "every": 5}}, "attention.every: must hit at least one of the 4 blocks, got 5"),
    ({"atention": None}, "atention: unknown; did you mean 'attention'?"),
])  # fmt: skip
def test_wrong_options_are_explained(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RCAN(**{**SMALL, "num_group": 4, **options})
    assert message in str(caught.value)


def test_elabs_stand_in_place_of_blocks_inside_groups() -> None:
    """Groups keep their convolution and their sum; every second ELAB of the network shifts, whatever its group."""
    options = {**SMALL, "num_block": 3}
    model = RCAN(num_group=2, block={"type": "ELAB", "window_sizes": [2]}, **options).eval()
    assert [type(block) for group in model.body for block in group.residual_group] == 6 * [ELAB]
    shifts = [block.attention[0].shift for group in model.body for block in group.residual_group]
    assert shifts == [False, True, False, True, False, True]
    x = image(1, 8, 4, 5)
    inner = x
    for block in model.body[0].residual_group:
        inner = block(inner)
    assert torch.equal(model.body[0](x), x + model.body[0].conv(inner))
