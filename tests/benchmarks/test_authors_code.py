"""`benchmarks/peers/` against small stand-ins for the authors' repositories, which are not in this project."""

import sys
from pathlib import Path

import pytest
import torch

from benchmarks.speed import __main__ as speed
from benchmarks.speed.peers import build_peer

PEERS = Path(speed.__file__).parents[1] / "peers"
ELAN, LCOAN = PEERS / "elan.py", PEERS / "lcoan.py"
BLOCK = """
from timm.models.layers import DropPath, to_2tuple, trunc_normal_
from torch import nn

class GMSA(nn.Module):
    def __init__(self, channels, shifts=4, window_sizes=(4, 8), calc_attn=True):
        super().__init__()
        self.given = channels, shifts, window_sizes
        self.calc_attn = calc_attn
    def forward(self, x, weights=None):
        return (2 * x, [3]) if self.calc_attn else (weights[0] * x, weights)
"""
NETWORK = """
from torch import nn
from models.elan_block import GMSA

class ELAN(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.given, self.grow = args, nn.Upsample(scale_factor=args.scale)
    def forward(self, x):
        return self.grow(x)
"""
ATTENTION = """
from torch import nn

class RecurrentNonLocalKmeansAttention(nn.Module):
    def __init__(self, channels, reduction, n_clusters, window_size):
        super().__init__()
        self.given = channels, reduction, n_clusters, window_size
    def forward(self, inputs):
        x, weights, scores, codes = inputs
        return ((2 if weights is None else weights) * x, 3, scores, codes)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").touch()
    (tmp_path / "models" / "elan_block.py").write_text(BLOCK)
    (tmp_path / "models" / "elan_network.py").write_text(NETWORK)
    return tmp_path


def test_their_network_and_layer(folder: Path) -> None:
    before, path = set(sys.modules), [*sys.path]
    network = build_peer(f"{ELAN}:ELAN:folder={str(folder)!r}", ("scale",), 3)
    assert network(torch.rand(1, 3, 4, 5)).shape == (1, 3, 12, 15)
    options = network.module.network.given
    assert (options.m_elan, options.c_elan, options.window_sizes) == (24, 60, [4, 8, 16])
    layer = build_peer(f"{ELAN}:GMSA:folder={str(folder)!r},shift=True", ("channels",), 10)
    assert layer.module.layer.given == (10, 1, [4, 8, 16])
    x = torch.rand(1, 10, 8, 8)
    assert torch.equal(layer(x), 3 * x)
    shared = build_peer(f"{ELAN}:SharedGMSA:folder={str(folder)!r}", ("channels",), 10)
    assert torch.equal(shared(x), 4 * x)
    assert sys.path == path
    assert not [name for name in set(sys.modules) - before if name.startswith(("models", "timm"))]


def test_lcoan(tmp_path: Path) -> None:
    package = tmp_path / "src" / "model"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "kmeans_attention.py").write_text(ATTENTION)
    x = torch.rand(1, 8, 4, 5)
    for name, factor in (("LCoA", 2), ("CoA", 3)):
        layer = build_peer(f"{LCOAN}:{name}:folder={str(tmp_path)!r},chunk_size=4", ("channels",), 8)
        assert layer.module.layer.given == (8, 4, 128, 4)
        assert torch.equal(layer(x), factor * x)
        assert torch.equal(layer(x), factor * x)
