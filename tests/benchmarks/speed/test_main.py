"""`python -m benchmarks.speed` from the command line."""

import json
from pathlib import Path

import pytest

from benchmarks.speed.__main__ import main

FAST = ["--embed-dim", "8", "--chunk-size", "10", "--num-clusters", "4", "--rounds", "1", "--no-validity"]
PEER = """
from torch import nn

class Attention(nn.Module):
    def __init__(self, channels, halve=False):
        super().__init__()
        self.halve = halve
    def forward(self, x):
        return x[..., ::2] if self.halve else x + 1
"""


@pytest.fixture
def peer(tmp_path: Path) -> Path:
    path = tmp_path / "their_code.py"
    path.write_text(PEER)
    return path


def test_tables_figures_and_plot(tmp_path: Path, peer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / "a.json", tmp_path / "a.png", tmp_path / "a.md"]
    outputs = ["--json", str(files[0]), "--plot", str(files[1]), "--markdown", str(files[2])]
    command = ["--methods", "LCoA", "plain-LCoA", "--sizes", "8", "12", "--peer", f"{peer}:Attention"]
    assert main([*command, *FAST, *outputs]) == 0
    text = capsys.readouterr().out
    assert "| LCoA against plain-LCoA | " in text
    assert "| LCoA against their_code.Attention | " in text
    assert "| their_code.Attention | outside | not checked: code from outside | – | – |" in text
    (run,) = json.loads(files[0].read_text())["runs"]
    assert run["settings"]["sizes"] == [8, 12]
    assert run["kinds"] == {"LCoA": "ours", "plain-LCoA": "stand-in", "their_code.Attention": "outside"}
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert files[2].read_text() == text


def test_a_peer_of_another_shape_is_wrong(peer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = f"{peer}:Attention:halve=True"
    assert main(["--methods", "LCoA", "--sizes", "8", "--peer", spec, *FAST]) == 1
    captured = capsys.readouterr()
    assert "| LCoA against their_code.Attention | refused |" in captured.out
    assert "**WRONG**: its shape is (1, 8, 32, 24), not (1, 8, 32, 48)" in captured.out
    assert captured.err == "sparse-sr: wrong output: their_code.Attention\n"
