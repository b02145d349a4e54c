"""The clauses of the contract that need no compiler."""

import copy
import importlib.util
import io
import pickle
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparse_sr_attn.errors import ShapeError, SharingError
from sparse_sr_attn.testing.conformance.clause import alone, clause, has_state, keeps_shape, reads_states
from sparse_sr_attn.testing.conformance.subject import CHANNELS, HEIGHT, WIDTH, Chain, Subject, attend, feature_map
from sparse_sr_attn.testing.conformance.training import assert_bit_equal, assert_same, everything, history, rms, train


@clause()
def check_any_size(subject: Subject, device: torch.device) -> None:
    """Any h, w >= 1, any batch, from one channel up, in training and evaluation."""
    sizes = [(1, 1), (1, 2), (2, 1), (2, 2), (1, 17), (17, 1), (3, 4), (5, 7), (8, 8), (9, 13)]
    for channels in (1, 3, CHANNELS):
        chain = subject.chain(channels).to(device)
        for height, width in sizes:
            for batch in (1, 3):
                for training in (True, False):
                    x = feature_map("x", batch, channels, height, width, device=device)
                    output = chain.train(training)(x)
                    assert torch.isfinite(output).all(), f"{batch}x{channels}x{height}x{width}"
                    if keeps_shape(subject):
                        assert output.shape == x.shape
                    assert output.shape[0] == batch
                    assert output.shape[2:] == (height, width)


