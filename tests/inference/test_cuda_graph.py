"""CUDA graphs, and what makes them possible: in evaluation nothing asks the GPU for a value."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.launches.counter import counted
from sparse_sr_attn import CoA, LCoA, create_model
from sparse_sr_attn.backbones.base import Network
from sparse_sr_attn.errors import BackendError, ShapeError
from sparse_sr_attn.functional import backend as forms
from sparse_sr_attn.functional.backend import Backend
from sparse_sr_attn.inference.cuda_graph import capture_cuda_graph

IMAGES = torch.rand(1, 3, 12, 10)
gpu_forms = pytest.mark.parametrize("form", ["eager", "triton"])


@pytest.fixture
def form(form: Backend, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """The form that attention takes, as on a GPU."""
    monkeypatch.setattr(forms, "_best_backend", lambda _: form)
    return form


@contextmanager
def without_values() -> Iterator[FakeTensorMode]:
    """Tensors that have a shape and no numbers: to ask for one, or for a shape that depends on one, is a failure."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            yield mode
    except (DataDependentOutputException, DynamicOutputShapeException) as problem:
        raise AssertionError(f"a value is asked for: {problem}") from problem


@gpu_forms
@pytest.mark.usefixtures("form")
def test_networks_ask_for_no_value(trained: Network) -> None:
    with without_values() as mode, torch.no_grad():
        output = trained(mode.from_tensor(IMAGES))
    assert output.shape == (1, 3, *(trained.upscale * side for side in IMAGES.shape[-2:]))


@gpu_forms
@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("num_rounds", [1, 2])
def test_layers_ask_for_no_value(num_rounds: int) -> None:
    first, later = LCoA(6, chunk_size=7, num_rounds=num_rounds).eval(), CoA(6).eval()
    with without_values() as mode, torch.no_grad():
        x = mode.from_tensor(torch.rand(1, 6, 5, 4))
        assert first(x).shape == x.shape
        assert later(x, first.attend(x)).shape == x.shape


@gpu_forms
@pytest.mark.usefixtures("form")
def test_networks_ask_for_no_value_in_training(trained: Network) -> None:
    with without_values() as mode:
        trained.train()(mode.from_tensor(IMAGES)).sum().backward()


class CPUReads(TorchDispatchMode):
    """Collects the operators that read a tensor of the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = (value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor))
        if any(tensor.device.type == "cpu" for tensor in tensors):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["LCoAN-light", "ELAN-light", "EDSR-LCoA"])
@pytest.mark.parametrize("training", [True, False])
def test_after_a_warm_up_nothing_is_copied_from_the_cpu(name: str, training: bool) -> None:
    """Inside operators too: a graph cannot contain such copies."""
    net = create_model(name).to("meta").train(training)
    net.register_buffer("mean", net.mean.to("meta"), persistent=False)  # on meta, networks keep it on the CPU
    with CPUReads() as reads, counted():
        for _ in range(2):
            reads.found.clear()
            net(torch.empty(1, 3, 24, 24, device="meta")).sum().backward()
    assert reads.found == []


def test_without_a_gpu_it_is_refused() -> None:
    with pytest.raises(BackendError, match="needs a network and images on a CUDA device, got images on 'cpu'"):
        capture_cuda_graph(LCoA(3).eval(), IMAGES)


@pytest.mark.cuda
def test_a_graph_computes_what_the_network_computes(trained: Network) -> None:
    trained.cuda()
    run = capture_cuda_graph(trained, IMAGES.cuda())
    for seed in range(2):
        images = torch.rand(IMAGES.shape, generator=torch.Generator().manual_seed(seed)).cuda()
        with torch.no_grad():
            torch.testing.assert_close(run(images), trained(images))
    first = run(IMAGES.cuda())
    kept = first.clone()
    run(images)
    assert torch.equal(first, kept), "a later run writes over an earlier result"


@pytest.mark.cuda
def test_a_graph_takes_one_size_and_weights_that_stay(trained: Network) -> None:
    trained.cuda()
    with pytest.raises(BackendError, match=r"got one in training mode; call net.eval\(\)"):
        capture_cuda_graph(trained.train(), IMAGES.cuda())
    run = capture_cuda_graph(trained.eval(), IMAGES.cuda())
    with pytest.raises(ShapeError, match=r"takes images of .*\(1, 3, 12, 10\).*, got .*\(1, 3, 12, 9\)"):
        run(IMAGES[..., :9].cuda())
    trained.cpu()
    with pytest.raises(RuntimeError, match="weights have been moved since the CUDA graph was captured"):
        run(IMAGES.cuda())
