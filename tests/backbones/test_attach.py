"""attach and detach on models of other people's making: what changes, what stays, what is refused."""

import copy
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparse_sr_attn import LAYERS, NLA, AttentionLayer, CoA, ConfigError, LCoA, attach, detach
from sparse_sr_attn.backbones.attach import is_record
from sparse_sr_attn.config import fields

OPTIONS: dict[str, Any] = {"num_clusters": 5, "chunk_size": 12, "reduction": 2}
LCOA: dict[str, Any] = {"type": "LCoA", **OPTIONS}


class ResBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(True), nn.Conv2d(width, width, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.body(x).mul(0.1)
        output += x
        return output


class Layout(nn.Module):
    """EDSR-PyTorch's layout: residual blocks, then a convolution, in one `body`; the sum is taken in place."""

    def __init__(self, width: int = 8, num_blocks: int = 4) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(3, width, 3, padding=1))
        self.body = nn.Sequential(*(ResBlock(width) for _ in range(num_blocks)), nn.Conv2d(width, width, 3, padding=1))
        self.tail = nn.Sequential(
            nn.Sequential(nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2)),
            nn.Conv2d(width, 3, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        deep = self.body(x)
        deep += x
        return self.tail(deep)


class Blocks(nn.Module):
    """Runs its blocks itself, on tokens; each has a convolution of the feature map (SwinIR's way)."""

    def __init__(self, width: int = 8, num_blocks: int = 3) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"mlp": nn.Linear(width, width), "conv": nn.Conv2d(width, width, 3, padding=1)})
            for _ in range(num_blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            tokens = layer["mlp"](x.flatten(2).transpose(1, 2))
            x = x + layer["conv"](tokens.transpose(1, 2).unflatten(2, x.shape[2:]))
        return x


class Loop(Layout):
    """Runs the children of its `nn.Sequential` itself."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        for block in self.body:
            x = block(x)
        return x


class Unused(Layout):
    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.head(x))


class Picky(Layout):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:] != (17, 17):
            raise ValueError("give me a picture of 17x17")
        return super().forward(x)


class Pixelwise(nn.Module):
    """A convolution without `nn.Conv2d`, so that no parameter tells how wide its input is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(width, width) / width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.einsum("oc,bchw->bohw", self.matrix, x)


def image(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def built(build: type[nn.Module] = Layout, **options: Any) -> Any:
    torch.manual_seed(0)
    return build(**options)


def attached(build: type[nn.Module] = Layout, **options: Any) -> Any:
    model = built(build)
    return attach(model, "body", "LCoA", **{"every": 2, "share": 2, "zero_init": False, **OPTIONS, **options})


def train(model: nn.Module, steps: int = 2, *, seed: int = 0) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(steps):
        optimizer.zero_grad()
        model(image(2, 3, 6, 7, seed=seed + step)).square().mean().backward()
        optimizer.step()


def assert_same(one: nn.Module, other: nn.Module) -> None:
    assert one.state_dict().keys() == other.state_dict().keys()
    for key, value in one.state_dict().items():
        assert is_record(key) or torch.equal(value, other.state_dict()[key]), key  # a record names the class


# --- what it does -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_the_output_stays_to_the_bit_and_old_names_stay(training: bool, autocast: bool) -> None:
    model = built().train(training)
    before = model.state_dict()
    x = image(2, 3, 6, 9)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = model(x)
        assert attach(model, "body", "LCoA", every=2, share=2, **OPTIONS) is model
        actual = model(x)
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)
    after = model.state_dict()
    assert all(after[key].data_ptr() == value.data_ptr() for key, value in before.items())
    new = {key for key in after.keys() - before.keys() if not key.endswith(".sparse_sr_attn")}
    assert {key[:22] for key in new} == {"body.sparse_sr_attn.0.", "body.sparse_sr_attn.1."}
    assert all(module.training == training for module in model.modules())


def test_layers_stand_and_share_where_it_says() -> None:
    """After children 1 and 3 of 5; the first computes, the second reuses: spelt out by hand."""
    model = attached().eval()
    first, second = model.body.attention
    assert (type(first), type(second)) == (LCoA, CoA)
    x = image(2, 8, 5, 6)
    y = model.body[1](model.body[0](x))
    state = first.attend(y)
    y = model.body[3](model.body[2](first(y, state)))
    y = model.body[4](second(y, state))
    assert torch.equal(model.body(x), y)
    assert not torch.equal(y, nn.Sequential(*model.body)(x))


def test_maps_are_those_of_our_networks() -> None:
    model = attach(built(), "body", [{**LCOA, "every": 2, "share": 2}, {**LCOA, "after": [1], "num_clusters": 3}])
    kinds = [
        (type(layer), len(layer.lsp.centroids) if isinstance(layer, LCoA) else 0) for layer in model.body.attention
    ]
    assert kinds == [(LCoA, 5), (LCoA, 3), (CoA, 0)]
    model = attach(built(), "body", {**LCOA, "every": 5})
    assert [type(layer) for layer in model.body.attention] == [LCoA]


def test_defaults_are_after_every_fourth_shared_by_four() -> None:
    model = attach(built(num_blocks=16))
    assert [type(layer) for layer in model.body.attention] == [LCoA, CoA, CoA, CoA]
    assert [index for index in range(16) if model.body.attention.at(index)] == [3, 7, 11, 15]
    assert [len(attach(built(), after=after).body.attention) for after in ([0], [0, 4])] == [1, 2]


def test_a_layer_with_nothing_to_share_needs_no_share() -> None:
    assert [type(layer) for layer in attach(built(), attention="NLA", every=5).body.attention] == [NLA]


def test_detaching_leaves_the_model_as_it_was() -> None:
    model = built()
    untouched = copy.deepcopy(model)
    assert detach(attach(model, "body", "LCoA", **OPTIONS)) is model
    assert [type(module) for module in model.modules()] == [type(module) for module in untouched.modules()]
    assert [vars(module).keys() for module in model.modules()] == [
        vars(module).keys() for module in untouched.modules()
    ]
    assert repr(model) == repr(untouched)
    assert_same(model, untouched)
    attach(model, "body", "LCoA", **OPTIONS)
    train(model)
    detach(model).load_state_dict(untouched.state_dict(), strict=True)
    assert torch.equal(model(image(1, 3, 5, 5)), untouched(image(1, 3, 5, 5)))
    model.body.append(nn.ReLU())
    attach(model, "body", "LCoA", **OPTIONS)


def test_the_trunk_stays_the_same_object() -> None:
    """Whoever holds it, or has hung a hook on it, need not know."""
    model = built()
    trunk, seen = model.body, []
    model.alias = model.body
    model.body.register_forward_hook(lambda *_: seen.append(1))
    attach(model, "body", "LCoA", **OPTIONS)
    assert model.body is trunk
    assert model.alias is trunk
    seen.clear()
    model(image(1, 3, 4, 4))
    assert seen == [1]


def test_it_is_still_a_sequential_of_its_children() -> None:
    model = built()
    children = list(model.body)
    attach(model, "body", "LCoA", every=2, **OPTIONS)
    trunk = model.body
    assert isinstance(trunk, nn.Sequential)
    assert len(trunk) == 5
    assert list(trunk) == children
    assert [trunk[index] for index in range(-5, 5)] == 2 * children
    assert type(trunk[1:3]) is nn.Sequential
    assert list(trunk[1:3]) == children[1:3]
    assert list(trunk[::-2]) == children[::-2]
    for index in (5, -6):
        with pytest.raises(IndexError):
            trunk[index]
    other = ResBlock(8)
    trunk[-2] = other
    assert list(trunk) == [*children[:3], other, children[4]]
    assert len(trunk.attention) == 2
    trunk.add_module("last", nn.ReLU())  # which no nn.Sequential refuses; it runs after the others
    assert len(trunk) == 6
    assert model(image(1, 3, 4, 4)).isfinite().all()
    assert trunk(image(1, 8, 4, 4)).min() == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda trunk: trunk.append(nn.ReLU()),
        lambda trunk: trunk.insert(0, nn.ReLU()),
        lambda trunk: trunk.extend([nn.ReLU()]),
        lambda trunk: trunk.pop(0),
        lambda trunk: trunk.__delitem__(0),
        lambda trunk: trunk.__iadd__(nn.Sequential(nn.ReLU())),
        lambda trunk: trunk.__imul__(2),
    ],
)
def test_its_children_are_counted_for_good(change: Any) -> None:
    model = attached()
    before = list(model.body)
    with pytest.raises(TypeError, match="detach, change them, and attach again"):
        change(model.body)
    assert list(model.body) == before
    assert len(model.body.attention) == 2


