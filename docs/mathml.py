"""A hook of MkDocs: write formulas as MathML, which browsers draw without any script."""

import html
import re
from typing import Any

from latex2mathml.converter import convert


def on_page_content(content: str, **_: Any) -> str:
    r"""Replace the `\(...\)` and `\[...\]` that `pymdownx.arithmatex` marks."""
    return re.sub(
        r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>',
        lambda found: convert(html.unescape(found[2]), display="inline" if found[1] == "span" else "block"),
        content,
        flags=re.DOTALL,
    )
