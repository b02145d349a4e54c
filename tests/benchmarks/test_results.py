"""The runs behind docs/benchmarks-cpu.md: commands that `benchmarks.speed` takes, and a file each."""

import shlex

import pytest

from benchmarks.results import __main__ as results
from benchmarks.speed import __main__ as speed
from benchmarks.speed.methods import methods_of


@pytest.mark.parametrize("name", results.RUNS)
def test_commands(name: str) -> None:
    module, *arguments = shlex.split(results.command(name))[2:]
    settings = speed._settings(speed.parser().parse_args(arguments))
    assert module == "benchmarks.speed"
    assert set(settings.methods) <= set(methods_of(settings))
    assert (results.FOLDER.parents[1] / arguments[-1]).is_file()
    for peer in settings.peers:
        assert (results.FOLDER.parents[1] / peer.partition(":")[0]).is_file()


def test_a_name_that_is_not_known(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["results", "lairs"])
    with pytest.raises(SystemExit, match="2"):
        results.main()
    assert "invalid choice: 'lairs'" in capsys.readouterr().err


def test_all_runs_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr("sys.argv", ["results"])
    monkeypatch.setattr(results, "speed", lambda arguments: ran.append(arguments[-1]) or 0)
    assert results.main() == 0
    assert ran == [str(results.FOLDER / f"{name}.md") for name in results.RUNS]
