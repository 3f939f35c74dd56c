"""What mkdocs.yml hooks in, so that pages written for a git host are also right on the site.

1. Python-Markdown begins a list or a table only after a blank line. Git hosts need none, so it is added.
2. Links that leave docs/ (to a benchmark, a test, the README) become plain text, since the site has no such file. One
   that leads to no file at all stays as it is, and `mkdocs build --strict` reports it.
"""

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1] / "docs"
_ITEM = re.compile(r"(- |\d+\. )")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Called by mkdocs for every page, before it is rendered."""
    return plain_links(with_blank_lines(markdown), (DOCS / page.file.src_uri).parent)


def with_blank_lines(markdown: str) -> str:
    """A blank line before every list and table, and after every fenced block."""
    lines: list[str] = []
    is_fenced, is_list = False, False
    for line in markdown.splitlines():
        before = lines[-1] if lines else ""
        if line.startswith("```"):
            is_fenced = not is_fenced
        elif not is_fenced and before:
            begins_list = _ITEM.match(line) and not is_list
            begins_table = line.startswith("|") and not before.startswith("|")
            if begins_list or begins_table or before.startswith("```") and line:
                lines.append("")
        if not is_fenced:
            is_list = bool(_ITEM.match(line)) or is_list and line.startswith(" ")
        lines.append(line)
    return "\n".join(lines) + "\n"


def plain_links(markdown: str, folder: Path) -> str:
    """The text of links that lead from `folder` to a file outside docs/."""

    def shown(link: re.Match[str]) -> str:
        target = (folder / link["target"].partition("#")[0]).resolve()
        return link["text"] if target.exists() and not target.is_relative_to(DOCS) else link[0]

    return re.sub(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s:]+)\)", shown, markdown)
