"""The page of promises is what its generator makes of a run, has every row, and names tests that exist."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).resolve().parent


def loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("promises", HERE / "promises.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["promises"] = module
    spec.loader.exec_module(module)
    return module


promises = loaded()
NOTES = json.loads(promises.NOTES.read_text(encoding="utf-8"))


def test_the_page_is_generated() -> None:
    """`python tests/reliability/promises.py page` makes it anew."""
    assert promises.PAGE.read_text(encoding="utf-8") == promises.page(NOTES)


def test_every_row_is_there() -> None:
    text = promises.PAGE.read_text(encoding="utf-8")
    assert sorted(row.number for row in promises.ROWS) == sorted(promises.NUMBERS)
    for row in promises.ROWS:
        assert f"## {row.number}: {row.promise}\n" in text


def test_every_row_is_kept_by_tests_that_exist() -> None:
    for row in promises.ROWS:
        assert row.tests, row.number
        assert promises.unknown(row.tests.values()) == []


def test_nothing_that_ran_failed() -> None:
    assert [name for name, note in NOTES["tests"].items() if "failed" in note] == []


def test_every_row_was_run() -> None:
    """At least a part of it; the page says which part was not."""
    for row in promises.ROWS:
        notes = [promises.gathered(NOTES["tests"], pattern) for pattern in row.tests.values()]
        assert any("passed" in note for note in notes), row.number


@pytest.mark.parametrize(
    ("pattern", "nodeid", "meant"),
    [
        ("tests/a.py", "tests/a.py::test_x[1]", True),
        ("tests/a", "tests/a/b.py::test_x", True),
        ("tests/a.py::test_x", "tests/a.py::test_x[1]", True),
        ("tests/a.py::test_x", "tests/a.py::test_xy", False),
        ("tests/a.py::test_x[: any size]", "tests/a.py::test_x[LCoA: any size]", True),
        ("tests/a.py::test_x[: any size]", "tests/a.py::test_x[LCoA: every size]", False),
    ],
)
def test_patterns(pattern: str, nodeid: str, meant: bool) -> None:
    assert promises.matches(pattern, nodeid) is meant


def test_an_unknown_test_is_noticed() -> None:
    known = "tests/reliability/test_page.py::test_an_unknown_test_is_noticed"
    assert promises.unknown([known, f"{known}_not", "tests/nowhere.py"]) == [f"{known}_not", "tests/nowhere.py"]


def test_figures_are_gathered_as_their_names_say() -> None:
    notes = promises.Notes()
    pattern = next(pattern for pattern in promises.ROWS[0].tests.values())
    for number, value in enumerate((3.0, 1.0, 2.0)):
        report = pytest.TestReport(
            f"{pattern}/x.py::test_{number}", ("x.py", 0, ""), {}, "passed", None, "call",
            user_properties=[("most", value), ("least of all", value), ("total", value), ("total sum", value)],
        )  # fmt: skip
        notes.pytest_runtest_logreport(report)
    row = promises.gathered(notes.reached(), pattern)
    assert row["passed"] == 3
    assert row["figures"] == {"least of all": 1.0, "most": 3.0, "total": 3.0, "total sum": 6.0}
