"""Promises are kept by tests, and the page shows what these reached."""

import re
from pathlib import Path

import promises
import pytest

HERE = Path(__file__).resolve().parent


def test_every_promise_has_a_test() -> None:
    marked = {
        number
        for path in HERE.rglob("*.py")
        if path.name not in ("promises.py", Path(__file__).name)
        for number in re.findall(r'"(R\d+)", "', path.read_text(encoding="utf-8"))
    }
    assert marked == set(promises.PROMISES)


def test_the_page_shows_what_a_run_reached(pytester: pytest.Pytester) -> None:
    pytester.makeconftest("")
    pytester.makepyfile(
        """
        import pytest
        pytestmark = pytest.mark.promise("R6", "clusters")

        @pytest.mark.parametrize("number", [3, 1, 2])
        def test_figures(number, record_property):
            for name in ("most", "least of all", "total sum"):
                record_property(name, number)

        def test_that_fails():
            assert False
        """
    )
    page = pytester.path / "page.md"
    command = ["-p", "promises", "-p", "no:cacheprovider", "--promises", str(page)]
    pytester.runpytest_inprocess(*command, "-o", "markers=promise(number, what): a promise")
    text = page.read_text()
    assert "- clusters: 3, **1 failed** (least of all 1, most 3, total sum 6)" in text
    assert text.count("- not run") == len(promises.PROMISES) - 1
    assert "test_that_fails</code>" in text
