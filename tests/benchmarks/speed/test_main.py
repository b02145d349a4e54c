"""`python -m benchmarks.speed` from the command line."""

import json
import sys
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


def test_both_allocators(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.json"
    command = ["--methods", "ShiftConv2d", "--sizes", "8", "--allocators", "--json", str(file), *FAST]
    assert main(command) == 0
    first, second = json.loads(file.read_text())["runs"]
    assert first["environment"]["THP_MEM_ALLOC_ENABLE"] == "not set"
    assert second["environment"]["THP_MEM_ALLOC_ENABLE"] == "1"
    assert first["settings"] == second["settings"]
    assert capfd.readouterr().out.count("| ShiftConv2d | ours | correct") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "0"], "--sizes: must be >= 1, got [0]"),
        (["--embed-dim", "0", "--rounds", "-1"], "--embed-dim: must be >= 1, got 0\n--rounds: must be"),
        (["--methods", "LCoB"], "--methods: no method named 'LCoB'; did you mean 'LCoA'?"),
        (["--networks", "--methods", "LCoA"], "--methods: no method named 'LCoA'; did you mean 'LCoAN'?"),
        (["--peer", "x.py:A"], "--peer: there must be a file x.py, got 'x.py:A'"),
        (["--plot", "a.jpg"], "--plot must end in .png, got a.jpg"),
        (["--device", "tpu"], "--device must be one that torch can use here, got 'tpu'"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--passes", "backward"], "invalid choice: 'backward'"),
    ],
)
def test_a_wrong_command_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_plot_needs_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else object())
    assert main(["--plot", "a.png", *FAST]) == 1
    assert "matplotlib must be installed: python -m pip install matplotlib" in capsys.readouterr().err
