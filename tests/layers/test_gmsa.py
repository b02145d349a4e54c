"""GMSA, its sharing, ELAB and the shift convolution, spelt out by hand."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerances import assert_bit_equal, assert_values_close
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_sr_attn import ELAB, GMSA, LFE, ConfigError, ShapeError, SharedGMSA, SharingError, ShiftConv2d, build_layer
from sparse_sr_attn.functional import backend, batch_norm, shift
from sparse_sr_attn.functional.shift import shift2d
from sparse_sr_attn.functional.window.grid import group_widths
from sparse_sr_attn.layers import base, shift_conv
from sparse_sr_attn.layers import batch_norm as norms
from sparse_sr_attn.layers.batch_norm import BatchNorm2d, ConvNorm
from sparse_sr_attn.reference import window as slow

SIZES = (2, 3, 4)
needs_triton = pytest.mark.skipif(not backend.HAS_TRITON, reason="needs triton")


def features(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def trained(layer: nn.Module, channels: int = 8) -> nn.Module:
    """The layer with statistics and gains that are neither 0 nor 1."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in layer.state_dict().items():
            if "norm" in name and tensor.is_floating_point():
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype))
    return layer


def layer(**options: Any) -> GMSA:
    torch.manual_seed(0)
    return trained(GMSA(8, **{"window_sizes": SIZES, **options}).double())  # type: ignore[return-value]


def projected(module: ConvNorm, x: Tensor) -> Tensor:
    """Convolution, then normalisation, in torch's own words."""
    norm = module.norm
    y = F.conv2d(x, module.conv.weight, module.conv.bias)
    return F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


@pytest.mark.parametrize(("embed_dim", "widths"), [
    (60, [20, 20, 20]),
    (64, [22, 21, 21]),
    (8, [3, 3, 2]),
    (3, [1, 1, 1]),
    (2, [1, 1]),
    (1, [1]),
])  # fmt: skip
def test_groups_are_even_and_the_first_are_larger(embed_dim: int, widths: list[int]) -> None:
    assert group_widths(embed_dim, 3) == widths
    assert GMSA(embed_dim).eval()(torch.rand(1, embed_dim, 3, 5)).shape == (1, embed_dim, 3, 5)


@pytest.mark.parametrize(("size", "shift", "exact_shift"), [
    *itertools.product([(12, 12), (5, 7), (1, 1), (13, 2)], [False, True], [True]),
    ((12, 24), True, False),  # without pads, which the published displacement would move into the map
])  # fmt: skip
def test_is_dense_attention_under_its_windows(size: tuple[int, int], shift: bool, exact_shift: bool) -> None:
    """Each group by a table of who sees whom; odd windows are moved as said, even ones by half."""
    gmsa = layer(shift=shift, exact_shift=exact_shift, res_scale=0.7).eval()
    x = features(2, 8, *size)
    queries = projected(gmsa.query, x).split([3, 3, 2], dim=1)
    values = projected(gmsa.shared.value, x).split([3, 3, 2], dim=1)
    moved = {2: (1, 1), 3: (1, 1) if exact_shift else (2, 1), 4: (2, 2)} if shift else dict.fromkeys(SIZES, (0, 0))
    groups = [
        slow.window_attention(q, q, v, window_size=s, shift=moved[s][0], unshift=moved[s][1])
        for q, v, s in zip(queries, values, SIZES, strict=True)
    ]
    assert_values_close(gmsa(x), x + 0.7 * gmsa.shared.output(torch.cat(groups, dim=1)))


def test_a_consumer_of_another_width_and_depth_reads_it() -> None:
    """Its own channels are split into as many groups as there are weights."""
    state = layer().eval().attend(features(2, 8, 6, 5))
    for width in (1, 2, 7, 16):
        x = features(2, width, 6, 5)
        assert SharedGMSA(width).double().eval()(x, state).shape == x.shape


def test_batch_norm_sees_real_pixels_only() -> None:
    """Statistics of a map that must be padded are those of torch's own layer, which knows no padding."""
    gmsa = layer().train()
    norm = nn.BatchNorm2d(8).double()
    norm.load_state_dict(gmsa.query.norm.state_dict())
    x = features(2, 8, 5, 7)
    norm.train()(gmsa.query.conv(x))
    gmsa(x)
    for name, expected in norm.state_dict().items():
        torch.testing.assert_close(gmsa.query.norm.state_dict()[name], expected, rtol=1e-12, atol=1e-12)


