"""Adapters of PEFT on the convolutions of attention layers and networks."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparse_sr_attn_basicsr
from sparse_sr_attn import ELAB, ELAN, GMSA, LAYERS, NLSA, CategoryAttention, LCoA, LCoAN
from sparse_sr_attn.testing import conformance

sparse_sr_attn_basicsr.apply()  # a torchvision of another build must not stop PEFT's import
peft = pytest.importorskip("peft")

MODELS: dict[str, Any] = {
    "LCoA": lambda: LCoA(8, num_clusters=3, chunk_size=8),
    "GMSA": lambda: GMSA(8, window_sizes=(2, 4)),
    "ELAB": lambda: ELAB(8, window_sizes=(2, 4), share=2),
    "NLSA": lambda: NLSA(8, chunk_size=8),
    "CategoryAttention": lambda: CategoryAttention(8, num_clusters=3, chunk_size=8),
    "LCoAN": lambda: LCoAN(num_feat=8, num_group=2, num_block=1, num_clusters=3, chunk_size=8),
    "ELAN": lambda: ELAN(num_feat=8, num_block=2, window_sizes=(2, 4)),
}


def targets(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]


def images(model: nn.Module) -> Tensor:
    channels = 3 if hasattr(model, "img_range") else 8
    return torch.rand(2, channels, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rank", [2, 6])
@pytest.mark.parametrize("name", MODELS)
def test_lora(name: str, rank: int) -> None:
    """Every adapter learns; off it is the network as it was, merged it is the network as it is with the adapter on."""
    torch.manual_seed(0)
    model = MODELS[name]().double()
    x = images(model).double()
    before = model.eval()(x).detach()
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets(model), init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    adapted.train()
    (adapted(x) * torch.rand(before.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    trained = {path: p.grad for path, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(targets(MODELS[name]()))
    assert all(grad is not None and grad.any() for grad in trained.values())

    adapted.eval()
    on = adapted(x).detach()
    with adapted.disable_adapter():
        off = adapted(x).detach()
    assert not torch.allclose(on, off)
    merged = adapted.merge_and_unload()(x)
    torch.testing.assert_close(merged, on, rtol=1e-9, atol=1e-9)


def test_every_registered_layer_is_tried() -> None:
    """Layers whose weights are all in convolutions and linear maps, which PEFT can adapt."""
    layers = {subject.entry.name for subject in conformance.subjects(LAYERS) if subject.kind == "layer"}
    assert layers - set(MODELS) == {"ENLA", "HSPA", "NLA"}
