"""Whole networks compile without a break, once for all sizes, and export with dynamic ones."""

import copy
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from sparse_sr_attn import EDSR, ELAN, RCAN, LCoAN

LCOA = {"type": "LCoA", "every": 2, "share": 2, "chunk_size": 20, "num_clusters": 5, "zero_init": False}

GMSA = {"type": "GMSA", "every": 2, "share": 2, "window_sizes": [2, 3], "zero_init": False}

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "LCoAN": lambda: LCoAN(num_feat=8, num_group=3, num_block=1, chunk_size=20, num_clusters=5),
    "EDSR": lambda: EDSR(num_feat=8, num_block=4, upscale=2, img_range=1.0, attention=LCOA),
    "EDSR, checkpointed": lambda: EDSR(
        num_feat=8, num_block=4, upscale=2, img_range=1.0, attention=LCOA, activation_checkpointing=True
    ),
    "EDSR of patterns, checkpointed": lambda: EDSR(
        num_feat=8,
        num_block=4,
        upscale=2,
        img_range=1.0,
        attention={**LCOA, "reuse": "pattern"},
        activation_checkpointing=True,
    ),
    "RCAN": lambda: RCAN(
        num_feat=8, num_group=4, num_block=1, squeeze_factor=4, upscale=2, img_range=1.0, attention=LCOA
    ),
    "ELAN": lambda: ELAN(num_feat=8, num_block=2, share=2, window_sizes=(2, 4)),
    "EDSR with GMSA": lambda: EDSR(num_feat=8, num_block=4, upscale=2, img_range=1.0, attention=GMSA),
}
SIZES = [(8, 9), (10, 12), (13, 11), (17, 9), (20, 21), (9, 30)]


def picture(size: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(seed))


def each(quick: Collection[str]) -> list[Any]:
    """All networks; those that are not quick belong to the slow tests."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in NETWORKS]


@pytest.mark.promise("R14")
@pytest.mark.unhooked
@pytest.mark.parametrize("training", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("name", each({"LCoAN", "ELAN"}))
def test_one_recompile_for_all_sizes(name: str, training: bool) -> None:
    """fullgraph; six sizes take two compilations (the first is static); outputs, gradients, buffers equal eager's."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = NETWORKS[name]().train(training)
    counter = CompileCounterWithBackend("aot_eager")
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, fullgraph=True, backend=counter)
    for seed, size in enumerate(SIZES):
        expected, actual = eager(picture(size, seed)), compiled(picture(size, seed))
        assert torch.equal(actual, expected), size
        if training:
            expected.mean().backward()
            actual.mean().backward()
    assert counter.frame_count <= 2
    for (key, one), other in zip(eager.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(one, other), key
    for (key, one), other in zip(eager.named_parameters(), twin.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), key
        assert one.grad is None or torch.equal(one.grad, other.grad), key


@pytest.mark.promise("R15")
@pytest.mark.unhooked
@pytest.mark.parametrize("name", each({"LCoAN", "ELAN"}))
def test_exports_with_dynamic_sizes(name: str) -> None:
    """From two chunks on: a program for one chunk is another one, as export sees it."""
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    height, width = torch.export.Dim("height", min=2, max=512), torch.export.Dim("width", min=2, max=512)
    program = torch.export.export(model, (picture((12, 10)),), dynamic_shapes=({2: height, 3: width},))
    exported = program.module()
    for size in [(12, 10), (3, 7), (7, 9), (20, 21)]:
        torch.testing.assert_close(exported(picture(size)), model(picture(size)), rtol=1e-5, atol=1e-5)