@clause(slow=True)
def check_every_size(subject: Subject, device: torch.device) -> None:
    """All sizes from 1x1 to 17x17 and lopsided ones, in evaluation, batches of one to three, from one channel up."""
    sizes = [(height, width) for height in range(1, 18) for width in range(1, 18)]
    sizes += [(1, 257), (257, 1), (31, 33), (64, 65)]
    chains = [subject.chain(channels).to(device).eval() for channels in (1, 2, CHANNELS)]
    with torch.no_grad():
        for number, (height, width) in enumerate(sizes):
            chain, channels = chains[number % 3], (1, 2, CHANNELS)[number % 3]
            x = feature_map("x", 1 + number // 3 % 3, channels, height, width, device=device)
            output = chain(x)
            assert output.shape[::2] == x.shape[::2], f"{height}x{width}: {tuple(output.shape)}"
            assert output.shape[3] == width
            assert not keeps_shape(subject) or output.shape == x.shape
            assert torch.isfinite(output).all(), f"{height}x{width}"


def _snapshot(module: nn.Module) -> dict[str, object]:
    """Return what a forward must not change: every attribute of every submodule, and the registered tensors."""
    seen: dict[str, object] = {}
    for path, child in module.named_modules():
        for name, value in vars(child).items():
            if name in ("_parameters", "_buffers", "_modules"):
                for key, item in value.items():
                    seen[f"{path}.{name}.{key}"] = id(item)
            else:
                plain = isinstance(value, (bool, int, float, str, tuple, list, dict, set, type(None)))
                seen[f"{path}.{name}"] = repr(value) if plain else id(value)
    return seen


@clause()
def check_forward_sets_no_attribute(subject: Subject, device: torch.device) -> None:
    """In training and evaluation, a forward stores state only in buffers, which it updates in place."""
    chain = subject.chain().to(device)
    for training in (True, False):
        chain.train(training)
        before = _snapshot(chain)
        chain(feature_map("x", device=device)).sum().backward()
        chain(feature_map("y", height=3, device=device))
        assert _snapshot(chain) == before


@clause()
def check_evaluation_moves_nothing(subject: Subject, device: torch.device) -> None:
    """No buffer and no global random state, before and after training, with and without gradients."""
    chain = subject.chain().to(device)
    for _ in range(2):
        chain.eval()
        before = {name: tensor.clone() for name, tensor in chain.state_dict().items()}
        dice = torch.random.get_rng_state(), random.getstate()
        chain(feature_map("x", device=device)).sum().backward()
        with torch.no_grad():
            chain(feature_map("y", device=device))
        for name, tensor in chain.state_dict().items():
            assert_bit_equal(tensor, before[name])
        assert torch.equal(torch.random.get_rng_state(), dice[0]), "torch's global random state moved"
        assert random.getstate() == dice[1], "Python's global random state moved"
        train(chain, device)


@clause(alone)
def check_training_moves_state_once_a_forward(subject: Subject, device: torch.device) -> None:
    """Counters `num_updates` go up by one a forward (the first leaves its update pending); backwards add none."""
    chain = subject.chain().to(device).train()
    counters = {name: b for name, b in chain.named_buffers() if name.endswith("num_updates")}
    for step in range(4):
        output = chain(feature_map(f"x{step}", device=device))
        after_forward = {name: b.clone() for name, b in chain.named_buffers()}
        output.sum().backward()
        for name, buffer in chain.named_buffers():
            assert_bit_equal(buffer, after_forward[name])
        for name, counter in counters.items():
            assert int(counter) == step, name


@clause()
def check_every_parameter_learns(subject: Subject, device: torch.device) -> None:
    """Each gets a finite gradient that is not all zero, and so does the input; with zero_init after two steps."""
    for zero_init in (False, True) if subject.takes("zero_init") else (False,):
        chain = subject.chain(**({"zero_init": True} if zero_init else {})).to(device).train()
        optimizer = torch.optim.SGD(chain.parameters(), lr=0.1)
        for step in range(3 if zero_init else 1):
            x = feature_map(f"x{step}", device=device).requires_grad_()
            output = chain(x)
            optimizer.zero_grad()
            (output * feature_map("probe", channels=output.shape[1], device=device)).sum().backward()
            optimizer.step()
        for name, parameter in chain.layer.named_parameters():
            assert parameter.grad is not None, f"{name} gets no gradient"
            assert torch.isfinite(parameter.grad).all(), f"the gradient of {name} is not finite"
            assert parameter.grad.any(), f"the gradient of {name} is zero"
        assert x.grad is not None
        assert torch.isfinite(x.grad).all()
        assert x.grad.any()


@clause(reads_states)
def check_state_of_another_size_is_refused(subject: Subject, device: torch.device) -> None:
    """Also with h and w swapped, which has the same number of tokens; the message names both sizes."""
    chain = subject.chain().to(device).eval()
    given = feature_map("x", device=device)
    for height, width in ((HEIGHT + 1, WIDTH), (WIDTH, HEIGHT), (1, HEIGHT * WIDTH), (2, 2)):
        state = chain.state(feature_map("y", height=height, width=width, device=device))
        message = _message(ShapeError, chain.read, given, state)
        for h, w in ((height, width), (HEIGHT, WIDTH)):
            assert re.search(rf"\b{h}\D{{1,4}}{w}\b", message), f"{h}x{w} is not named in: {message}"
    state = chain.state(feature_map("y", batch=3, device=device))
    message = _message(ShapeError, chain.read, given, state)
    for batch in (2, 3):
        assert re.search(rf"\b{batch}\b", message), f"{batch} samples are not named in: {message}"


@clause(alone)
def check_another_number_of_channels_is_refused(subject: Subject, device: torch.device) -> None:
    """The message names both numbers, as that of `layers.base.check_map` does."""
    chain = subject.chain().to(device).eval()
    x = feature_map("x", channels=CHANNELS + 1, device=device)
    if subject.kind == "consumer":
        state = chain.state(feature_map("x", device=device))
        message = _message(ShapeError, chain.layer, x, state)
    else:
        message = _message(ShapeError, chain.layer, x)
    for number in (CHANNELS, CHANNELS + 1):
        assert re.search(rf"\b{number}\b", message), f"{number} channels are not named in: {message}"


@clause(reads_states)
def check_a_foreign_state_is_refused(subject: Subject, device: torch.device) -> None:
    """A consumer without a state, and any layer with a state of another type, raise SharingError."""
    layer, x = subject.layer().to(device), feature_map("x", device=device)
    if subject.kind == "consumer":
        assert str(_message(SharingError, layer, x))
        assert str(_message(SharingError, layer, x, None))
    assert "dict" in _message(SharingError, layer, x, {})


def _message(error: type[Exception], call: Callable[..., object], *args: object) -> str:
    try:
        call(*args)
    except error as problem:
        return str(problem)
    except Exception as problem:
        hint = "; sparse_sr_attn.layers.base.check_map raises it" if error is ShapeError else ""
        raise AssertionError(
            f"{error.__name__} must be raised{hint}, got {type(problem).__name__}: {problem}"
        ) from problem
    raise AssertionError(f"{error.__name__} must be raised, got none")


@clause(lambda subject: subject.shared)
def check_sharing_with_oneself_changes_nothing(subject: Subject, device: torch.device) -> None:
    """`layer(x, layer.attend(x))` is `layer(x)`, and so is a consumer with the layer's weights; gradients too."""
    layer = subject.layer().double().to(device).eval()
    x = feature_map("x", dtype=torch.float64, device=device)
    probe = feature_map("probe", dtype=torch.float64, device=device)
    consumer: nn.Module = layer.make_consumer().double().to(device).eval()  # type: ignore[operator]
    ours = layer.state_dict()
    theirs = {
        name: next(value for key, value in ours.items() if key == name or key.endswith(f".{name}"))
        for name in consumer.state_dict()
    }
    consumer.load_state_dict(theirs)
    state = attend(layer, x)
    alone = layer(x)
    routed = [name for name, _ in layer.named_parameters() if not any(name.endswith(key) for key in theirs)]
    parameters = dict(layer.named_parameters())
    wanted = torch.autograd.grad((alone * probe).sum(), list(parameters.values()), materialize_grads=True)
    expected = dict(zip(parameters, wanted, strict=True))
    for reader, names in ((layer, list(parameters)), (consumer, routed)):
        output = reader(x, state)
        torch.testing.assert_close(output, alone, rtol=1e-10, atol=1e-10)
        leaves = [parameters[name] for name in names]
        grads = torch.autograd.grad((output * probe).sum(), leaves, retain_graph=True, materialize_grads=True)
        for name, grad in zip(names, grads, strict=True):
            torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-9)


