"""EDSR with attention by config: where layers stand, who shares, what the keys are called, what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparse_sr_attn import EDSR, ELAB, GMSA, LAYERS, RCAN, AttentionLayer, CoA, ConfigError, LCoA, LCoAN, SharedGMSA
from sparse_sr_attn.errors import ShapeError
from sparse_sr_attn.functional.channels_last import channels_last, is_channels_last

SMALL: dict[str, Any] = {"num_feat": 8, "upscale": 2, "img_range": 1.0}
GMSA_MAP: dict[str, Any] = {"type": "GMSA", "window_sizes": [2, 3], "zero_init": False}
LCOA: dict[str, Any] = {"type": "LCoA", "num_clusters": 4, "chunk_size": 10, "reduction": 2, "zero_init": False}


def image(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_every_four_shared_by_four_is_what_it_says() -> None:
    """After blocks 3, 7, 11, 15; the first computes, the others reuse: spelt out by hand."""
    model = EDSR(num_block=16, attention={**LCOA, "every": 4, "share": 4}, **SMALL).eval()
    first, *later = model.attention
    assert isinstance(first, LCoA)
    assert [type(layer) for layer in later] == [CoA, CoA, CoA]
    x = image(2, 3, 6, 7)
    features = model.conv_first((x - torch.tensor([0.4488, 0.4371, 0.4040]).view(1, 3, 1, 1)) * 1.0)
    deep = features = channels_last(features)
    for index, block in enumerate(model.body):
        deep = block(deep)
        if index == 3:
            shared = first.attend(deep)
            deep = first(deep, shared)
        elif index in (7, 11, 15):
            deep = later[(index - 7) // 4](deep, shared)
    deep = model.conv_after_body(deep) + features
    expected = model.conv_last(model.upsample(deep)) + torch.tensor([0.4488, 0.4371, 0.4040]).view(1, 3, 1, 1)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(("share", "kinds"), [
    (1, "LLLLL"),
    (2, "LCLCL"),
    (3, "LCCLC"),
    (5, "LCCCC"),
    (9, "LCCCC"),
])  # fmt: skip
def test_share_counts_sites(share: int, kinds: str) -> None:
    model = EDSR(num_block=5, attention={**LCOA, "every": 1, "share": share}, **SMALL)
    assert "".join(type(layer).__name__[0] for layer in model.attention) == kinds


@pytest.mark.parametrize("name", ["LCoA", "GMSA", "NLSA"])
def test_a_name_stands_for_every_fourth_block(name: str) -> None:
    """As in `attach`, which takes a name too."""
    model = EDSR(num_block=8, attention=name, **SMALL)
    shared = {"LCoA": [LCoA, CoA], "GMSA": [GMSA, SharedGMSA]}.get(name)
    assert [type(layer) for layer in model.attention] == (shared or [LAYERS.get(name).build] * 2)
    assert (model.attention.at(3), model.attention.at(7)) == ([model.attention[0]], [model.attention[1]])


def test_after_names_the_blocks() -> None:
    """A layer after block 1 does not touch what block 1 makes, only what follows."""
    model = EDSR(num_block=4, attention={**LCOA, "after": [1], "res_scale": 1.0}, **SMALL)
    seen: list[torch.Tensor] = []
    model.body[2].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.body[1].register_forward_hook(lambda _, args, output: seen.append(output))
    model.eval()(image(1, 3, 4, 4))
    into_attention, out_of_attention = seen
    assert torch.equal(model.attention[0](into_attention), out_of_attention)
    assert not torch.equal(into_attention, out_of_attention)


def test_maps_mix_and_never_share_across() -> None:
    """Layers are numbered from input to output; at one block the order of the maps holds."""
    model = EDSR(
        num_block=4,
        attention=[
            {**LCOA, "every": 2, "share": 2, "num_clusters": 3},
            {**LCOA, "after": [1, 2], "share": 2, "num_clusters": 5},
        ],
        **SMALL,
    )
    kinds = [
        (type(layer).__name__, len(layer.lsp.centroids) if isinstance(layer, LCoA) else None)
        for layer in model.attention
    ]
    # blocks: 1 (map 0, map 1), 2 (map 1), 3 (map 0)
    assert kinds == [("LCoA", 3), ("LCoA", 5), ("CoA", None), ("CoA", None)]
    x = image(1, 8, 5, 5)
    y = x
    states = {}
    for index, block in enumerate(model.eval().body):
        y = block(y)
        if index == 1:
            for provider in (0, 1):
                states[provider] = model.attention[provider].attend(y)
                y = model.attention[provider](y, states[provider])
        elif index == 2:
            y = model.attention[2](y, states[1])
        elif index == 3:
            y = model.attention[3](y, states[0])
    assert torch.equal(model.attention.run(model.body, x), y)


@pytest.mark.parametrize(("shift", "expected"), [
    ({}, [False, True, False]),
    ({"shift": "auto"}, [False, True, False]),
    ({"shift": True}, [True, True, True]),
    ({"shift": False}, [False, False, False]),
])  # fmt: skip
def test_who_shifts(shift: dict[str, Any], expected: list[bool]) -> None:
    """Every second layer of a map, or all, or none; in blocks too."""
    attention = EDSR(num_block=3, attention={**GMSA_MAP, "every": 1, **shift}, **SMALL).attention
    blocks = EDSR(num_block=3, block={"type": "ELAB", "window_sizes": [2], **shift}, **SMALL).body
    assert [layer.shift for layer in attention] == expected
    assert [layer.attention[0].shift for layer in blocks] == expected


def test_elabs_are_inserted_with_sharing_of_their_own() -> None:
    """`share` of an ELAB is its own; layers of a map that starts as the identity leave the image alone."""
    option = {"type": "ELAB", "every": 2, "share": 3, "window_sizes": [2]}
    model = EDSR(num_block=5, attention=option, **SMALL)
    assert [type(layer) for layer in model.attention] == [ELAB, ELAB]
    assert [len(layer.attention) for layer in model.attention] == [3, 3]
    plain = EDSR(num_block=5, **SMALL)
    model.load_state_dict(plain.state_dict(), strict=False)
    x = image(2, 3, 5, 8)
    assert torch.equal(model.eval()(x), plain.eval()(x))


def test_elabs_stand_in_place_of_blocks() -> None:
    """With the layer's own defaults: they do not start as the identity."""
    model = EDSR(num_block=3, block={"type": "ELAB", "share": 2, "window_sizes": [2, 4]}, **SMALL).eval()
    assert [type(block) for block in model.body] == [ELAB, ELAB, ELAB]
    assert [len(block.attention) for block in model.body] == [2, 2, 2]
    x = image(1, 8, 5, 6)
    assert torch.equal(model.features(x), model.body[2](model.body[1](model.body[0](x))))
    assert (model.body[0](x) != x).any()


