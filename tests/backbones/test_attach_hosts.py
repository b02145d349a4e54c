"""attach on models that run their blocks themselves, in the styles of published networks: found, shared, and undone."""

import copy
import pickle
import re
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from sparse_sr_attn import CoA, ConfigError, LCoA, attach, detach
from sparse_sr_attn.backbones.attach import Attended, is_record

OPTIONS: dict[str, Any] = {"num_clusters": 5, "chunk_size": 12, "reduction": 2}


def conv(before: int, after: int, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(before, after, size, padding=size // 2)


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.c1, self.c5 = conv(width, width), conv(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c5(F.relu(self.c1(x))) + x


class Host(nn.Module):
    """First and last convolutions; subclasses run what is between them."""

    def __init__(self) -> None:
        super().__init__()
        self.fea_conv, self.tail = conv(3, 8), nn.Sequential(conv(8, 12), nn.PixelShuffle(2))

    def body(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        x = self.fea_conv(x)
        return self.tail(self.body(x) + x)


class Straight(Host):
    """An `nn.Sequential` that the model calls (EDSR, RRDBNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(*(Block() for _ in range(4)))

    def body(self, x: Tensor) -> Tensor:
        return self.trunk(x)


class Numbered(Host):
    """Attributes B1, B2, ... and a concatenation of what they return (IMDN, RFDN, BSRN)."""

    def __init__(self) -> None:
        super().__init__()
        self.B1, self.B2, self.B3, self.B4 = (Block() for _ in range(4))
        self.c = conv(32, 8, 1)

    def body(self, x: Tensor) -> Tensor:
        b1 = self.B1(x)
        b2 = self.B2(b1)
        b3 = self.B3(b2)
        return self.c(torch.cat([b1, b2, b3, self.B4(b3)], dim=1))


class Listed(Host):
    """A list of convolutions and activations in a loop (SRVGGNetCompact)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(5):
            self.layers.extend([conv(8, 8), nn.PReLU(8)])

    def body(self, x: Tensor) -> Tensor:
        for index in range(len(self.layers)):
            x = self.layers[index](x)
        return x


class Tupled(Host):
    """Blocks return several maps, so only what is inside them returns one (SPAN)."""

    def __init__(self) -> None:
        super().__init__()
        self.block_1, self.block_2, self.block_3 = (Several() for _ in range(3))

    def body(self, x: Tensor) -> Tensor:
        x, kept = self.block_1(x)
        x, _ = self.block_2(x)
        x, _ = self.block_3(x)
        return x + kept


class Several(Block):
    def forward(self, x: Tensor) -> Any:
        output = super().forward(x)
        return output, output.sigmoid()


class Windowed(Host):
    """Python decides by the size of the image, and keeps something in the model: (SwinIR, DRCT)."""

    def __init__(self) -> None:
        super().__init__()
        self.groups = nn.ModuleList(Group() for _ in range(4))
        self.num_calls = 0

    def body(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        size = x.shape[2:]
        tokens = x.flatten(2).transpose(1, 2)
        for group in self.groups:
            tokens = group(tokens, size)
        if size[1] % 2:
            tokens = tokens * 1
        return tokens.transpose(1, 2).unflatten(2, size)


class Group(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp, self.conv = nn.LayerNorm(8), nn.Linear(8, 8), conv(8, 8)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        deep = self.conv(self.mlp(self.norm(x)).transpose(1, 2).unflatten(2, size))
        return x + deep.flatten(2).transpose(1, 2)


class Scaled(Numbered):
    """Takes the scale as a second argument (CARN)."""

    def forward(self, x: Tensor, scale: int) -> Tensor:  # type: ignore[override]
        output: Tensor = super().forward(x)
        return F.interpolate(output, scale_factor=scale / 2)


class Mode(Numbered):
    """Runs differently in training."""

    def body(self, x: Tensor) -> Tensor:
        output = super().body(x)
        return output if self.training else output * 0.5


HOSTS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "an nn.Sequential": (Straight, "trunk"),
    "attributes": (Numbered, "B*"),
    "a list": (Listed, "layers"),
    "tuples": (Tupled, "block_*.c1"),
    "tokens": (Windowed, "groups.*.conv"),
    "by mode": (Mode, "B*"),
}
"""Networks with their trunks."""

hosts = pytest.mark.parametrize("name", HOSTS)


def image(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def built(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    model = HOSTS[name][0]()
    return attach(model, HOSTS[name][1], every=1, share=2, **OPTIONS, **options) if options else model


def twins(build: Callable[[], nn.Module]) -> Any:
    model = build()
    return model, copy.deepcopy(model)


def attended(name: str) -> Any:
    return built(name, zero_init=False)


def layers_of(model: nn.Module) -> Any:
    return owner_of(model).sparse_sr_attn


def owner_of(model: nn.Module) -> Any:
    (found,) = (module for module in model.modules() if isinstance(module, Attended))
    return found


def train(model: nn.Module, steps: int = 2, call: Callable[..., Any] = lambda model, x: model(x)) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(steps):
        optimizer.zero_grad()
        call(model, image(2, 3, 6, 7, seed=step)).square().mean().backward()
        optimizer.step()


def assert_same(one: nn.Module, other: nn.Module) -> None:
    assert one.state_dict().keys() == other.state_dict().keys()
    for key, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@hosts
def test_the_trunk_is_found_and_the_model_stays_the_same_to_the_bit(name: str) -> None:
    model, named, plain = built(name), built(name), built(name)
    with quiet():
        attach(model, every=1, share=2, **OPTIONS)
    torch.manual_seed(0)
    attach(named, HOSTS[name][1], every=1, share=2, **OPTIONS)
    assert owner_of(named)._record == owner_of(model)._record
    assert named.state_dict().keys() == model.state_dict().keys()
    assert [type(layer) for layer in layers_of(model)][:2] == [LCoA, CoA]
    assert isinstance(model, HOSTS[name][0])  # type: ignore[arg-type]
    for training in (True, False):
        for size in ((16, 16), (9, 12)):
            x = image(2, 3, *size)
            assert torch.equal(model.train(training)(x), plain.train(training)(x))
    train(model, 3)
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.any(), key
    assert detach(model).state_dict().keys() == plain.state_dict().keys()
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert vars(model).keys() == vars(plain).keys()


def test_states_travel_where_the_host_lets_its_blocks_run() -> None:
    """Block 1 computes, block 2 reuses: spelt out by hand, and the same on a view."""
    model = attended("attributes").eval()
    first, second, *_ = layers_of(model)
    x = image(1, 3, 6, 7)
    y1 = model.B1(model.fea_conv(x))
    state = first.attend(y1)
    expected = second(model.B2(first(y1, state)), state)
    seen: list[Tensor] = []
    model.B3.register_forward_pre_hook(lambda _, args: seen.extend(args))
    model(x)
    assert torch.equal(seen[0], expected)


@hosts
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])  # noqa: S301
def test_copies_go_on_alike_and_apart(name: str, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = attended(name)
    twin = duplicate(model)
    train(model)
    assert not torch.equal(model.fea_conv.weight, twin.get_parameter("fea_conv.weight"))
    train(twin)
    assert_same(model, twin)


@hosts
def test_checkpointing_of_the_model_or_of_its_blocks_changes_nothing(name: str) -> None:
    def whole(model: nn.Module, x: Tensor) -> Any:
        return checkpoint(model, x, use_reentrant=False)

    plain, outside, inside = attended(name), attended(name), attended(name)
    for module in inside.modules():
        if isinstance(module, (Block, Group)):
            module.__class__ = type(module.__class__.__name__, (Again, type(module)), {})
    train(plain)
    train(outside, call=whole)
    assert_same(plain, outside)
    train(inside)
    assert_same(plain, inside)


class Again(nn.Module):
    """Recomputes itself in the backward."""

    reentrant = False

    def forward(self, *args: Any) -> Any:
        return checkpoint(super().forward, *args, use_reentrant=self.reentrant)


def test_reentrant_checkpointing_would_lose_gradients_and_is_refused() -> None:
    model = attended("tokens")
    for group in model.groups:
        group.__class__ = type("AgainGroup", (Again, Group), {"reentrant": True})
    with pytest.raises(RuntimeError, match="groups.0.conv runs without gradients inside a call with gradients"):
        model(image(1, 3, 6, 7))


class Frames(Numbered):
    """Runs each block on all frames before the next block: as often as there are frames."""

    def forward(self, x: Tensor) -> Tensor:
        frames = [self.fea_conv(frame) for frame in x.unsqueeze(1).flatten(1, -4).unbind(1)]
        for block in (self.B1, self.B2, self.B3, self.B4):
            frames = [block(frame) for frame in frames]
        return torch.stack([self.tail(frame) for frame in frames], dim=1)


def test_a_later_call_that_runs_blocks_several_times_is_refused_if_they_share() -> None:
    """A state would be that of the last frame for all of them."""
    several = image(2, 3, 3, 6, 7)
    model = attach(Frames(), "B*", every=1, share=2, zero_init=False, **OPTIONS).eval()
    assert model(several[:, :1]).shape == (2, 1, 3, 12, 14)
    with pytest.raises(RuntimeError, match=r"B1 runs more than once in a call of the model.*share=1"):
        model(several)
    alone = attach(Frames(), "B*", every=1, share=1, zero_init=False, **OPTIONS).eval()
    for expected, frame in zip(alone(several).unbind(1), several.split(1, dim=1), strict=True):
        torch.testing.assert_close(alone(frame)[:, 0], expected)


TOGETHER = ("an nn.Sequential", "attributes")


def _train_together(rank: int, world_size: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    for name in TOGETHER:
        model = attended(name)
        together = DistributedDataParallel(model)
        train(model, 3, call=lambda _, x, net=together: net(x[rank::world_size]))
        torch.save(model.state_dict(), f"{folder}/{name}{rank}.pth")
    dist.barrier()  # nobody leaves while another still receives
    dist.destroy_process_group()


@pytest.mark.promise("R16")
def test_two_processes_are_one(tmp_path: Path) -> None:
    mp.spawn(_train_together, args=(2, str(tmp_path)), nprocs=2)
    for name in TOGETHER:
        first, second = (torch.load(tmp_path / f"{name}{rank}.pth", weights_only=True) for rank in (0, 1))
        alone = attended(name)
        train(alone, 3)
        for key, value in alone.state_dict().items():
            assert torch.equal(first[key], second[key]), key
            close = 1e-5 if "pending" in key else 1e-6  # sums over hundreds of tokens
            torch.testing.assert_close(first[key], value, rtol=close, atol=close, msg=lambda t, key=key: f"{key}: {t}")


@hosts
def test_strict_loading_of_its_own_weights_and_of_none_of_the_plain_ones(name: str) -> None:
    model, other = attended(name), attended(name)
    train(model)
    other.load_state_dict(model.state_dict(), strict=True)
    assert_same(model, other)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*\.sparse_sr_attn"):
        built(name).load_state_dict(model.state_dict())
    missing, unexpected = other.load_state_dict(built(name).state_dict(), strict=False)
    assert unexpected == []
    assert all("sparse_sr_attn" in key for key in missing)


@pytest.mark.unhooked
@pytest.mark.parametrize("name", ["attributes", pytest.param("tokens", marks=pytest.mark.slow)])
def test_a_compiled_model_gives_the_same(name: str) -> None:
    torch._dynamo.reset()
    eager = attended(name)
    compiled = torch.compile(copy.deepcopy(eager), backend="aot_eager")
    for size in ((6, 7), (8, 5)):
        x = image(2, 3, *size)
        assert torch.equal(compiled(x), eager(x))


@pytest.mark.unhooked
@pytest.mark.parametrize("name", ["an nn.Sequential", "attributes", "tuples"])
def test_an_exported_model_gives_the_same_at_other_sizes(name: str) -> None:
    model = attended(name).eval()
    sides = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    given = sides if name == "an nn.Sequential" else (sides,)
    exported = torch.export.export(model, (image(1, 3, 12, 14),), dynamic_shapes=(given,), strict=False).module()
    x = image(1, 3, 17, 9)
    torch.testing.assert_close(exported(x), model(x), rtol=1e-5, atol=1e-5)


def test_what_a_forward_keeps_in_the_model_stays_there() -> None:
    model = attended("tokens")
    before = model.num_calls
    model(image(1, 3, 6, 7))
    model(image(1, 3, 6, 7))
    assert model.num_calls == before + 2


class Weighted(Numbered):
    weight = 1.0

    def body(self, x: Tensor) -> Tensor:
        return super().body(x) * self.weight


@pytest.mark.unhooked
def test_a_changed_attribute_changes_the_compiled_forward() -> None:
    torch._dynamo.reset()
    model, plain = twins(Weighted)
    attach(model, "B*", **OPTIONS)
    compiled = torch.compile(model, backend="aot_eager")
    x = image(1, 3, 6, 7)
    for weight in (1.0, 3.0, 5.0):
        model.weight = plain.weight = weight
        assert torch.equal(compiled(x), plain(x))


class Python(Numbered):
    """A forward that a trace would freeze: optional arguments, contexts, side effects, inner modes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_calls = 0
        self.aside = None

    def forward(self, x: Tensor, gain: float | None = None) -> Tensor:
        self.num_calls += 1
        with torch.no_grad():
            x = x * 2
        output = super().forward(x)
        if gain is None:
            gain = 0.5
        if self.aside is not None:
            gain = gain * self.aside
        return output * gain * self.num_calls


def test_eager_forwards_are_those_of_the_host() -> None:
    model, plain = twins(Python)
    attach(model, "B*", share=2, **OPTIONS)
    x = image(1, 3, 6, 7)
    for aside in (None, 3.0):
        model.aside = plain.aside = aside
        plain.num_calls = model.num_calls
        assert torch.equal(model(x), plain(x))
        assert torch.equal(model(x, 2.0), plain(x, 2.0))
    assert model.num_calls == plain.num_calls == 4


class ByReference(Numbered):
    """Keeps its blocks in a list, too."""

    def __init__(self) -> None:
        super().__init__()
        self.order = [self.B1, self.B2, self.B3, self.B4]

    def body(self, x: Tensor) -> Tensor:
        for block in self.order:
            x = block(x)
        return x


class Later(ByReference):
    def __init__(self) -> None:
        super().__init__()
        self.order = []

    def body(self, x: Tensor) -> Tensor:
        return super().body(x) if self.order else Numbered.body(self, x)


def test_blocks_that_are_not_called_by_name_are_refused_or_share_nothing() -> None:
    message = "no attention ran: ByReference calls 'B1' by another reference"
    with pytest.raises(ConfigError, match=message):
        attach(ByReference(), "B*", share=2, **OPTIONS)
    with pytest.warns(UserWarning, match=f"attached without sharing: .*{message}"):
        assert_attends(ByReference, "B*")
    assert_attends(ByReference, "B*", share=1)
    model = attach(Later(), "B*", share=2, **OPTIONS)
    model.order = [model.B1, model.B2, model.B3, model.B4]
    with pytest.raises(RuntimeError, match="no attention ran: Later calls 'B1' by another reference"):
        model(image(1, 3, 6, 7))


class Twofold(Host):
    """Calls its trunk in evaluation and iterates over it in training."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(*(Block(8) for _ in range(4)))

    def body(self, x: Tensor) -> Tensor:
        if not self.training:
            return cast(Tensor, self.trunk(x))
        for block in self.trunk:
            x = block(x)
        return x


def test_attention_runs_in_both_modes_however_the_trunk_is_called() -> None:
    options = {**OPTIONS, "zero_init": False}
    model, plain = twins(Twofold)
    attach(model, "trunk", every=1, share=2, **options)
    x = image(1, 3, 6, 7)
    for training in (False, True):
        assert not torch.equal(model.train(training)(x), plain.train(training)(x))


def test_attention_inside_attention_is_loaded_again() -> None:
    def nested() -> nn.Module:
        trunk = nn.Sequential(*(nn.Sequential(Block(8), Block(8)) for _ in range(2)))
        model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), trunk)
        attach(model, "1", every=1, share=1, **OPTIONS)
        return attach(model, "1.0", every=1, share=1, **OPTIONS)

    model, other = nested(), nested()
    assert len([key for key in model.state_dict() if key.endswith(".sparse_sr_attn")]) == 2
    other.load_state_dict(model.state_dict())
    x = image(1, 3, 6, 7)
    assert torch.equal(other.eval()(x), model.eval()(x))


def test_an_example_may_be_all_arguments() -> None:
    torch.manual_seed(0)
    model = attach(Scaled(), "B*", example=(image(1, 3, 8, 8), 4), **OPTIONS)
    assert model(image(1, 3, 8, 8), 4).shape == (1, 3, 32, 32)
    assert len(layers_of(attach(Scaled(), "B*", **OPTIONS))) == 2  # a scale is guessed


class Widths(Host):
    """Two widths, as in a U-Net."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = Block(), Block()
        self.wide = nn.Conv2d(8, 16, 2, stride=2)
        self.low1, self.low2 = Block(16), Block(16)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)

    def body(self, x: Tensor) -> Tensor:
        x = self.down2(self.down1(x))
        return self.up(self.low2(self.low1(self.wide(x))))


def test_each_width_has_its_layer_and_equal_shapes_share() -> None:
    model, plain = twins(Widths)
    attach(model, ["down*", "low*"], every=1, share=4, **OPTIONS)
    kinds = [(type(layer), layer.coa.value.in_channels if isinstance(layer, LCoA) else 0) for layer in layers_of(model)]
    assert kinds == [(LCoA, 8), (CoA, 0), (LCoA, 16), (CoA, 0)]
    x = image(1, 3, 8, 8)
    assert torch.equal(model(x), plain(x))
    model = attach(Widths(), "down1, low2", every=1, share=1, **OPTIONS)
    assert {key.split(".sparse_sr_attn.")[0] for key in model.state_dict() if ".sparse_sr_attn." in key} == {
        "down1",
        "low2",
    }


def test_it_says_which_trunk_it_chose_and_offers_the_rest() -> None:
    with pytest.warns(
        UserWarning, match=r"attached to 'low\*' \(2 of 16 channels\); body=.* 'down\*' \(2 of 8 channels\)"
    ):
        attach(Widths(), **OPTIONS)


def test_a_trunk_with_few_of_the_parameters_is_told_if_there_are_others() -> None:
    model = Widths()
    model.up = nn.Sequential(conv(16, 400), conv(400, 32), nn.PixelShuffle(2))
    with pytest.warns(
        UserWarning, match=r"attached to 'low\*' \(2 of 16 channels\), which has 2\.9% of the parameters"
    ):
        attach(model, **OPTIONS)
    model = Numbered()
    model.tail = nn.Sequential(conv(8, 400), conv(400, 12), nn.PixelShuffle(2))
    with quiet():
        attach(model, **OPTIONS)


class Twice(Host):
    """Runs a network inside two times (ARRLFN)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Numbered()
        self.net.tail = nn.Sequential(conv(8, 8))

    def body(self, x: Tensor) -> Tensor:
        return self.net.body(x) if x is None else self.inner(self.inner(x))

    def inner(self, x: Tensor) -> Tensor:
        return self.net(x[:, :3])


@pytest.mark.parametrize("body", [None, "net.B*"])
def test_a_network_that_runs_twice_inside_is_named(body: str | None) -> None:
    model = Twice()
    advice = r"attach\(model\.get_submodule\('net'\)\) gives it attention"
    with pytest.raises(ConfigError, match=rf"body: must .*'net'.*; {advice}"):
        attach(model, body, **OPTIONS)
    x = image(1, 3, 8, 8)
    expected = model(x)
    attach(model.get_submodule("net"), **OPTIONS)
    assert torch.equal(model(x), expected)


class Uncopied(Numbered):
    """PyTorch copies no tensor that was computed from weights, such as those of a `weight_norm` that never ran."""

    def __init__(self) -> None:
        super().__init__()
        self.computed = self.fea_conv.weight * 1


class ByClass(Uncopied):
    """Runs only blocks of a known class."""

    def body(self, x: Tensor) -> Tensor:
        for block in (self.B1, self.B2, self.B3, self.B4):
            x = block(x) if type(block) is Block else x
        return x


def test_a_model_with_computed_tensors_is_tried_like_others() -> None:
    model = ByClass()
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    x = image(1, 3, 8, 8)
    expected = model(x)
    with quiet():
        attach(model, every=1, **OPTIONS)
    assert torch.equal(model(x), expected)
    model(x).sum().backward()
    assert all(p.grad is not None for layer in layers_of(model) for p in layer.parameters())


def test_what_cannot_be_tried_is_refused() -> None:
    model = Numbered()
    model.lock = threading.Lock()
    with pytest.raises(ConfigError, match=r"^copy\.deepcopy cannot copy Numbered, and attention is tried on a copy$"):
        attach(model, **OPTIONS)


class Biased(Windowed):
    """Computes a table of biases, which is four-dimensional too."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Sequential(*(nn.Linear(16, 16) for _ in range(8)))

    def body(self, x: Tensor) -> Tensor:
        return super().body(x) + self.bias(x.new_ones(1, 8, 4, 16)).mean()


class Wrapped(Host):
    """Its blocks wrap others, and weight channels by what they pool."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Pooled() for _ in range(4))

    def body(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.weigh = Block(), conv(8, 8, 9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return x * self.weigh(x.mean(dim=(2, 3), keepdim=True)).sigmoid()


def test_the_outermost_of_equal_trunks_is_taken_and_pooled_values_are_none() -> None:
    with quiet():
        model = attach(Wrapped(), every=1, **OPTIONS)
    assert model._record["sites"] == [f"blocks.{index}" for index in range(4)]
    with quiet():
        model = attach(Pooling(), every=1, **OPTIONS)
    assert model._record["sites"] == [f"blocks.{index}.inner" for index in range(2)]


class Pooling(Host):
    """Its blocks return tuples, so that maps and pooled values inside them are all that can be named."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([PooledTuple(), PooledTuple()])

    def body(self, x: Tensor) -> Tensor:
        return self.blocks[1](self.blocks[0](x)[0])[0]


class PooledTuple(Pooled):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


def test_a_table_of_biases_is_no_trunk() -> None:
    with quiet():
        model = attach(Biased(), every=1, **OPTIONS)
    assert model._record["sites"] == [f"groups.{index}.conv" for index in range(4)]


def test_attention_inside_a_sequential_that_is_a_block() -> None:
    """The blocks are an nn.Sequential and a subclass of it, which run what is in them, but not the attention."""
    plain = Numbered()
    plain.B2, plain.B3 = nn.Sequential(conv(8, 8), nn.ReLU()), type("Own", (nn.Sequential,), {})(conv(8, 8), nn.ReLU())
    for share in (1, 2):
        model = attach(copy.deepcopy(plain), "B*", every=1, share=share, **OPTIONS)
        assert torch.equal(model(image(1, 3, 8, 8)), plain(image(1, 3, 8, 8)))
        assert len(model.B2) == 2


class Unpadded(nn.Module):
    """Each convolution makes maps smaller, so only it and its activation are of one size (waifu2x, RealCUGAN)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def test_a_convolution_and_its_activation_are_taken_if_there_is_nothing_longer() -> None:
    with quiet():
        model = attach(Unpadded(), **OPTIONS)
    assert model.conv._record["sites"] == ["2", "3"]
    x = image(1, 3, 12, 12)
    assert model(x).shape == (1, 3, 6, 6)


# --- hosts with ways of their own -------------------------------------------------------------------------------------


def assert_attends(
    build: Callable[[], nn.Module],
    body: str | None,
    duplicate: Callable[[Any], Any] = lambda model: model,
    **options: Any,
) -> Any:
    """The model with attention computes the same in both modes, and all of the attention learns."""
    torch.manual_seed(0)
    model = build()
    plain = copy.deepcopy(model)
    model = duplicate(attach(model, body, every=1, **OPTIONS, **options))
    for training in (True, False):
        x = image(2, 3, 6, 7)
        assert torch.equal(model.train(training)(x), plain.train(training)(x))
    train(model.train(), 3)
    layers = {key: value for key, value in model.named_parameters() if "sparse_sr_attn" in key}
    assert layers
    for key, parameter in layers.items():
        assert parameter.grad is not None, key
        assert parameter.grad.any(), key
    return model


def own_forward(module: Any, factor: float, *, method: bool) -> None:
    """Set a forward on a module itself."""
    if method:
        module.forward = types.MethodType(lambda self, x: factor * type(self).forward(self, x), module)
    else:
        forward = module.forward
        module.forward = lambda x: factor * forward(x)


class Inside(nn.Module):
    """Runs its blocks in a module inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = Numbered(), conv(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x))


class Spread(Inside):
    """Its blocks are in several modules."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Sequential(Block(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.other(super().forward(x))


def with_own_forward(build: Callable[[], nn.Module], *paths: str, method: bool) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        model = build()
        for path in paths:
            own_forward(model.get_submodule(path), 1.5, method=method)
        return model

    return made


@pytest.mark.parametrize("method", [True, False])
def test_a_forward_that_is_set_on_a_module_is_honoured_or_refused(method: bool) -> None:
    blocks = with_own_forward(Numbered, "B2", "B3", method=method)
    assert_attends(blocks, "B*", share=2)
    assert_attends(blocks, "B*", share=1)
    assert_attends(with_own_forward(Twofold, "trunk.1", method=method), "trunk", share=2)
    with pytest.raises(ConfigError, match="the `forward` of Numbered is set on the module, not its class"):
        attach(with_own_forward(Numbered, "", method=method)(), "B*", share=2, **OPTIONS)
    for build, body in ((Inside, "inner.B*"), (Spread, "inner.B*, other.0")):
        around = with_own_forward(build, "inner", method=method)
        if method:  # a copy of the model, or a view of it, can run it
            assert_attends(around, body, share=2)
            continue
        with pytest.raises(ConfigError, match=f"the `forward` of 'inner' of {build.__name__} is set on the module"):
            attach(around(), body, share=2, **OPTIONS)


def test_a_forward_that_is_set_later_around_blocks_and_runs_no_view_is_refused() -> None:
    model = attach(Spread(), "inner.B*, other.0", every=1, share=2, **OPTIONS)
    own_forward(model.inner, 1.0, method=True)
    assert model(image(1, 3, 6, 7)).shape == (1, 3, 12, 14)
    own_forward(model.inner, 1.0, method=False)
    with pytest.raises(RuntimeError, match="inner has a `forward` that is set on the module and not a method of it"):
        model(image(1, 3, 6, 7))


@pytest.mark.parametrize("share", [1, 2])
def test_a_forward_that_is_wrapped_later_keeps_the_attention(share: int) -> None:
    """As libraries do that move weights from device to device."""
    model = attach(Numbered(), "B*", every=1, share=share, **{**OPTIONS, "zero_init": False}).eval()
    x = image(1, 3, 6, 7)
    expected = model(x)
    for block in (model, model.B1, model.B2, model.B3, model.B4):
        own_forward(block, 1.0, method=False)
    assert torch.equal(model(x), expected)


class ByType(Numbered):
    """Looks at the classes of its blocks."""

    def runs(self, block: nn.Module) -> bool:
        return type(block) is Block

    def body(self, x: Tensor) -> Tensor:
        for block in (self.B1, self.B2, self.B3, self.B4):
            x = block(x) if self.runs(block) else 0.5 * block(x)
        return x


class ByIsInstance(ByType):
    def runs(self, block: nn.Module) -> bool:
        return isinstance(block, Block)


class BySequential(Twofold):
    def body(self, x: Tensor) -> Tensor:
        if type(self.trunk) is not nn.Sequential:
            return x
        for block in self.trunk:
            x = block(x)
        return x


class ByOwnType(Numbered):
    def body(self, x: Tensor) -> Tensor:
        return super().body(x) * (1 if type(self) is ByOwnType else 2)


class ByInnerType(Inside):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 if type(self.inner) is Numbered else 2)


class ByPrivateType(ByReference):
    """Looks at classes where no view leads."""

    def body(self, x: Tensor) -> Tensor:
        for block in self.order:
            x = block(x) if type(block) is Block else 0.5 * block(x)
        return x


@pytest.mark.parametrize("share", [1, 2])
@pytest.mark.parametrize(
    ("build", "body"),
    [(ByType, "B*"), (ByIsInstance, "B*"), (ByOwnType, "B*"), (BySequential, "trunk"), (ByInnerType, "inner.B*")],
)
def test_hosts_that_look_at_classes(build: Any, body: str, share: int) -> None:
    assert_attends(build, body, share=share)


@pytest.mark.parametrize("share", [1, 2, None])
def test_hosts_that_look_at_classes_where_no_view_leads_are_refused(share: int | None) -> None:
    model = ByPrivateType()
    with pytest.raises(ConfigError, match="must name modules that can be followed by attention, but ByPrivateType"):
        attach(model, "B*", share=share, **OPTIONS)
    assert {type(block) for block in model.order} == {Block}


class WithState:
    def __getstate__(self) -> Any:
        return {"kept": dict(vars(self))}

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state["kept"])


class WithReduce:
    def __reduce__(self) -> Any:
        return rebuilt, (type(self), cast(Any, self).state_dict())


class WithDeepcopy(WithReduce):
    def __deepcopy__(self, memo: Any) -> Any:
        return rebuilt(type(self), cast(Any, self).state_dict())


def rebuilt(build: Any, state: Any) -> Any:
    model = build()
    model.load_state_dict(state)
    return model


class StateHost(WithState, Numbered): ...


class ReduceHost(WithReduce, Numbered): ...


class DeepcopyHost(WithDeepcopy, Numbered): ...


class StateBlock(WithState, Block): ...


class ReduceBlock(WithReduce, Block): ...


class DeepcopyBlock(WithDeepcopy, Block): ...


def of_blocks(block: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = Numbered()
        model.B1, model.B2, model.B3, model.B4 = (block() for _ in range(4))
        return model

    return build


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])  # noqa: S301
@pytest.mark.parametrize(
    ("build", "share"),
    [
        *((host, 2) for host in (StateHost, ReduceHost, DeepcopyHost)),
        *((of_blocks(block), 1) for block in (StateBlock, ReduceBlock, DeepcopyBlock)),
    ],
)
def test_hosts_that_copy_in_a_way_of_their_own(build: Any, share: int, duplicate: Any) -> None:
    model = assert_attends(build, "B*", duplicate, share=share)
    twin = duplicate(model)
    assert_same(model, twin)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert one is not other
    assert detach(twin)(image(1, 3, 6, 7)).shape == (1, 3, 12, 14)


class Lazy(Numbered):
    """Makes modules when it is called for the first time, and removes others."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = conv(8, 8)

    def body(self, x: Tensor) -> Tensor:
        if hasattr(self, "unused"):
            self.late, self.B1.late = conv(8, 8, 1), nn.PReLU()
            self.B3 = self.B3
            del self.unused
        return self.late(super().body(x))


def test_modules_that_a_forward_makes_stay_in_the_model() -> None:
    model, plain = twins(Lazy)
    attach(model, "B*", every=1, share=2, **OPTIONS)
    assert hasattr(model, "unused")
    third, x = model.B3, image(1, 3, 6, 7)
    outputs = []
    for each in (model, plain):
        torch.manual_seed(0)
        outputs.append(each(x))
    assert torch.equal(*outputs)
    assert model.B3 is third
    assert type(model.B1.late) is nn.PReLU
    late = model.late
    train(model)
    assert model.late is late
    assert late.weight.grad.any()
    assert detach(model).state_dict().keys() == plain.state_dict().keys()


# --- weights of other attention ---------------------------------------------------------------------------------------


DIFFERENT: list[tuple[dict[str, Any], str]] = [
    ({"chunk_size": 9}, "attention.chunk_size is 9 in the weights, and 12 in the model"),
    ({"every": 2}, "attention.after is [1, 3] in the weights, and [0, 1, 2, 3] in the model"),
    ({"share": 4}, "attention.share is 4 in the weights, and 2 in the model"),
    ({"body": ["B1", "B2", "B3"]}, "sites is ['B1', 'B2', 'B3'] in the weights, and ['B1', 'B2', 'B3', 'B4'] in the"),
]


@pytest.mark.parametrize(("given", "message"), DIFFERENT)
def test_weights_of_other_attention_are_refused_and_the_difference_told(given: dict[str, Any], message: str) -> None:
    def attached(body: Any = "B*", **options: Any) -> Any:
        return attach(Numbered(), body, **{"every": 1, "share": 2, **OPTIONS, **options})

    model = nn.Sequential(attached())
    weights = {f"0.{key}": value for key, value in attached(**given).state_dict().items()}
    with pytest.raises(RuntimeError, match=re.escape(message)):
        model.load_state_dict(weights)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    if all(shapes.get(key, value.shape) == value.shape or is_record(key) for key, value in weights.items()):
        model.load_state_dict(weights, strict=False)
    model.load_state_dict({f"0.{key}": value for key, value in attached(zero_init=False).state_dict().items()})


def test_a_record_that_cannot_be_read_is_refused() -> None:
    model = attach(Numbered(), "B*", every=1, share=2, **OPTIONS)
    weights = model.state_dict()
    (key,) = filter(is_record, weights)
    for value in (torch.zeros(3), torch.full((5,), torch.nan), weights[key][:-1]):
        with pytest.raises(RuntimeError, match=f"{key}: records attention that cannot be read"):
            model.load_state_dict({**weights, key: value})
        model.load_state_dict({**weights, key: value}, strict=False)
