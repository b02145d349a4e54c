"""What ruff's rules S do not look for: weights and states are read as data, and SECURITY.md says so."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.promise("R30")
def test_files_are_read_as_data() -> None:
    calls = [
        (path.relative_to(ROOT), node)
        for folder in ("sparse_sr_attn", "integrations", "demo")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "load_url", "torch.hub.load")
    ]
    assert calls
    for path, call in calls:
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert given.get("weights_only") == "True", f"{path}:{call.lineno}"


@pytest.mark.promise("R30")
def test_the_page_for_reports_is_there() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    for promise in ("weights_only=True", "safetensors", "!!python/object/apply", "privately"):
        assert promise in text