def test_synchronised_batch_norm_can_replace_it() -> None:
    """torch's conversion finds the layers by their type."""
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(layer())
    assert isinstance(converted.query.norm, nn.SyncBatchNorm)
    assert isinstance(layer().query.norm, BatchNorm2d)
    x = features(2, 8, 5, 7)
    assert_values_close(converted.eval()(x), layer().eval()(x))


def own_statistics(norm: nn.BatchNorm2d) -> None:
    norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None


def untracked(norm: nn.BatchNorm2d) -> None:
    norm.track_running_stats = False


def cumulative(norm: nn.BatchNorm2d) -> None:
    norm.reset_running_stats()
    norm.momentum = None  # as `torch.optim.swa_utils.update_bn` does


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("change", [nn.Module.train, nn.Module.eval, own_statistics, untracked, cumulative])
def test_normalisation_obeys_the_settings_of_its_own_module(change: Any, training: bool) -> None:
    """Recipes that freeze, adapt or recompute statistics set them in the normalisation alone."""
    ours, theirs = ConvNorm(8, 8).double(), nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)).double()
    theirs.load_state_dict(dict(zip(theirs.state_dict(), trained(ours).state_dict().values(), strict=True)))
    for module, norm in ((ours, ours.norm), (theirs, theirs[1])):
        module.train(training)
        change(norm)
    for step in range(3):
        x = features(2, 8, 5, 7, seed=step)
        assert_values_close(ours(x), theirs(x))
    for actual, expected in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.unhooked
@pytest.mark.parametrize("size", [(12, 12), (2, 3)])
@torch.no_grad()
def test_states_pass_between_compiled_and_eager_code(size: tuple[int, int]) -> None:
    """Somebody may compile one layer of a network, and not the next."""
    torch._dynamo.reset()
    first, later = layer().eval(), trained(SharedGMSA(8).double()).eval()
    x = features(2, 8, *size)
    attend = torch.compile(first.attend, fullgraph=True, backend="aot_eager")
    read = torch.compile(later, fullgraph=True, backend="aot_eager")
    expected = later(x, first.attend(x))
    assert_bit_equal(later(x, attend(x)), expected)
    assert_bit_equal(read(x, first.attend(x)), expected)
    assert_bit_equal(read(x, attend(x)), expected)


def test_a_foreign_state_is_refused() -> None:
    x = features(1, 8, 4, 4)
    with pytest.raises(SharingError, match=r"a WindowAttention, got none; call shared = GMSA\(\.\.\.\)\.attend\(x\)"):
        SharedGMSA(8).double()(x)
    with pytest.raises(SharingError, match="ELAB takes no state, got a WindowAttention"):
        ELAB(8).double()(x, layer().eval().attend(x))


@pytest.mark.parametrize("share", [1, 3])
def test_elab_by_hand(share: int) -> None:
    torch.manual_seed(0)
    elab = trained(ELAB(8, share=share, window_sizes=SIZES, shift=True, res_scale=0.5).double()).eval()
    assert [type(attention) for attention in elab.attention] == [GMSA] + (share - 1) * [SharedGMSA]
    x = y = features(2, 8, 5, 7)
    for turn in range(share):
        y = y + 0.5 * elab.lfe[turn](y)
        if turn == 0:
            state = elab.attention[0].attend(y)
            assert state.shift
        y = elab.attention[turn](y, state)
    assert_values_close(elab(x), y)
    elab.res_scale = 0.0
    for attention in elab.attention:
        getattr(attention, "shared", attention).res_scale = 0.0
    assert torch.equal(elab(x), x)


