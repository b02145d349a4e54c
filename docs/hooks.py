"""Hooks of MkDocs: formulas become MathML, which browsers draw without any script, and pictures open in full size."""

import html
import posixpath
import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

_NO_TEXT = "pre|code|math|style|script"
_HYPHENATED = r"(?<!\S)(?=\S{1,18}(?!\S))\S+[-–]\S+"


def on_page_content(content: str, page: Page, files: Files, **_: Any) -> str:
    """Convert the formulas, link the pictures, and let links in notebooks lead to pages."""

    def link(found: re.Match[str]) -> str:
        source = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), found[1]))
        target = files.get_file_from_path(source)
        if target is None:
            raise ValueError(f"{page.file.src_uri} links to {found[1]}, which is no page")
        return f'href="{target.url_relative_to(page.file)}{found[2]}"'

    # MkDocs replaces the links of Markdown pages itself.
    content = re.sub(r'href="(?!\w+:)([^"#]+\.(?:md|ipynb))([^"]*)"', link, content)
    content = re.sub(
        r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>',
        lambda found: _mathml(html.unescape(found[2]), "inline" if found[1] == "span" else "block"),
        content,
        flags=re.DOTALL,
    )
    content = re.sub(r'<p>(<img [^>]*src="([^"]+)"[^>]*>)</p>', r'<p><a href="\2">\1</a></p>', content)
    content = content.replace('class="anchor-link"', 'class="headerlink"')  # in notebooks; not part of the heading
    # Long names may break after a dot.
    name = r"(?<=doc-object-name )([^>]*>)([\w.]+)"
    content = re.sub(name, lambda found: found[1] + found[2].replace(".", ".<wbr>"), content)
    # Browsers break lines after hyphens, also within the name of an option, a date or a range.
    content = re.sub(r"<code>(?=(?:[^<&]|&\w+;){1,24}</code>)", '<code class="nobreak">', content)
    parts = re.split(rf"(<(?:{_NO_TEXT})\b.*?</(?:{_NO_TEXT})>|<[^>]*>)", content, flags=re.DOTALL)
    parts[::2] = [re.sub(_HYPHENATED, r'<span class="nobreak">\g<0></span>', text) for text in parts[::2]]
    return "".join(parts)


def _mathml(formula: str, display: str) -> str:
    r"""Return a formula as MathML. latex2mathml does not know `\arg`."""
    result = convert(re.sub(r"\\arg\\(max|min)", r"\\operatorname*{arg\1}", formula), display=display)
    if "\\" in result:
        raise ValueError(f"latex2mathml must know all commands in {formula}")
    return re.sub(r"(<mi>log</mi>)(?=<m)", r'\1<mspace width="0.17em"/>', result)