def test_named_children_keep_their_names() -> None:
    trunk = nn.Sequential(OrderedDict(one=ResBlock(8), two=ResBlock(8)))
    model = attach(trunk, "", "LCoA", every=1, share=1, **OPTIONS)
    assert {key.split(".")[0] for key in model.state_dict()} == {"one", "two", "sparse_sr_attn"}
    assert trunk.two is trunk[1]


def test_a_model_that_is_its_own_trunk() -> None:
    model = nn.Sequential(ResBlock(8), ResBlock(8))
    attach(model, "", "LCoA", every=1, share=2, **OPTIONS)
    assert "sparse_sr_attn.0.lsp.centroids" in model.state_dict()
    assert detach(model)(image(1, 8, 3, 3)).shape == (1, 8, 3, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_layers_come_where_the_trunk_is(dtype: torch.dtype) -> None:
    model = attach(built().to(dtype), "body", "LCoA", every=2, **OPTIONS)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(image(1, 3, 4, 5).to(dtype)).dtype == dtype
    with torch.device("meta"):
        model = built()
    assert {p.device.type for p in attach(model, "body", "LCoA", **OPTIONS).parameters()} == {"meta"}


# --- what it must bear ------------------------------------------------------------------------------------------------


@pytest.mark.unhooked
def test_compiled_is_eager() -> None:
    eager = attached()
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for seed, size in enumerate([(6, 7), (8, 5), (9, 9)]):
        expected, actual = (model(image(2, 3, *size, seed=seed)) for model in (eager, compiled))
        assert torch.equal(actual, expected)
        expected.mean().backward()
        actual.mean().backward()
    assert_same(eager, twin)
    for one, other in zip(eager.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


# --- where the trunk is, and how wide ---------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [None, "body"])
def test_the_only_trunk_is_found(body: str | None) -> None:
    """Neither the first and last convolutions nor what is inside the blocks counts."""
    assert len(attach(built(), body, every=2, **OPTIONS).body.attention) == 2


@pytest.mark.parametrize("given", [True, False])
def test_a_width_that_parameters_do_not_tell_is_seen_in_a_call(given: bool) -> None:
    model = built()
    model.body = nn.Sequential(Pixelwise(8), Pixelwise(8), nn.BatchNorm2d(8))
    model.body[1].eval()
    x = image(1, 3, 4, 5)
    modes = [module.training for module in model.modules()]
    attach(model, "body", "LCoA", every=1, share=3, example=x if given else None, **OPTIONS)
    assert model.body.attention[0].coa.value.in_channels == 8
    assert [m.training for p, m in model.named_modules() if "sparse_sr_attn" not in p] == modes
    assert int(model.body[2].num_batches_tracked) == 0
    assert not model.body._forward_hooks
    model(x).sum().backward()
    assert model.body.attention[2].value.weight.grad is not None


class Fusing(Layout):
    """Fuses its weights for evaluation, for good."""

    def train(self, mode: bool = True) -> "Fusing":
        if not mode:
            raise RuntimeError("fused")
        super().train()
        return self


def test_the_call_that_looks_for_the_width_is_no_change_of_mode() -> None:
    assert len(attach(built(Fusing), "body", "LCoA", **OPTIONS).body.attention) == 2


def test_two_trunks_of_one_model() -> None:
    model = two_trunks()
    before = model.state_dict().keys()
    for body in ("one", "two"):
        attach(model[body], "", "LCoA", every=2, share=2, **OPTIONS)
    assert [len(model[body].attention) for body in ("one", "two")] == [2, 2]
    assert detach(model).state_dict().keys() == before


def test_a_model_that_takes_nothing_we_guess_needs_an_example() -> None:
    with pytest.raises(ValueError, match="a picture of 17x17"):
        attach(built(Picky), "body", "LCoA", example=image(1, 3, 4, 4), **OPTIONS)
    model = attach(built(Picky), "body", "LCoA", example=image(1, 3, 17, 17), **OPTIONS)
    assert model.body.attention[0].coa.value.in_channels == 8


def test_convolutions_of_a_token_trunk_get_attention_of_their_own() -> None:
    model = built(Blocks)
    x = image(1, 3, 5, 6)
    expected, keys = model(x), model.state_dict().keys()
    attach(model, "layers.*.conv", "LCoA", every=2, share=1, **OPTIONS)
    assert torch.equal(model(x), expected)
    new = {key for key in model.state_dict().keys() - keys if not key.endswith(".sparse_sr_attn")}
    assert {key.split("lsp")[0].split("coa")[0] for key in new} == {"layers.1.conv.sparse_sr_attn.0."}
    seen: list[Tensor] = []
    detach(model)
    attach(model, "layers.*.conv", "LCoA", every=1, share=1, zero_init=False, **OPTIONS)
    model.layers[0]["conv"].register_forward_hook(lambda module, args, output: seen.extend([*args, output]))
    model.eval()(x)
    conv = model.layers[0]["conv"]
    before, after = seen
    plain = nn.functional.conv2d(before, conv.weight, conv.bias, padding=1)
    assert torch.equal(after, conv.sparse_sr_attn[0](plain))
    assert not torch.equal(after, plain)
    train(model)
    assert all(p.grad.any() for p in model.parameters())
    assert detach(model).state_dict().keys() == keys
    assert type(model.layers[0]["conv"]) is nn.Conv2d


class Own(nn.Sequential):
    def forward(self, x: Tensor, size: object = None) -> Tensor:
        return super().forward(x)


class Fused(nn.Sequential):
    """Has other convolutions in evaluation, whose weights are not trained."""

    def __init__(self) -> None:
        super().__init__(*(FusedBlock() for _ in range(3)))


class FusedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trained, self.fused = conv(3, 3), conv(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.trained(x) if self.training else self.fused(x)


class Extra(Layout):
    """Runs two more convolutions for each image, in one way or another."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("idle", "rows", "again"):
            setattr(self, name, nn.ModuleList())


class Idle(Extra):
    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.ModuleList([conv(3, 3), conv(3, 3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.idle:
            layer(x)
        return super().forward(x)


class Sideways(Extra):
    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(1, -1)
        for layer in self.rows:
            x = layer(x)
        return super().forward(x.movedim(-1, 1))


class Twice(Extra):
    def __init__(self) -> None:
        super().__init__()
        self.again = nn.ModuleList([conv(3, 3), conv(3, 3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.again:
            x = layer(layer(x))
        return super().forward(x)


def with_body(*blocks: nn.Module, build: type[nn.Module] = Layout) -> nn.Module:
    model = built(build)
    model.body = nn.Sequential(*blocks)
    return model


def two_trunks() -> Any:
    return nn.ModuleDict({"one": built().body, "two": built().body})


def conv(before: int, after: int) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, padding=1)


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    # the trunk
    (
        lambda: nn.ModuleDict({"head": conv(3, 8)}),
        {},
        "ModuleDict accepts none of the images that were tried; pass example=..., images or a tuple of arguments",
    ),
    (
        lambda: nn.Sequential(OrderedDict(head=conv(3, 8), tail=conv(8, 3))),
        {},
        "body: must be named; Sequential has no run of numbered modules that return feature maps of one size and width",
    ),
    (built, {"body": "LCoA"}, "body: must be the path of a module, got 'LCoA'; for the layer, write attention='LCoA'"),
    (built, {"body": "bdy"}, "body: must be the path of a module, got 'bdy'; did you mean 'body'?"),
    (lambda: built(Blocks), {"body": "layers.0"}, "got 'layers.0', a ModuleDict, which is not called by Blocks"),
    (attached, {"body": "body"}, "body: must have no attention yet, got 'body'; detach, or attach a list of mappings"),
    (
        lambda: with_body(nn.Flatten(2), nn.Unflatten(2, (4, 4))),
        {"body": "body.0", "example": image(1, 3, 4, 4)},
        "got 'body.0', a Flatten, which returns (1, 8, 16), not a feature map (b, c, h, w)",
    ),
    (lambda: built(Unused), {"body": "body"}, "got 'body', a Sequential, which is not called by Unused"),
    (lambda: built(Picky), {"body": "body"}, "Picky accepts none of the images that were tried; pass example="),
    # attention
    (built, {"chunk_size": 0, "reduction": -1}, "attention.chunk_size: must be >= 1, got 0\nattention.reduction: must"),
    (built, {"attention": {**LCOA, "every": 1}, "every": 2}, "every: must be in the mapping that attention is"),
    (built, {"attention": [LCOA], "share": 2}, "share: must be in the mapping"),
    (built, {"attention": [{**LCOA, "every": 1}], "chunk_size": 2}, "chunk_size: must be in the mapping"),
    (built, {"attention": [{**LCOA, "every": 1}, {**LCOA, "every": 9}]}, "attention.1.every: must hit"),
    (built, {"attention": None}, "attention must be a string or a mapping or a list, got None"),
    (built, {"attention": []}, "attention: must be a name, a mapping or a list of mappings, got ()"),
    (built, {"attention": {}}, "attention: must be a name, a mapping or a list of mappings, got {}"),
    (built, {"body": 3, "every": 1.5}, "body must be a string or a list or ~ (nothing), got 3\nevery"),
    (built, {"example": 1}, "example must be a Tensor or a list or ~ (nothing), got 1"),
    # modules by pattern
    (lambda: built(Blocks), {"body": "layers.*.cnv"}, "body: must name modules, but 'layers.*.cnv' names nothing"),
    (lambda: built(Blocks), {"body": "layers.*.mlp"}, "got 'layers.0.mlp', a Linear, which returns (2, 256, 8), not a"),
    (lambda: built(Blocks), {"body": "layers.*.conv", "every": 4}, "attention.every: must hit at least one of the 3"),
    (lambda: built(Fused), {"body": "*.fused"}, "got '0.fused', a Conv2d, which is not called in training"),
    (lambda: built(Idle), {"body": "idle.*"}, "got 'idle.0', a Conv2d, which has no effect on the output in training"),
    (lambda: built(Sideways), {"body": "rows.*"}, "'rows.0', a Linear, which returns maps whose channels"),
    (lambda: built(Twice), {"body": "again.*"}, "got 'again.0', a Conv2d, which is called 2 times"),
    (
        lambda: attach(built(Blocks), "layers.*.conv", every=1, share=1),
        {"body": "layers.*.conv", "every": 1},
        "body: must have no attention yet, got 'layers.0.conv'",
    ),
    (lambda: attach(built(Loop)), {"body": "body"}, "body: must have no attention yet, got the network itself"),
]


@pytest.mark.parametrize(("make", "options", "message"), REFUSED)
def test_what_cannot_be_is_explained_and_changes_nothing(make: Any, options: dict[str, Any], message: str) -> None:
    model = make()
    before = [(path, type(module)) for path, module in model.named_modules()]
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ConfigError) as caught:
        attach(model, **options)
    assert message in str(caught.value)
    assert [(path, type(module)) for path, module in model.named_modules()] == before
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_distributed_model_comes_too_late(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        with pytest.raises(ConfigError, match="must not be in DistributedDataParallel yet"):
            attach(DistributedDataParallel(built()), "module.body")
    finally:
        dist.destroy_process_group()


def test_nothing_attached_is_nothing_to_detach() -> None:
    with pytest.raises(ConfigError, match="must have attention from attach, but Layout has none"):
        detach(built())


DROP_INS = [
    name
    for name in sorted(LAYERS)
    if LAYERS.get(name).kind == "layer" and "zero_init" in fields(LAYERS.get(name).build)
]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", DROP_INS)
def test_every_layer_that_starts_as_the_identity_keeps_the_image_to_the_bit(
    name: str, memory_format: torch.memory_format
) -> None:
    """So it keeps the memory format too, because a convolution rounds differently in another one."""
    model = built(width=16).to(memory_format=memory_format)
    x = image(2, 3, 17, 18).to(memory_format=memory_format)
    expected, features = model(x), model.head(x)
    attach(model, "body", {"type": name, "every": 1})
    assert torch.equal(model(x), expected)
    after = model.body.attention[0].eval()(features)
    assert after.is_contiguous(memory_format=memory_format)


def test_a_layer_that_cannot_start_as_the_identity_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubled(AttentionLayer):
        def __init__(self, embed_dim: int) -> None:
            super().__init__()

        def forward(self, x: Tensor, state: None = None) -> Tensor:
            return 2 * x

    monkeypatch.setattr(LAYERS, "_entries", dict(LAYERS._entries))
    LAYERS.register("Doubled", kind="layer", source="this test")(Doubled)
    with pytest.warns(UserWarning, match="Doubled has no option zero_init, so Layout gives another output until"):
        attach(Layout(), "body", "Doubled", every=2)