@clause()
def check_evaluation_does_not_mix_samples(subject: Subject, device: torch.device) -> None:
    """A sample's result is the same alone and in any batch, before and after training."""
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        chain = subject.chain().to(device, dtype)
        for _ in range(2):
            chain.eval()
            x = feature_map("x", batch=3, dtype=dtype, device=device)
            together = chain(x)
            for b in range(3):
                alone = chain(x[b : b + 1])[0]
                torch.testing.assert_close(alone, together[b], rtol=tolerance, atol=tolerance)
            train(chain, device, dtype=dtype)


@clause(lambda subject: has_state(subject) and bool(_whole_numbers(_state_of(subject))))
def check_assignments_do_not_depend_on_the_batch(subject: Subject, device: torch.device) -> None:
    """The whole numbers in a state that belong to a sample, such as its clusters, are the same without the others."""
    for dtype in (torch.float64, torch.float32):
        chain = subject.chain().to(device, dtype)
        for _ in range(2):
            chain.eval()
            x = feature_map("x", batch=3, dtype=dtype, device=device)
            together = _whole_numbers(chain.state(x))
            for b in range(3):
                for single, all_three in zip(_whole_numbers(chain.state(x[b : b + 1])), together, strict=True):
                    if all_three.shape[:1] == (3 * len(single),):
                        assert torch.equal(single, all_three.unflatten(0, (3, -1))[b]), "assigned otherwise alone"
            train(chain, device, dtype=dtype)


def _state_of(subject: Subject) -> object:
    with torch.no_grad():
        return subject.chain().eval().state(feature_map("x", device=torch.device("cpu")))


def _whole_numbers(state: object) -> list[Tensor]:
    leaves = [leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor)]
    return [leaf for leaf in leaves if leaf.ndim > 0 and not leaf.is_floating_point()]


@clause()
def check_degenerate_maps_are_finite_and_repeatable(subject: Subject, device: torch.device) -> None:
    """One pixel, all equal, all zero, an outlier of 1e4, pixels that repeat, more clusters than pixels: in training."""
    noise = feature_map("x", device=device)
    outlier = noise.clone()
    outlier[:, :, 2, 3] = 1e4
    maps = {
        "one pixel": noise[:, :, :1, :1],
        "fewer pixels than clusters": noise[:, :, :1, :2],
        "all equal": noise[:, :, :1, :1].expand_as(noise),
        "all zero": torch.zeros_like(noise),
        "an outlier": outlier,
        "pixels that repeat": noise[:, :, :, :2].repeat(1, 1, 1, 3),
    }
    for name, x in maps.items():
        runs = []
        for _ in range(2):
            chain = subject.chain().to(device).train()
            record: dict[str, Tensor] = {}
            for step in range(3):
                leaf = x.clone().requires_grad_()
                output = chain(leaf)
                output.sum().backward()
                record |= {f"{step} {key}": value for key, value in everything(chain, leaf, output)}
            record["evaluation"] = chain.eval()(x)
            runs.append(record)
        for key, value in runs[0].items():
            assert torch.isfinite(value).all(), f"{name}: {key} is not finite"
        assert_same(*runs)


