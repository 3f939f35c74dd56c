"""What mkdocs.yml hooks in: links that leave docs/ become plain text on the site.

In the repository such a link leads to a file (a benchmark, a test, the README) that the site does not have. One that
leads to no file stays as it is, so that `mkdocs build --strict` reports it.
"""

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1] / "docs"


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Called by mkdocs for every page, before it is rendered."""
    folder = (DOCS / page.file.src_uri).parent

    def shown(link: re.Match[str]) -> str:
        target = (folder / link["target"].partition("#")[0]).resolve()
        return link["text"] if target.exists() and not target.is_relative_to(DOCS) else link[0]

    return re.sub(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s:]+)\)", shown, markdown)
