"""What is promised of layers holds for whole networks with attention."""

import copy
import io
import math
import pickle
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from strategies import generator
from tolerances import assert_bit_equal
from torch import Tensor, nn

Build = Callable[[], nn.Module]
SIZES = [(h, w) for h in range(1, 18) for w in range(1, 18)] + [(1, 257), (257, 1), (31, 33), (64, 65)]


def images(name: str, batch: int = 2, height: int = 7, width: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=generator(0, name), dtype=torch.float64).to(dtype)


def train(network: nn.Module, steps: int = 3, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Train a few steps and return all that could differ."""
    optimizer = torch.optim.Adam(network.train().parameters(), lr=1e-3)
    record: dict[str, Tensor] = {}
    for step in range(steps):
        output = network(images(f"step {step}", dtype=dtype))
        optimizer.zero_grad()
        (output - images("target", 2, *output.shape[2:], dtype=dtype)).abs().mean().backward()
        record[f"{step}"] = output.detach().clone()
        record |= {f"{step} {name}": p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
        optimizer.step()
    return record | {f"after {name}": value.clone() for name, value in network.state_dict().items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.promise("R5")
@pytest.mark.slow
def test_every_size(build_tiny: Build) -> None:
    network = build_tiny().eval()
    factor = network.upscale
    with torch.no_grad():
        for number, (height, width) in enumerate(SIZES):
            x = images("x", 1 + number % 3, height, width)
            output = network(x)
            assert output.shape == (len(x), 3, factor * height, factor * width)
            assert torch.isfinite(output).all(), f"{height}x{width}"


@pytest.mark.promise("R3")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_precisions(build_tiny: Build, dtype: torch.dtype) -> None:
    """Finite in training and evaluation, gradients and buffers too; the output has the input's dtype."""
    network = build_tiny().to(dtype)
    for training in (True, True, False):
        output = network.train(training)(images("x", dtype=dtype))
        assert output.dtype == dtype
        assert torch.isfinite(output).all()
        output.float().mean().backward()
    for name, tensor in [*((n, p.grad) for n, p in network.named_parameters()), *network.named_buffers()]:
        assert tensor is not None, name
        assert torch.isfinite(tensor).all(), name


@pytest.mark.promise("R4")
def test_every_parameter_learns(build_tiny: Build) -> None:
    """After the few steps that layers which start as the identity need."""
    network = build_tiny()
    train(network)
    (network(images("x")) * images("probe", 2, 1, 1)).mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), f"the gradient of {name} is zero"


@pytest.mark.promise("R8")
def test_a_sample_that_is_not_finite_spoils_no_other(build_tiny: Build) -> None:
    network = build_tiny()
    train(network)
    for poison in (float("nan"), float("inf")):
        x = images("x", 3)
        healthy = network.eval()(x)
        x[1, 0, 2, 3] = poison
        sick = network(x)
        for b in (0, 2):
            torch.testing.assert_close(sick[b], healthy[b], rtol=1e-6, atol=1e-6)
        assert not torch.isfinite(sick[1]).all()
        network.train()
        for batch in (x, images("y")):
            network(batch)
            for name, buffer in network.named_buffers():
                assert torch.isfinite(buffer).all(), f"{name} is not finite any more"


@pytest.mark.promise("R9")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
def test_evaluation_does_not_mix_samples(build_tiny: Build, dtype: torch.dtype, tolerance: float) -> None:
    network = build_tiny().to(dtype)
    for _ in range(2):
        network.eval()
        x = images("x", 3, dtype=dtype)
        together = network(x)
        for b in range(3):
            alone = network(x[b : b + 1])[0]
            torch.testing.assert_close(alone, together[b], rtol=tolerance, atol=tolerance)
        train(network, dtype=dtype)


@pytest.mark.promise("R10")
def test_evaluation_moves_nothing(build_tiny: Build) -> None:
    """No parameter, no buffer, and no global random state."""
    network = build_tiny()
    for _ in range(2):
        network.eval()
        before = copy.deepcopy(network.state_dict())
        dice = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index,union-attr]
        network(images("x")).sum().backward()
        with torch.no_grad():
            network(images("y", 1, 5, 9))
        assert_same(network.state_dict(), before)
        assert torch.equal(torch.random.get_rng_state(), dice[0])
        assert random.getstate() == dice[1]
        assert (np.random.get_state()[1] == dice[2]).all()  # type: ignore[index]
        train(network)


@pytest.mark.promise("R11")
def test_two_runs_are_bit_equal(build_tiny: Build) -> None:
    """Ten training steps and an evaluation; the second run under PyTorch's deterministic algorithms, which fill memory
    that nobody wrote to with NaN."""
    runs = []
    for switch in (False, True):
        torch.use_deterministic_algorithms(switch)  # the fixture of all tests sets it back
        network = build_tiny()
        record = train(network, 10)
        record["evaluation"] = network.eval()(images("x"))
        runs.append(record)
    assert_same(*runs)


@pytest.mark.promise("R12")
def test_copies_go_on_alike(build_tiny: Build) -> None:
    """A deepcopy, a pickled copy, and fresh networks with the state_dict of a .pth and of a .safetensors."""
    network = build_tiny()
    train(network)
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    from_torch, from_safetensors = build_tiny(), build_tiny()
    from_torch.load_state_dict(torch.load(file, weights_only=True))
    from_safetensors.load_state_dict(load(save(dict(network.state_dict()))))
    copies = [copy.deepcopy(network), pickle.loads(pickle.dumps(network)), from_torch, from_safetensors]  # noqa: S301
    expected = network.eval()(images("x"))
    for other in copies:
        assert_bit_equal(other.eval()(images("x")), expected)
    record = train(network)
    for other in copies:
        assert_same(train(other), record)


@pytest.mark.promise("R18")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_the_psnr(build_tiny: Build, dtype: torch.dtype) -> None:
    """Of a network that has learnt something: waves, seen at a lower resolution."""
    network = build_tiny()
    factor = network.upscale
    rows = torch.arange(24 * factor).view(-1, 1) / factor
    columns = torch.arange(20 * factor) / factor
    high = torch.stack([0.5 + 0.4 * torch.sin(f * rows + g * columns) for f, g in ((0.5, 0.2), (0.1, 0.7), (0.3, 0.3))])
    high = high[None]
    low = nn.functional.avg_pool2d(high, factor)
    optimizer = torch.optim.Adam(network.train().parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        (network(low) - high).abs().mean().backward()
        optimizer.step()
    network.eval()
    with torch.no_grad():
        plain = psnr(network(low), high)
        with torch.autocast("cpu", dtype):
            low_precision = psnr(network(low).float(), high)
    assert plain > 15, "it has learnt nothing"
    assert abs(plain - low_precision) <= 0.02


def psnr(image: Tensor, expected: Tensor) -> float:
    error = (image.clamp(0, 1) - expected).double().square().mean().item()
    return -10 * math.log10(error)
