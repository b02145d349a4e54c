"""A range of images that makes raw queries saturate the softmax is warned of, wherever they meet."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sparse_sr_attn import EDSR, RCAN, LCoAN, attach

RAW: dict[str, dict[str, Any]] = {
    "LCoA": {"similarity": "dot"},
    "NLA": {},
    "NLSA": {},
    "HSPA": {},
    "CategoryAttention": {},
}
SMALL: dict[str, Any] = {"num_feat": 8, "num_block": 2}


class TheirEDSR(nn.Module):
    """A network of somebody else that names its range."""

    def __init__(self, **ranges: float) -> None:
        super().__init__()
        vars(self).update(ranges)
        self.head = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self.head(x))


BUILDS: dict[str, Callable[[float, dict[str, Any]], nn.Module]] = {
    "EDSR": lambda r, layer: EDSR(img_range=r, attention={**layer, "every": 1}, **SMALL),
    "RCAN": lambda r, layer: RCAN(img_range=r, attention={**layer, "every": 1}, num_group=1, squeeze_factor=2, **SMALL),
    "blocks": lambda r, layer: EDSR(img_range=r, block=layer, **SMALL),
    "attach": lambda r, layer: attach(TheirEDSR(img_range=r), "body", {**layer, "every": 1}),
    "attach, rgb_range": lambda r, layer: attach(TheirEDSR(rgb_range=r), "body", {**layer, "every": 1}),
}


@pytest.mark.parametrize("name", BUILDS)
def test_raw_queries_at_255(name: str) -> None:
    build = BUILDS[name]
    for layer, options in RAW.items():
        told = f"img_range 255 makes raw queries so long that the softmax of {layer} picks one token"
        with pytest.warns(UserWarning, match=told):
            build(255.0, {"type": layer, **options})
        build(1.0, {"type": layer, **options})


@pytest.mark.parametrize("name", BUILDS)
def test_normalised_queries_have_no_range(name: str) -> None:
    for layer in ("LCoA", "GMSA", "ENLA", "ELAB"):
        BUILDS[name](255.0, {"type": layer})  # warnings are errors


def test_lcoan() -> None:
    with pytest.warns(UserWarning, match="softmax of LCoA picks one token"):
        LCoAN(num_feat=8, num_group=1, num_block=1, img_range=255.0, similarity="dot")
    LCoAN(num_feat=8, num_group=1, num_block=1, img_range=255.0)
