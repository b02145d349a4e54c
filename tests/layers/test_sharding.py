"""FSDP2 (`fully_shard`): parameters that are whole only while the module that they were sharded with is called."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed import fsdp

from sparse_sr_attn import EDSR, ELAN, RCAN, LCoAN
from sparse_sr_attn.layers.base import AttentionLayer

pytestmark = [
    pytest.mark.unhooked,  # FSDP changes the types of modules
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view"),  # which nobody writes to
]

LCOA = {"type": "LCoA", "every": 1, "share": 2, "num_clusters": 4, "chunk_size": 8}
NETWORKS: dict[str, Any] = {
    "EDSR": lambda: EDSR(num_feat=8, num_block=2, img_range=1.0, attention=LCOA),
    "RCAN": lambda: RCAN(
        num_feat=8,
        num_group=2,
        num_block=1,
        squeeze_factor=2,
        img_range=1.0,
        attention={"type": "CategoryAttention", "every": 1, "num_clusters": 4, "chunk_size": 8},
    ),
    "LCoAN": lambda: LCoAN(num_feat=8, num_group=2, num_block=1, num_clusters=4, chunk_size=8),
    "ELAN": lambda: ELAN(num_feat=10, num_block=2, share=2, window_sizes=(2, 4), img_range=1.0),
}


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("kind", [nn.Conv2d, AttentionLayer])
@pytest.mark.parametrize("name", NETWORKS)
def test_fully_shard(name: str, kind: type[nn.Module]) -> None:
    """By convolution and by attention layer; a layer's `attend`, which is no forward, must be named."""
    torch.use_deterministic_algorithms(False)  # FSDP's buffers
    torch.manual_seed(0)
    plain = NETWORKS[name]()
    sharded = NETWORKS[name]()
    sharded.load_state_dict(plain.state_dict())
    mesh = distributed.init_device_mesh("cpu", (1,))
    for module in [*sharded.modules()][::-1]:
        if isinstance(module, kind) or module is sharded:
            fsdp.fully_shard(module, mesh=mesh)
        if isinstance(module, AttentionLayer) and module.provides:
            fsdp.register_fsdp_forward_method(module, "attend")
    x = torch.rand(2, 3, 8, 8)
    for _ in range(2):
        for network in (plain, sharded):
            network.zero_grad()
            network(x).square().mean().backward()
    grads = {path: parameter.grad for path, parameter in plain.named_parameters()}
    for path, parameter in sharded.named_parameters():
        torch.testing.assert_close(parameter.grad.full_tensor(), grads[path], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sharded.eval()(x), plain.eval()(x), rtol=1e-5, atol=1e-6)
