"""`benchmarks/peers/elan.py` against a small stand-in for the authors' repository, which is not in this project."""

import sys
from pathlib import Path

import pytest
import torch

from benchmarks.speed import __main__ as speed
from benchmarks.speed.peers import PeerError, build_peer

ADAPTER = Path(speed.__file__).parents[1] / "peers" / "elan.py"
BLOCK = """
from timm.models.layers import DropPath, to_2tuple, trunc_normal_
from torch import nn

class GMSA(nn.Module):
    def __init__(self, channels, shifts=4, window_sizes=(4, 8)):
        super().__init__()
        self.given = channels, shifts, window_sizes
    def forward(self, x):
        return 2 * x, []
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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").touch()
    (tmp_path / "models" / "elan_block.py").write_text(BLOCK)
    (tmp_path / "models" / "elan_network.py").write_text(NETWORK)
    return tmp_path


def test_their_network_and_layer(folder: Path) -> None:
    before, path = set(sys.modules), [*sys.path]
    network = build_peer(f"{ADAPTER}:ELAN:folder={str(folder)!r}", ("scale",), 3)
    assert network(torch.rand(1, 3, 4, 5)).shape == (1, 3, 12, 15)
    options = network.module.network.given
    assert (options.m_elan, options.c_elan, options.window_sizes) == (24, 60, [4, 8, 16])
    layer = build_peer(f"{ADAPTER}:GMSA:folder={str(folder)!r},shift=True", ("channels",), 10)
    assert layer.module.layer.given == (10, 1, [4, 8, 16])
    x = torch.rand(1, 10, 8, 8)
    assert torch.equal(layer(x), 3 * x)
    assert sys.path == path
    assert not [name for name in set(sys.modules) - before if name.startswith(("models", "timm"))]


def test_a_wrong_folder(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="folder must hold models/elan_block.py"):
        build_peer(f"{ADAPTER}:ELAN:folder={str(tmp_path)!r}", ("scale",), 2)