@clause()
def check_a_sample_that_is_not_finite_spoils_no_other(subject: Subject, device: torch.device) -> None:
    """In evaluation it keeps to itself; in training no buffer ever becomes non-finite."""
    chain = subject.chain().to(device)
    train(chain, device)
    for poison in (float("nan"), float("inf")):
        x = feature_map("x", batch=3, device=device)
        chain.eval()
        healthy = chain(x)
        x[1, 0, 2, 3] = poison
        sick = chain(x)
        for b in (0, 2):
            torch.testing.assert_close(sick[b], healthy[b], rtol=1e-6, atol=1e-6)
        chain.train()
        for sample in (x, feature_map("y", device=device)):
            chain(sample)
            for name, buffer in chain.named_buffers():
                assert torch.isfinite(buffer).all(), f"{name} is not finite any more"


@clause()
def check_repeated_runs_are_bit_equal(subject: Subject, device: torch.device) -> None:
    """Ten training steps and an evaluation, twice from the start."""
    runs = []
    for _ in range(2):
        chain = subject.chain().to(device)
        record = history(chain, chain, device, num_steps=10)
        record["evaluation"] = chain.eval()(feature_map("x", device=device))
        runs.append(record)
    assert_same(*runs)


@clause()
def check_deterministic_mode_changes_nothing(subject: Subject, device: torch.device) -> None:
    """Training and evaluation under PyTorch's deterministic algorithms, with unwritten memory filled with NaN.

    What they may change on a GPU is left open: there they must be accepted, and give finite numbers.
    """
    runs = []
    for switch in (False, True):
        with _deterministic(switch):
            chain = subject.chain().to(device)
            record = history(chain, chain, device)
            record["evaluation"] = chain.eval()(feature_map("x", device=device))
            runs.append(record)
    for name, value in runs[1].items():
        assert torch.isfinite(value).all(), f"{name} is not finite"
    if device.type == "cpu":
        assert_same(*runs)


@contextmanager
def _deterministic(switch: bool) -> Iterator[None]:
    """Set PyTorch's switch for deterministic algorithms, with unwritten memory filled, and set it back."""
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(switch)
    memory.fill_uninitialized_memory = switch
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory = before[1]


