"""The command `sparse-sr`: what it says before any work begins."""

import argparse
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.paper.__main__ import parser as paper_parser
from benchmarks.speed.__main__ import parser as speed_parser
from sparse_sr_attn.cli.main import COMMANDS, _parsers, main


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sparse-sr {importlib.metadata.version('sparse-sr-attn')}\n"


COLD = """
import sys
from sparse_sr_attn.cli.main import main
status = main(sys.argv[1:])
assert "torch" not in sys.modules, "torch was imported"
sys.exit(status)
"""


@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["--version"], 0), (["--help"], 0), (["train", "--help"], 0), ([], 0), (["upscal", "x.png"], 2), (["test"], 2)],
)
def test_what_needs_no_torch_imports_none(arguments: list[str], status: int) -> None:
    done = subprocess.run([sys.executable, "-c", COLD, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr


@pytest.mark.parametrize("arguments", [["--help"], *([command, "--help"] for command in COMMANDS), ["list"]])
def test_help_points_to_no_file_that_the_wheel_lacks(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert out
    assert not re.findall(r"docs/\S*|\S+\.md\)", out)


def command_parsers() -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each command, those of the benchmarks too."""
    found = {"python -m benchmarks.paper": paper_parser(), "python -m benchmarks.speed": speed_parser()}
    return found | {f"sparse-sr {command}": _parsers([command])[1] for command in COMMANDS}


def test_the_help_of_each_command_shows_examples() -> None:
    for command, parser in command_parsers().items():
        assert f"examples:\n  {command}" in parser.format_help()


def test_one_word_means_one_thing_in_all_commands() -> None:
    short = {"--scale": "-s", "--output": "-o", "--weights": "-w"}
    devices = set()
    for command, parser in command_parsers().items():
        for action in parser._actions:
            for option in short.keys() & set(action.option_strings):
                assert short[option] in action.option_strings, (command, option)
            if "--device" in action.option_strings:
                devices.add((action.default, action.help))
    assert len(devices) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tran"], "there is no command 'tran'; did you mean 'train'? (known: train, test, prepare, upscale,"),
        (["test", "-opt", "x.yml", "--auto_resume"], "unrecognized arguments: --auto_resume (known: "),
        (
            ["upscale", "x.png", "--wieghts=a"],
            "unrecognized arguments: --wieghts=a; did you mean '--weights'? (",
        ),
        (["convert", "a", "-o", "b", "c"], "sparse-sr convert: error: unrecognized arguments: c\n"),
        (["export", "a"], "required: -o/--output"),
    ],
)
def test_a_wrong_command_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "test"])
def test_a_missing_option_file(command: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "-opt", "nowhere.yml"]) == 2
    expected = f"sparse-sr: 1 problem in nowhere.yml; nothing was run\n  nowhere.yml: no such option file (in {here})\n"
    assert capsys.readouterr().err == expected
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    "command",
    [
        ["upscale", "photo.png", "--weights"],
        ["evaluate", ".", "--weights"],
        ["inspect", "clusters", "photo.png", "--weights"],
        ["demo", "--weights"],
        ["convert", "-o", "out.pth"],
        ["export", "-o", "out.onnx"],
    ],
    ids=lambda words: str(words[0]),
)
@pytest.mark.parametrize("weights", ["missing.pth", "LCoAN-lite_x2", "."])
def test_missing_weights_are_a_wrong_command_line(
    command: list[str], weights: str, refused: Callable[..., None]
) -> None:
    Image.new("RGB", (16, 16)).save("photo.png")
    refused([*command, weights, "--host", "missing.py:Net"], f"sparse-sr: {weights}: there is no such file")


def _without_basicsr(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys; blocked = ('basicsr', 'yaml', 'torchvision', 'scipy', 'cv2')\n"
        "for name in blocked: sys.modules[name] = None\n"
        f"from sparse_sr_attn.cli.main import main; sys.exit(main({arguments!r}))"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.promise("R23")
def test_without_basicsr_other_commands_work_and_a_training_says_what_to_install() -> None:
    for command, shown in ((["--help"], "train"), (["list", "LCoA"], "num_clusters=128")):
        done = _without_basicsr(command)
        assert done.returncode == 0, done.stderr
        assert shown in done.stdout
    done = _without_basicsr(["train", "-opt", "x.yml"])
    assert done.returncode == 1
    assert done.stderr.startswith("sparse-sr: BasicSR is not installed, but `sparse-sr train` needs it.")
    assert "pip install --no-build-isolation basicsr==1.4.2" in done.stderr
    assert "Traceback" not in done.stderr


def test_other_processes_of_a_distributed_run_are_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["train", "-opt", "nowhere.yml"]) == 2
    assert capsys.readouterr().err == ""
