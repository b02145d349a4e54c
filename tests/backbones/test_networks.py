"""What every network keeps: any factor, channels and size, and activation checkpointing that changes nothing."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_sr_attn import EDSR, ELAN, RCAN, LCoAN

SHARED: dict[str, Any] = {"every": 1, "share": 2, "zero_init": False}
LCOA: dict[str, Any] = {"type": "LCoA", "num_clusters": 4, "chunk_size": 10, "reduction": 2, **SHARED}
GMSA: dict[str, Any] = {"type": "GMSA", "window_sizes": [2, 3], **SHARED}
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "EDSR with LCoA": partial(EDSR, num_feat=8, num_block=4, attention=LCOA),
    "EDSR with GMSA": partial(EDSR, num_feat=8, num_block=4, attention=GMSA),
    "RCAN": partial(RCAN, num_feat=8, num_group=3, num_block=2, squeeze_factor=4, attention=LCOA),
    "LCoAN": partial(LCoAN, num_feat=8, num_group=3, num_block=1, share=2, chunk_size=10, num_clusters=4),
    "ELAN": partial(ELAN, num_feat=8, num_block=2, share=2, window_sizes=(2, 3, 4)),
}


def image(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("upscale", [2, 3, 4, 8])
@pytest.mark.parametrize("name", NETWORKS)
def test_any_factor_channels_and_size(name: str, upscale: int) -> None:
    for channels, size in ((1, (1, 1)), (3, (7, 5)), (5, (17, 1))):
        output = NETWORKS[name](channels, channels, upscale=upscale)(image(2, channels, *size))
        assert output.shape == (2, channels, upscale * size[0], upscale * size[1])
        assert output.isfinite().all()


@pytest.mark.promise("R19")
@pytest.mark.parametrize("name", NETWORKS)
def test_activation_checkpointing_changes_nothing(name: str) -> None:
    """Weights, gradients, k-means state and BatchNorm statistics stay the same to the bit over three steps."""
    plain, saving = (NETWORKS[name](upscale=2, img_range=1.0, activation_checkpointing=on) for on in (False, True))
    saving.load_state_dict(plain.state_dict())
    runs: Counter[nn.Module] = Counter()
    for model in (plain, saving):
        model.body[1].register_forward_pre_hook(lambda *_, model=model: runs.update([model]))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(3):
            optimizer.zero_grad()
            model(image(2, 3, 6, 7, seed=step)).square().mean().backward()
            optimizer.step()
    assert (runs[plain], runs[saving]) == (3, 6)
    for (key, value), other in zip(plain.state_dict().items(), saving.state_dict().values(), strict=True):
        assert torch.equal(value, other), key
    for (key, one), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), key
    moved = {int(value) for key, value in plain.named_buffers() if key.endswith(("num_updates", "num_batches_tracked"))}
    assert moved == ({2} if "LC" in name or name == "RCAN" else {3})  # the third update of k-means is pending