def test_zero_init_by_default_and_identity() -> None:
    """Attention starts as the identity, and its keys stand under a prefix of their own."""
    plain = EDSR(num_block=4, **SMALL)
    with_attention = EDSR(num_block=4, attention={"type": "LCoA", "every": 2, "share": 2, "num_clusters": 4}, **SMALL)
    missing, unexpected = with_attention.load_state_dict(plain.state_dict(), strict=False)
    assert unexpected == []
    assert all(key.startswith("attention.") for key in missing)
    x = image(2, 3, 5, 8)
    assert torch.equal(plain(x), with_attention(x))


BAD = [
    (
        {"type": "lcoan", "every": 2},
        "attention.type: no layer named 'lcoan', which is a network; did you mean 'LCoA', ",
    ),
    ({"type": "CoA", "every": 2}, "attention.type: must be a drop-in layer, got 'CoA', a consumer; use LCoA"),
    ({"type": "LSP", "every": 2}, "attention.type: must be a drop-in layer, got 'LSP', a provider; use "),
    ({"type": 3, "every": 2}, "attention.type: must be a string, got 3"),
    ({"every": 2}, "attention.type: missing"),
    ({"type": "LCoA"}, "attention: must have one of 'every' and 'after', which place the attention, got neither"),
    ({"type": "LCoA", "every": 2, "after": [1]}, "got both"),
    ({"type": "LCoA", "every": 0}, "attention.every: must be >= 1"),
    ({"type": "LCoA", "every": 5}, "attention.every: must hit at least one of the 4 blocks, got 5"),
    ({"type": "LCoA", "after": []}, "attention.after: must hit at least one of the 4 blocks, got []"),
    ({"type": "LCoA", "after": [4]}, "attention.after: must be blocks from 0 to 3, got [4]"),
    ({"type": "LCoA", "after": [1, 1]}, "attention.after: must be in increasing order, each block once, got [1, 1]"),
    ({"type": "LCoA", "after": 1}, "attention.after: must be a list"),
    ({"type": "LCoA", "every": 1, "share": 0}, "attention.share: must be >= 1, got 0"),
    ({"type": "LCoA", "every": 1, "chunk_size": 0}, "attention.chunk_size: must be >= 1, got 0"),
    ({"type": "LCoA", "every": 1, "n_cluster": 9}, "attention.n_cluster: unknown; did you mean 'num_clusters'?"),
    ({"type": "ShiftConv2d", "every": 1}, "attention.type: must be a drop-in layer, got 'ShiftConv2d', an operator"),
    ({"type": "LCoA", "every": 1, "shift": "auto"}, "attention.shift: unknown"),
    ({"type": "GMSA", "every": 1, "window_size": 8}, "attention.window_size: unknown; did you mean 'window_sizes'?"),
    ([{"type": "LCoA", "every": 1}, {"type": "LCoA"}], "attention.1: must have one of"),
    (["LCoA"], "attention.0: must be a mapping with a key 'type', got 'LCoA'"),
    (3, "attention: must be a name, a mapping, a list of mappings or ~ (no attention), got 3"),
    ("LCoB", "attention.type: no layer named 'LCoB'; did you mean 'LCoA'?"),
]


