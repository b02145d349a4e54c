"""The CI workflow runs what cannot be installed in one place, and runs nobody's moving code."""

import re
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.promise("R29")

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
WORKFLOW = yaml.safe_load(TEXT)


def test_actions_are_pinned_by_commit() -> None:
    used = re.findall(r"uses: (\S+)(.*)", TEXT)
    assert used
    for action, comment in used:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", action), action
        assert re.fullmatch(r" # v\d+\.\d+\.\d+", comment), f"{action}: which release is it?"


def test_one_release_has_one_commit() -> None:
    pins = dict(re.findall(r"uses: ([\w./-]+)@([0-9a-f]{40})", TEXT))
    assert set(re.findall(r"uses: ([\w./-]+)@([0-9a-f]{40})", TEXT)) == set(pins.items())


def test_it_can_read_and_no_more() -> None:
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert "pull_request_target" not in TEXT
    assert TEXT.count("persist-credentials: false") == TEXT.count("actions/checkout@")


def test_the_promised_versions_are_there() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    oldest = re.search(r'"torch>=([\d.]+)"', pyproject)
    assert oldest is not None
    matrix = WORKFLOW["jobs"]["test"]["strategy"]["matrix"]
    versions = {*matrix["python"], WORKFLOW["jobs"]["test-3-13"]["steps"][1]["with"]["python-version"]}
    assert versions == {"3.10", "3.11", "3.12", "3.13"}
    assert any(
        case["torch"].startswith(oldest[1]) and case["numpy"].startswith("1.26") and case["python"] == "3.10"
        for case in matrix["include"]
    )


def test_commands_exist() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for target in re.findall(r"run: make ([a-z-]+)", TEXT):
        assert target in targets
    for path in re.findall(r"\btests/\S+", TEXT):
        assert (ROOT / path).exists(), path
