"""Hooks of MkDocs: formulas become MathML, which browsers draw without any script, and pictures open in full size."""

import html
import re
from typing import Any

from latex2mathml.converter import convert


def on_page_content(content: str, **_: Any) -> str:
    """Convert the formulas and link the pictures of a page."""
    content = re.sub(
        r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>',
        lambda found: _mathml(html.unescape(found[2]), "inline" if found[1] == "span" else "block"),
        content,
        flags=re.DOTALL,
    )
    return re.sub(r'<p>(<img [^>]*src="([^"]+)"[^>]*>)</p>', r'<p><a href="\2">\1</a></p>', content)


def _mathml(formula: str, display: str) -> str:
    r"""Return a formula as MathML. latex2mathml does not know `\arg`."""
    result = convert(re.sub(r"\\arg\\(max|min)", r"\\operatorname*{arg\1}", formula), display=display)
    if "\\" in result:
        raise ValueError(f"latex2mathml must know all commands in {formula}")
    return result
