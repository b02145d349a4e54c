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
