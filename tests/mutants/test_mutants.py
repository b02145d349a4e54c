"""The mutation tester draws what it says, changes what it says, and its report is what its results make."""

import ast
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent


def loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutants", HERE / "mutants.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutants"] = module
    spec.loader.exec_module(module)
    return module


mutants = loaded()
RECORD: list[dict[str, Any]] = json.loads(mutants.RECORD.read_text(encoding="utf-8"))
needs_cosmic_ray = pytest.mark.skipif(
    importlib.util.find_spec("cosmic_ray") is None, reason="needs cosmic-ray: pip install 'sparse-sr-attn[mutants]'"
)

SOURCE = '''\
"""A module."""
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    LIMIT = 3


def larger(a: "int | None", b: int = 2, *, strict: bool = True) -> "int | bool":
    if a > b and strict:
        return a + 1
    return b
'''


def tree(folder: Path) -> Path:
    (folder / "sparse_sr_attn/functional").mkdir(parents=True)
    (folder / "integrations").mkdir()
    (folder / "sparse_sr_attn/functional/one.py").write_text(SOURCE)
    (folder / "sparse_sr_attn/two.py").write_text("def f(x: int) -> int:\n    return x - 1\n")
    return folder


def test_the_report_is_generated() -> None:
    """`make mutants` makes it anew."""
    assert mutants.PAGE.read_text(encoding="utf-8") == mutants.page(RECORD)


def test_few_are_excused_and_each_is_there() -> None:
    excused = [result for result in RECORD if mutants.excuse(result)]
    assert len(excused) <= 0.05 * len(RECORD)
    assert {(result["mutant"]["file"], result["change"][1]) for result in excused} == set(mutants.EQUIVALENT)


@pytest.mark.parametrize(
    ("killed", "total", "low", "high"),
    [(0, 10, 0.0, 27.75), (10, 10, 72.25, 100.0), (170, 200, 79.40, 89.28), (1, 2, 9.45, 90.55)],
)
def test_wilson(killed: int, total: int, low: float, high: float) -> None:
    """As tables and other programs give it."""
    assert mutants.wilson(killed, total) == pytest.approx((low, high), abs=0.01)


@needs_cosmic_ray
def test_the_sample_is_seeded_and_python(tmp_path: Path) -> None:
    root = tree(tmp_path)
    once, again, other = (mutants.sample(root, size=6, seed=seed) for seed in (1, 1, 2))
    assert once == again
    assert once != other
    assert {mutant.stratum for mutant in once} == {"functional and layers", "elsewhere"}
    for mutant in once:
        source = (root / mutant.file).read_text()
        changed = mutants.mutated(source, mutant)
        ast.parse(changed)
        before, after = mutants.change(source, changed)
        assert before != after
        assert before == source.splitlines()[mutant.line - 1].strip()


@needs_cosmic_ray
def test_what_never_runs_is_not_changed(tmp_path: Path) -> None:
    """Annotations and what type checkers see; the star of keyword-only options is no multiplication."""
    root = tree(tmp_path)
    found = mutants.sample(root, size=100)
    assert not any(mutant.line == 5 for mutant in found)
    heads = [m for m in found if m.file.endswith("one.py") and m.line == 8]
    assert {mutants.family(mutant.operator) for mutant in heads} == {"NumberReplacer", "ReplaceTrueWithFalse"}


def test_tests_that_reach_a_statement(tmp_path: Path) -> None:
    """The statement's own first; the head of a function by what runs its body."""
    root = tree(tmp_path)
    file = "sparse_sr_attn/functional/one.py"
    report = tmp_path / "report.json"
    tests = [["fast", 0.1], ["slow", 2.0], ["endless", 100.0]]
    report.write_text(json.dumps({"tests": tests, "lines": {file: {"9": [0, 1, 2], "10": [1], "11": [0]}}}))
    reach = mutants.Reach(root, [report])

    def chosen(line: int) -> list[str]:
        found: list[str] = reach.tests(mutants.Mutant(file, line, "core/AddNot", 0, "elsewhere"))
        return found

    assert chosen(10) == ["slow"]
    assert chosen(11) == ["fast"]
    assert chosen(9) == ["fast", "slow"]  # the third would take more than a minute
    assert chosen(8) == ["fast", "slow"]
    assert reach.tests(mutants.Mutant("sparse_sr_attn/two.py", 2, "core/AddNot", 0, "elsewhere")) == []


def test_the_page_counts() -> None:
    def result(status: str, after: str, kind: str | None = None) -> dict[str, Any]:
        mutant = {"file": "sparse_sr_attn/two.py", "line": 2, "stratum": "elsewhere"}
        return {"mutant": mutant, "status": status, "change": ["x - 1", after], "ran": 3} | (
            {"kind": kind} if kind else {}
        )

    results = [
        result("killed", "x + 1", "assertion"),
        result("killed", "x | 1", "timeout"),
        result("survived", "x - 2"),
    ]
    text = mutants.page(results)
    assert "| elsewhere | 3 | 2 | 1 | 0 | 0 | 1 | 0 | 66.7 % | 20.8 to 93.9 % | 70 % |" in text
    assert "| sparse_sr_attn/two.py:2 | `x - 1` | `x - 2` | 3 |  |" in text
    assert "3 were met so far" in text


def test_a_report_of_nothing_leaves_the_record_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record, page = tmp_path / "mutants.json", tmp_path / "mutants.md"
    for file in (record, page):
        file.write_text("kept")
    monkeypatch.setattr(mutants, "RECORD", record)
    monkeypatch.setattr(mutants, "PAGE", page)
    monkeypatch.setattr(sys, "argv", ["mutants.py", "report", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit):
        mutants.main()
    assert "must hold the results of a run, and holds none; the record stays" in capsys.readouterr().err
    assert record.read_text() == page.read_text() == "kept"
