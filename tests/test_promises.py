"""Promises of `docs/reliability.md` and the tests that are marked with them."""

import re
from pathlib import Path

HERE = Path(__file__).resolve().parent


def test_every_promise_has_a_test() -> None:
    page = (HERE.parent / "docs/reliability.md").read_text(encoding="utf-8")
    files = [path.read_text(encoding="utf-8") for path in HERE.rglob("*.py")]
    promised = re.findall(r"^\| (R\d+) \|", page, re.MULTILINE)
    assert {number for file in files for number in re.findall(r'"(R\d+)"', file)} == set(promised)
