"""Code and options out of the documentation, so that tests run what users read."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page: str, heading: str, language: str) -> list[str]:
    """Return the blocks of a language under a heading."""
    text = (DOCS / page).read_text()
    section = re.search(rf"^## {re.escape(heading)}$(.*?)(^## |\Z)", text, flags=re.DOTALL | re.MULTILINE)
    assert section is not None, heading
    return re.findall(rf"^```{language}\n(.*?)^```", section[1], flags=re.DOTALL | re.MULTILINE)


def recipe(host: str, language: str = "python", number: int = 0) -> str:
    """Return a block of a recipe."""
    code = blocks("recipes.md", host, language)[number]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    return code