@clause()
def check_strides_do_not_matter(subject: Subject, device: torch.device) -> None:
    """Channels last, or a cut-out of a larger map, is the same map."""
    chain = subject.chain().double().to(device).eval()
    large = feature_map("x", height=HEIGHT + 3, width=WIDTH + 2, dtype=torch.float64, device=device)
    cut = large[:, :, 1:-2, 1:-1]
    expected = chain(cut.contiguous())
    for x in (cut, cut.contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(chain(x), expected, rtol=1e-10, atol=1e-10)


@clause()
def check_precisions(subject: Subject, device: torch.device) -> None:
    """float64, float32, bfloat16 and float16, training and evaluation: finite, and the output has the input's dtype."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        chain = subject.chain().to(device, dtype)
        for training in (True, True, False):
            chain.train(training)
            x = feature_map("x", dtype=dtype, device=device).requires_grad_()
            output = chain(x)
            assert output.dtype == dtype
            assert torch.isfinite(output).all()
            output.sum().backward()
            _assert_learning_is_finite(chain, x, dtype)


@clause()
def check_loud_half_inputs_stay_finite(subject: Subject, device: torch.device) -> None:
    """Activations up to 1e4 in bfloat16 and float16, as layer and under autocast: outputs, gradients and buffers."""
    for dtype in (torch.bfloat16, torch.float16):
        for autocast in (False, True):
            chain = subject.chain().to(device, torch.float32 if autocast else dtype).train()
            for step in range(3):
                x = 1e4 * feature_map(f"x{step}", device=device).clamp(-1, 1)
                x = x.to(torch.float32 if autocast else dtype).requires_grad_()
                with torch.autocast(device.type, dtype, enabled=autocast):
                    output = chain(x)
                assert torch.isfinite(output).all()
                output.float().mean().backward()
                _assert_learning_is_finite(chain, x, x.dtype)


@clause()
def check_autocast(subject: Subject, device: torch.device) -> None:
    """Under bfloat16 autocast results stay close to float32's, and parameters, gradients and buffers stay float32."""
    chain = subject.chain().to(device).train()
    plain = subject.chain().to(device).train()
    for step in range(3):
        x = feature_map(f"x{step}", device=device).requires_grad_()
        with torch.autocast(device.type, torch.bfloat16):
            output = chain(x)
        assert torch.isfinite(output).all()
        expected = plain(x)
        error = rms(output.double() - expected.double()) / rms(expected)
        assert error <= 0.05, "far from the float32 result"
        output.float().sum().backward()
        _assert_learning_is_finite(chain, x, torch.float32)
        for name, buffer in chain.named_buffers():
            assert buffer.dtype == dict(plain.named_buffers())[name].dtype, name


def _assert_learning_is_finite(chain: Chain, x: Tensor, dtype: torch.dtype) -> None:
    """Hold the gradients of the input and of the layer to a dtype, and them and all buffers to finite numbers."""
    for name, tensor in {"the input": x, **dict(chain.layer.named_parameters())}.items():
        assert tensor.grad is not None, f"{name} gets no gradient"
        assert tensor.grad.dtype == dtype, f"the gradient of {name} has {tensor.grad.dtype}"
        assert torch.isfinite(tensor.grad).all(), f"the gradient of {name} is not finite"
    for name, buffer in chain.named_buffers():
        assert torch.isfinite(buffer).all(), f"{name} is not finite"


@clause(has_state)
def check_scores_of_half_inputs_are_float32(subject: Subject, device: torch.device) -> None:
    """Numbers that travel in a state are float32; for maps in bfloat16 they may be rounded to it, once."""
    for dtype in (torch.bfloat16, torch.float16):
        chain = subject.chain().to(device, dtype).eval()
        state = chain.state(20 * feature_map("x", dtype=dtype, device=device))
        floats = [leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        assert floats, "a state without weights"
        for tensor in floats:
            allowed = {torch.float32, torch.bfloat16} if dtype == torch.bfloat16 else {torch.float32}
            assert tensor.dtype in allowed, f"the state holds {tensor.dtype}"


@clause()
def check_copies_go_on_alike(subject: Subject, device: torch.device) -> None:
    """A deepcopy, a pickled copy and fresh layers with the state_dict evaluate and train on, all bit-equal.

    The state_dict goes through a file of torch's, read as data, and through safetensors if that is installed.
    """
    chain = subject.chain().to(device)
    train(chain, device)
    file = io.BytesIO()
    torch.save(chain.state_dict(), file)
    file.seek(0)
    fresh = subject.chain().to(device)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    copies = [copy.deepcopy(chain), pickle.loads(pickle.dumps(chain)), fresh]  # noqa: S301  our own bytes
    if importlib.util.find_spec("safetensors") is not None:
        from safetensors.torch import load, save  # noqa: PLC0415  optional

        copies.append(subject.chain().to(device))
        copies[-1].load_state_dict(load(save({name: v.contiguous() for name, v in chain.state_dict().items()})))
    x = feature_map("x", device=device)
    expected = chain.eval()(x)
    for other in copies:
        assert_bit_equal(other.eval()(x), expected)
    chain.train()
    record = history(chain, chain, device)
    for other in copies:
        other.train()
        assert_same(history(other, other, device), record)


@clause(lambda subject: subject.takes("zero_init"))
def check_zero_init_is_the_identity(subject: Subject, device: torch.device) -> None:
    """To the bit, in training and evaluation; without it the layer does something."""
    x = feature_map("x", device=device)
    for training in (True, False):
        assert_bit_equal(subject.chain(zero_init=True).to(device).train(training)(x), x)
        assert (subject.chain(zero_init=False).to(device).train(training)(x) != x).any()


@clause()
def check_gradients_are_derivatives(subject: Subject, device: torch.device) -> None:
    """Numerical ones, in float64, of the input and of every parameter of the layer."""
    chain = subject.chain(4).double().to(device).eval()
    names = [f"layer.{name}" for name, _ in chain.layer.named_parameters()]
    leaves = [chain.get_parameter(name).detach().clone().requires_grad_() for name in names]
    x = feature_map("x", 1, 4, 2, 3, dtype=torch.float64, device=device).requires_grad_()

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(chain, dict(zip(names, values, strict=True)), (x,))

    torch.autograd.gradcheck(run, (x, *leaves))
