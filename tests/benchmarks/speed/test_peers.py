"""Code from outside: how it is named, built and called, and what is said when that fails."""

from pathlib import Path

import pytest
import torch

from benchmarks.speed.peers import FACTORS, WIDTHS, PeerError, build_peer, label
from sparse_sr_attn.errors import ConfigError

CODE = """
import torch
from torch import nn
import beside


class Attention(nn.Module):
    def __init__(self, channels=64, reduction=4, sizes=(4, 8), name="x"):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)
        self.options = (channels, reduction, sizes, name)

    def forward(self, x):
        return self.conv(x)


class WithLoss(Attention):
    def forward(self, x):
        return self.conv(x), x.mean()


class Fails(nn.Module):
    def forward(self, x):
        raise IndexError("out of range")


class Network(nn.Module):
    def __init__(self, scale=2, channels=3):
        super().__init__()
        self.options = (scale, channels)


def number(channels):
    return channels
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "their_code.py"
    path.write_text(CODE)
    (tmp_path / "beside.py").write_text("x = 1\n")
    return path


def test_it_is_built_and_called(file: Path) -> None:
    """With the number of channels or the factor, and what else is written; the first of several outputs counts."""
    peer = build_peer(f"{file}:Attention:reduction=2,sizes=(1, 2),name='a,b'", WIDTHS, 6)
    assert peer.module.options == (6, 2, (1, 2), "a,b")
    assert peer(torch.zeros(1, 6, 4, 5)).shape == (1, 6, 4, 5)
    assert build_peer(f"{file}:Attention:channels=3", WIDTHS, 6).module.options[0] == 3
    assert build_peer(f"{file}:Network", FACTORS, 4).module.options == (4, 3)
    x = torch.rand(1, 6, 4, 5)
    peer = build_peer(f"{file}:WithLoss", WIDTHS, 6)
    assert torch.equal(peer(x), peer.module.conv(x))
    assert label("a/b.py:Attention:reduction=2") == "b.Attention"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("code.py", "must be FILE.py:Class or FILE.py:Class:name=value"),
        ("nowhere.py:Attention", "there must be a file nowhere.py"),
        ("{file}:Atention", r"must have a class Atention \(it has: Attention, Fails, Network, WithLoss"),
        ("{file}:Attention:reduction=2)+(1", "arguments must be name=value,name=value with values as Python writes"),
        ("{file}:Attention:redution=2", r"Attention\(redution=2, channels=6\) fails: TypeError: .*redution.*takes \("),
        ("{file}:number", "must give a torch.nn.Module, got int"),
        ("{file}:Fails", r":Fails fails on a map of shape \(1, 6, 4, 5\): IndexError: out of range"),
    ],
)
def test_code_that_cannot_be_used_is_explained(spec: str, message: str, file: Path) -> None:
    with pytest.raises((ConfigError, PeerError), match=message):
        build_peer(spec.format(file=file), WIDTHS, 6)(torch.zeros(1, 6, 4, 5))


def test_arguments_are_not_run(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="values as Python writes them"):
        build_peer(f"{file}:Attention:name=open('{tmp_path}/made','w')", WIDTHS, 6)
    assert not (tmp_path / "made").exists()
