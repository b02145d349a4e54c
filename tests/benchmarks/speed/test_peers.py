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


class Needs(nn.Module):
    def __init__(self, width, depth):
        super().__init__()


class Fails(nn.Module):
    def forward(self, x):
        raise IndexError("out of range")


class ReturnsNothing(nn.Module):
    def forward(self, x):
        return None


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


def test_the_number_of_channels_is_given(file: Path) -> None:
    peer = build_peer(f"{file}:Attention", WIDTHS, 6)
    assert peer.module.options == (6, 4, (4, 8), "x")
    assert peer(torch.zeros(1, 6, 4, 5)).shape == (1, 6, 4, 5)


def test_arguments(file: Path) -> None:
    peer = build_peer(f"{file}:Attention:reduction=2,sizes=(1, 2),name='a,b'", WIDTHS, 6)
    assert peer.module.options == (6, 2, (1, 2), "a,b")
    assert build_peer(f"{file}:Attention:channels=3", WIDTHS, 6).module.options[0] == 3
    assert build_peer(f"{file}:Network", FACTORS, 4).module.options == (4, 3)


def test_the_first_of_several_outputs_counts(file: Path) -> None:
    x = torch.rand(1, 6, 4, 5)
    peer = build_peer(f"{file}:WithLoss", WIDTHS, 6)
    assert torch.equal(peer(x), peer.module.conv(x))


def test_parameters_are_those_of_the_module(file: Path) -> None:
    peer = build_peer(f"{file}:Attention", WIDTHS, 6).double()
    assert sum(p.numel() for p in peer.parameters()) == 6 * 6 + 6
    assert peer(torch.zeros(1, 6, 2, 2, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("code.py", "must be FILE.py:Class or FILE.py:Class:name=value"),
        ("code:Attention", "must be FILE.py:Class"),
        ("nowhere.py:Attention", "there must be a file nowhere.py"),
        ("{file}:Atention", r"must have a class Atention \(it has: Attention, Fails, Needs, Network, "),
        ("{file}:Attention:3", "arguments must be name=value"),
        ("{file}:Attention:reduction", "arguments must be name=value"),
        ("{file}:Attention:reduction=two", "arguments must be name=value,name=value with values as Python writes them"),
        ("{file}:Attention:reduction=2)+(1", "arguments must be name=value"),
    ],
)
def test_a_wrong_text_is_explained(spec: str, message: str, file: Path) -> None:
    spec = spec.format(file=file)
    with pytest.raises(ConfigError, match=message) as caught:
        build_peer(spec, WIDTHS, 6)
    assert repr(spec) in str(caught.value)


def test_arguments_are_not_run(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="values as Python writes them"):
        build_peer(f"{file}:Attention:name=open('{tmp_path}/made','w')", WIDTHS, 6)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{file}:Attention:redution=2", r"Attention\(redution=2, channels=6\) fails: TypeError: .*redution.*takes \("),
        ("{file}:Needs", r"Needs\(\) fails: TypeError: .*takes \(width, depth\).*Needs:name=value"),
        ("{file}:number", "must give a torch.nn.Module, got int"),
    ],
)
def test_a_class_that_fails_is_explained(spec: str, message: str, file: Path) -> None:
    with pytest.raises(PeerError, match=message):
        build_peer(spec.format(file=file), WIDTHS, 6)


def test_a_file_that_fails_is_explained(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("import surely_not_installed\n")
    with pytest.raises(PeerError, match="broken.py cannot be imported: ModuleNotFoundError: .*surely_not_installed"):
        build_peer(f"{file}:Attention", WIDTHS, 6)


def test_a_module_that_fails_is_explained(file: Path) -> None:
    x = torch.zeros(1, 6, 4, 5)
    with pytest.raises(PeerError, match=r":Fails fails on a map of shape \(1, 6, 4, 5\): IndexError: out of range"):
        build_peer(f"{file}:Fails", WIDTHS, 6)(x)
    with pytest.raises(PeerError, match="must return a tensor, or a tuple that begins with one; got NoneType"):
        build_peer(f"{file}:ReturnsNothing", WIDTHS, 6)(x)


def test_label() -> None:
    assert label("a/b.py:Attention:reduction=2") == "b.Attention"