@pytest.mark.parametrize(("attention", "message"), BAD)
def test_wrong_attention_is_explained(attention: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EDSR(num_block=4, attention=attention, **SMALL)
    assert message in str(caught.value)


@pytest.mark.parametrize(("block", "message"), [
    ("ELAB", "block: must be a mapping with a key 'type' or ~ (the network's own blocks), got 'ELAB'"),
    ({"share": 2}, "block.type: missing; it has no default"),
    ({"type": 3}, "block.type: must be a string, got 3"),
    ({"type": "ELABB"}, "block.type: no layer named 'ELABB'; did you mean 'ELAB'?"),
    ({"type": "CoA"}, "block.type: must be a drop-in layer, got 'CoA', a consumer; use LCoA"),
    ({"type": "ELAB", "every": 2}, "block.every: unknown"),
    ({"type": "ELAB", "share": 0, "expansion": 0}, "block.share: must be >= 1, got 0\nblock.expansion: must be >="),
])  # fmt: skip
def test_wrong_blocks_are_explained(block: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EDSR(num_block=4, block=block, **SMALL)
    assert str(caught.value).startswith(message)


def test_all_problems_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        EDSR(
            num_block=4,
            attention=[{"type": "LCoA", "every": 9}, {"type": "LCoA", "every": 1, "chunk_size": 0, "n_cluster": 3}],
            **SMALL,
        )
    assert [problem.path for problem in caught.value.problems] == [
        "attention.0.every",
        "attention.1.chunk_size",
        "attention.1.n_cluster",
    ]
    with pytest.raises(ConfigError, match=r"num_feat must be >= 1, got 0\nupscale must be one of 2, 3, 4, 8, got 5"):
        EDSR(num_feat=0, upscale=5)
    with pytest.raises(ConfigError, match=r"num_fet: unknown; did you mean 'num_feat'\?"):
        EDSR(num_fet=3)


def test_sharing_needs_something_to_share() -> None:
    """A layer of a third party that provides no state cannot be shared."""

    @LAYERS.register("Doubled", kind="layer", source="this test")
    class Doubled(AttentionLayer):
        def __init__(self, embed_dim: int) -> None:
            super().__init__()

        def forward(self, x: torch.Tensor, state: None = None) -> torch.Tensor:
            return 2 * x

    try:
        with pytest.raises(
            ConfigError, match="attention.share: must be 1, because Doubled has nothing to share, got 2"
        ):
            EDSR(num_block=4, attention={"type": "Doubled", "every": 2, "share": 2}, **SMALL)
        model = EDSR(num_block=1, attention={"type": "Doubled", "every": 1}, **SMALL)
        x = image(1, 8, 3, 3)
        assert torch.equal(model.features(x), 2 * model.body[0](x))
    finally:
        del LAYERS._entries["Doubled"]


@pytest.mark.parametrize("image", [torch.zeros(1, 3, 4, 4, dtype=torch.uint8), None, [0.5]])
def test_an_image_that_is_no_tensor_of_floating_point_is_refused(image: object) -> None:
    """Bytes in 0..255 would pass for an image in 0..1 and give garbage."""
    with pytest.raises(ShapeError, match=r"^x must be a floating-point tensor of images in about 0\.\.1, got "):
        EDSR(num_feat=4, num_block=1)(image)


@pytest.mark.parametrize("build", [
    lambda: EDSR(num_block=2, attention={**LCOA, "every": 1}, **SMALL),
    lambda: RCAN(num_group=2, num_block=1, squeeze_factor=2, attention={**GMSA_MAP, "every": 1}, **SMALL),
    lambda: LCoAN(num_feat=8, num_group=2, num_block=1, num_clusters=4, chunk_size=10),
], ids=["EDSR", "RCAN", "LCoAN"])  # fmt: skip
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("learns", [False, True])
def test_bodies_run_in_channels_last_memory(
    build: Callable[[], torch.nn.Module], memory: torch.memory_format, learns: bool
) -> None:
    """Maps between convolutions and attention, forward and backward; images keep the memory that they came in."""
    model, maps = build(), []

    def see(_: object, given: tuple[torch.Tensor, ...], result: torch.Tensor) -> None:
        maps.extend((given[0], result))

    watched = [
        module for module in model.modules()
        if isinstance(module, (torch.nn.Conv2d, AttentionLayer)) and module not in (model.conv_first, model.conv_last)
    ]  # fmt: skip
    for module in watched:
        module.register_forward_hook(see)
    x = image(2, 3, 6, 7).contiguous(memory_format=memory)
    with torch.set_grad_enabled(learns):
        output = model(x)
    assert output.is_contiguous(memory_format=memory)
    assert len(maps) >= 2 * len(watched)
    assert all(is_channels_last(x) for x in maps if x.ndim == 4)
    if learns:
        output.square().mean().backward()
        assert all(p.grad is None or p.grad.stride() == p.stride() for p in model.parameters())