@pytest.mark.parametrize("height", [1, 2, 3, 5, 8, 11])
@pytest.mark.parametrize("lines", [1, 2, 3])
@torch.no_grad()
def test_lfe_in_strips_is_the_whole(monkeypatch: pytest.MonkeyPatch, height: int, lines: int) -> None:
    """A line depends on two above and two below; where strips meet, nobody can tell."""
    torch.manual_seed(0)
    lfe = LFE(10)
    x = features(2, 10, height, 6, dtype=torch.float32)
    whole = lfe(x)
    monkeypatch.setattr(shift_conv, "_STRIP", lines * 20 * 6)
    shapes: list[int] = []
    monkeypatch.setattr(shift_conv, "shift2d", lambda x: shapes.append(x.shape[2]) or shift2d(x))
    torch.testing.assert_close(lfe(x), whole, rtol=1e-5, atol=1e-6)
    assert len(shapes) == 2 * -(-height // lines)  # of both convolutions
    assert max(shapes) <= lines + 4


@torch.no_grad()
def test_a_hook_in_lfe_sees_whole_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    lfe = LFE(10)
    shapes: list[tuple[int, ...]] = []
    lfe.conv1.register_forward_hook(lambda _, __, y: shapes.append(tuple(y.shape)))
    monkeypatch.setattr(shift_conv, "_STRIP", 1)
    lfe(features(2, 10, 5, 6, dtype=torch.float32))
    assert shapes == [(2, 20, 5, 6)]


@pytest.mark.parametrize("shift", [False, True])
def test_what_is_kept_of_large_windows_is_enough(shift: bool) -> None:
    """Where nothing learns, a state keeps queries in place of weights that are many; readers get the same."""
    first = layer(window_sizes=(2, 17, 18), shift=shift).eval()
    x = features(2, 8, 20, 18)
    reader = trained(SharedGMSA(8).double()).eval()
    kept = first.attend(x)
    assert all(weights is not None for weights in kept.weights)
    with torch.no_grad():
        state = first.attend(x)
        assert [weights is None for weights in state.weights] == [False, True, True]
        assert state.query is not None
        assert state.map_size() == kept.map_size()
        assert_values_close(reader(x, state), reader(x, kept))
        assert_values_close(first(x, state), first(x))


@needs_triton
@pytest.mark.unhooked
@pytest.mark.parametrize(("shift", "exact_shift"), [(False, True), (True, False)])
def test_the_kernel_of_all_groups_is_the_same_layer(
    monkeypatch: pytest.MonkeyPatch, shift: bool, exact_shift: bool
) -> None:
    """As on GPUs, where a state holds queries and no weights; also for a reader whose last group is empty."""
    first = layer(shift=shift, exact_shift=exact_shift)
    readers = [trained(SharedGMSA(channels).double(), channels) for channels in (8, 2)]
    x, probe = features(2, 8, 5, 7).requires_grad_(), features(2, 18, 5, 7, seed=1)

    def results() -> list[Tensor]:
        state = first.attend(x)
        assert (state.query is None) == (state.weights[0] is not None)
        assert state.map_size() == (2, 5, 7)
        y = torch.cat([first(x), readers[0](x, state), readers[1](x[:, :2], state)], dim=1)
        leaves = [x, *first.parameters(), *(each for reader in readers for each in reader.parameters())]
        return [y, *torch.autograd.grad((y * probe).sum(), leaves)]

    expected = results()
    monkeypatch.setattr(backend, "_best_backend", lambda device: "triton")
    assert first.attend(x).query is not None
    for mine, other in zip(results(), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-11)


@pytest.fixture
def with_kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Turn on the Triton kernels, as on a GPU."""

    def turn_on() -> None:
        monkeypatch.setattr(backend, "_best_backend", lambda device: "triton")
        for module in (batch_norm, shift, base, norms, shift_conv):
            monkeypatch.setattr(module, "runs_kernels", lambda device: True)

    return turn_on


@needs_triton
@pytest.mark.unhooked
@pytest.mark.parametrize("training", [False, True])
def test_the_kernels_of_a_block_are_the_same_block(with_kernels: Callable[[], None], training: bool) -> None:
    """Values, gradients and statistics; residuals and normalisation are part of the convolutions."""
    torch.manual_seed(0)
    block = trained(ELAB(10, share=2, window_sizes=(2, 3), res_scale=0.5).double()).train(training)
    x, probe = features(2, 10, 5, 7).requires_grad_(training), features(2, 10, 5, 7, seed=1)

    def results() -> list[Tensor]:
        twin = copy.deepcopy(block)
        with torch.set_grad_enabled(training):
            y = twin(x)
        found = torch.autograd.grad((y * probe).sum(), [x, *twin.parameters()]) if training else ()
        return [y, *found, *twin.buffers()]

    expected = results()
    with_kernels()
    for mine, other in zip(results(), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-11)


def without_momentum(layer: GMSA) -> None:
    for conv_norm in (layer.query, layer.shared.value):
        conv_norm.norm.momentum = None


def with_another_eps(layer: GMSA) -> None:
    layer.query.norm.eps = 0.1


def with_a_frozen_norm(layer: GMSA) -> None:
    layer.shared.value.norm.eval()


def with_frozen_parameters(layer: GMSA) -> None:
    for parameter in layer.query.norm.parameters():
        parameter.requires_grad_(False)


def without_running_statistics(layer: GMSA) -> None:
    layer.query.norm.track_running_stats = False


def with_a_hook(layer: GMSA) -> None:
    layer.shared.value.conv.register_forward_hook(lambda module, args, y: 2 * y)


@needs_triton
@pytest.mark.unhooked
@pytest.mark.parametrize(("change", "fused"), [
    (without_momentum, 2),
    (with_another_eps, 1 + 1),
    (with_a_frozen_norm, 1),
    (with_frozen_parameters, 2),
    (without_running_statistics, 1),
    (with_a_hook, 1),
])  # fmt: skip
def test_kernels_normalise_as_each_module_says(
    with_kernels: Callable[[], None], monkeypatch: pytest.MonkeyPatch, change: Callable[[GMSA], None], fused: int
) -> None:
    """Values, gradients and buffers; queries and values are normalised together only where both are alike."""
    first = layer()
    change(first)
    probe = features(2, 8, 5, 7, seed=1)

    def results() -> list[Tensor]:
        twin, x = copy.deepcopy(first), features(2, 8, 5, 7).requires_grad_()
        y = twin(x)
        leaves = [x, *(parameter for parameter in twin.parameters() if parameter.requires_grad)]
        return [y, *torch.autograd.grad((y * probe).sum(), leaves), *twin.buffers()]

    expected = results()
    with_kernels()
    numbers: list[int] = []
    by_kernels = norms._by_kernels
    monkeypatch.setattr(
        norms, "_by_kernels", lambda x, own, given: numbers.append(len(own)) or by_kernels(x, own, given)
    )
    for mine, other in zip(results(), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-11)
    assert sum(numbers) == fused
    assert (numbers == [2]) == (change in (without_momentum, with_frozen_parameters))


@needs_triton
@pytest.mark.unhooked
def test_kernels_take_maps_of_one_pixel(with_kernels: Callable[[], None]) -> None:
    """Which have no variance: running statistics normalise them."""
    x, first = features(1, 8, 1, 1), layer()
    expected, _ = copy.deepcopy(first)(x), with_kernels()
    assert_values_close(first(x), expected)


@needs_triton
@pytest.mark.unhooked
def test_kernels_pass_no_hook_by(with_kernels: Callable[[], None]) -> None:
    """What a hook sees, and what it returns, is the output of its module alone, without a residual."""
    block = ELAB(10, window_sizes=(2, 3)).double().eval()
    x, names = features(1, 10, 4, 6), ("lfe.0", "lfe.0.conv2", "attention.0.query", "attention.0.shared.output")

    def results() -> list[Tensor]:
        seen: list[Tensor] = []
        for name in names:
            hook = block.get_submodule(name).register_forward_hook(lambda _, __, y: seen.append(y) or 2 * y)
            with torch.no_grad():
                seen.append(block(x))
            hook.remove()
        return seen

    expected = results()
    assert len(expected) == 2 * len(names)
    with_kernels()
    for mine, other in zip(results(), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-11)


def test_wrong_channels_and_forms_are_explained() -> None:
    with pytest.raises(ShapeError, match="because in_channels is 5; got shape"):
        ShiftConv2d(5)(torch.rand(1, 6, 3, 3))
    with pytest.raises(ConfigError, match="form must be one of 'slices', 'masked', got 'fast'"):
        ShiftConv2d(5, form="fast")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["GMSA", "ELAB"])
def test_a_batch_of_no_maps_gives_none(name: str) -> None:
    """In training a batch without maps has no statistics, for PyTorch's own BatchNorm either."""
    layer = build_layer(name, 6, window_sizes=[2, 3]).eval()
    for size in ((4, 6), (5, 7)):
        assert layer(torch.rand(0, 6, *size)).shape == (0, 6, *size)
    if name == "GMSA":
        state = layer.attend(torch.rand(0, 6, 5, 7))
        assert layer.make_consumer().eval()(torch.rand(0, 6, 5, 7), state).shape == (0, 6, 5, 7)


class Stacks(TorchDispatchMode):
    """Counts stacks, of which a map is made that changes its order in memory."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.stack.default
        return func(*args, **(kwargs or {}))


def test_a_map_is_turned_once() -> None:
    """Queries and values read one map in channels-last memory."""
    with torch.no_grad(), Stacks() as stacks:
        GMSA(8, window_sizes=(2, 4)).eval()(torch.randn(2, 8, 9, 7))
    assert stacks.count == 1
