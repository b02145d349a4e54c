"""Training in CUDA graphs is training without them. On the CPU, recorded operations of PyTorch stand in for graphs."""

import copy
import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from basicsr.models import build_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparse_sr_attn.errors import ConfigError
from sparse_sr_attn_basicsr.cuda_graph import GraphedForward

Changes = dict[str, Any]


class Recording:
    """Stands in for `torch.cuda.CUDAGraph`: operations on fixed memory, run again without the code that made them."""

    def __init__(self) -> None:
        self.calls: list[tuple[Callable[..., Any], Any, Any, Any]] = []
        self.num_replays = 0

    def replay(self) -> None:
        self.num_replays += 1
        with torch.no_grad():
            for function, args, kwargs, results in self.calls:
                again = tree_leaves(function(*args, **kwargs))
                for old, new in zip(tree_leaves(results), again, strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Recorder(TorchDispatchMode):
    """Stands in for `torch.cuda.graph`."""

    def __init__(self, recording: Recording, **_: object) -> None:
        super().__init__()
        self.recording = recording

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.recording.calls.append((func, args, kwargs or {}, result))
        return result


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    """All graphs that PyTorch captures, on a machine without a GPU."""
    made: list[Recording] = []

    def record() -> Recording:
        made.append(Recording())
        return made[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", record)
    monkeypatch.setattr(torch.cuda, "graph", Recorder)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda.graphs, "graph_pool_handle", lambda: None)
    return made


Build = Callable[..., Any]


@pytest.fixture
def build(options: Callable[..., dict[str, Any]]) -> Build:
    """Build a model; the preflight demands a GPU for `cuda_graph`."""

    def make(changes: Changes, cuda_graph: bool) -> Any:
        opt = options(changes)
        opt["train"]["cuda_graph"] = cuda_graph
        torch.manual_seed(0)
        return build_model(opt)

    return make


def train(model: Any, sides: tuple[int, ...] = (16, 16, 16)) -> dict[str, Any]:
    """Train a step on images of each size; return everything that training changes."""
    for iteration, side in enumerate(sides, start=1):
        low = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(iteration))
        high = nn.functional.interpolate(low, scale_factor=2)
        model.feed_data({"lq": low, "gt": high, "lq_path": ["1.png", "2.png"]})
        model.optimize_parameters(iteration)
    return copy.deepcopy(
        {
            "weights": dict(model.net_g.state_dict()),
            "averaged": dict(model.net_g_ema.state_dict()),
            "optimizer": model.optimizer_g.state_dict(),
            "losses": model.get_current_log(),
        }
    )


def assert_same(one: object, other: object) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"train.one_kmeans_update": True, "train.grad_clip": 0.1},
        {"train.autocast": "bf16", "train.fft_opt": {"type": "FFTLoss"}},
    ],
    ids=["clipped", "bf16"],
)
def test_training_is_the_same_to_the_bit(
    recordings: list[Recording], build: Build, network: dict[str, Any], changes: Changes
) -> None:
    changes = {"network_g": network, **changes}
    expected, found = train(build(changes, cuda_graph=False)), train(build(changes, cuda_graph=True))
    assert [each.num_replays for each in recordings] == [3, 3]  # forward and backward
    assert_same(found, expected)


def test_the_code_of_the_network_runs_only_while_it_is_captured(recordings: list[Recording], build: Build) -> None:
    model, calls = build({}, cuda_graph=True), []
    original = type(model.net_g).forward
    model.net_g.forward = lambda x: calls.append(x) or original(model.net_g, x)
    train(model, sides=(16,))
    num_captured = len(calls)
    train(model, sides=(16, 16))
    assert len(calls) == num_captured > 0


def test_images_of_another_size_run_without(recordings: list[Recording], build: Build) -> None:
    sides = (16, 12, 16)
    expected, found = train(build({}, cuda_graph=False), sides), train(build({}, cuda_graph=True), sides)
    assert [each.num_replays for each in recordings] == [2, 2]
    assert_same(found, expected)


def test_a_second_pass_before_the_backward_runs_without(recordings: list[Recording]) -> None:
    net = nn.Conv2d(3, 3, 3)
    run, images = GraphedForward(net), torch.rand(2, 1, 3, 8, 8)
    for _ in range(2):
        run.begin_step()
        sum(run(each).square().sum() for each in images).backward()
    assert [each.num_replays for each in recordings] == [2, 2]
    found = [weight.grad.clone() for weight in net.parameters()]
    net.zero_grad()
    sum(net(each).square().sum() for each in images).backward()
    torch.testing.assert_close(found, [weight.grad for weight in net.parameters()])


def test_gradients_kept_from_the_last_step_do_not_add_up(recordings: list[Recording]) -> None:
    net = nn.Conv2d(3, 3, 3)
    run, images = GraphedForward(net), torch.rand(1, 3, 8, 8)
    gradients = []
    for _ in range(2):
        run.begin_step()
        for weight in net.parameters():  # as `zero_grad(set_to_none=False)`
            if weight.grad is not None:
                weight.grad.zero_()
        run(images).square().sum().backward()
        gradients.append([weight.grad.clone() for weight in net.parameters()])
    assert_same(*gradients)


def test_random_numbers_are_those_without(recordings: list[Recording]) -> None:
    net, images = nn.Dropout(), torch.ones(1, 3, 8, 8)
    run = GraphedForward(nn.Sequential(nn.Conv2d(3, 3, 3), net))
    torch.manual_seed(1)
    run.begin_step()
    found = run(images) == 0
    torch.manual_seed(1)
    assert torch.equal(found, net(run._net[0](images)) == 0)


def test_validation_and_copies_see_no_graph(recordings: list[Recording], build: Build) -> None:
    model = build({}, cuda_graph=True)
    train(model, sides=(16,))
    replays = [each.num_replays for each in recordings]
    model.test()
    copy.deepcopy(model.net_g)(torch.rand(1, 3, 16, 16))
    assert [each.num_replays for each in recordings] == replays


def test_a_network_that_cannot_be_captured_trains_without(build: Build, caplog: pytest.LogCaptureFixture) -> None:
    """Here PyTorch's own code runs, and finds no GPU."""
    expected = train(build({}, cuda_graph=False))
    with caplog.at_level(logging.WARNING):
        found = train(build({}, cuda_graph=True))
    notes = [each.message for each in caplog.records if "train.cuda_graph" in each.message]
    assert len(notes) == 1
    assert "cannot be captured and runs without" in notes[0]
    assert_same(found, expected)


def test_several_gpus_are_refused(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparse_sr_attn_basicsr.model.SRModel.model_to_device", lambda _, net: nn.DataParallel(net))
    with pytest.raises(ConfigError, match=r"train\.cuda_graph: must be false with several GPUs or processes, got true"):
        build({}, cuda_graph=True)


@pytest.mark.cuda
def test_on_a_gpu(build: Build, network: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    changes = {"network_g": network, "num_gpu": 1}
    expected = train(build(changes, cuda_graph=False))
    torch.testing.assert_close(train(build(changes, cuda_graph=True)), expected, rtol=1e-3, atol=1e-5)
    assert "cannot be captured" not in caplog.text
