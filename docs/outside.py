"""A hook of MkDocs: links to files of the repository that are no page become their text, and README the first page."""

from __future__ import annotations

import re
from typing import Any

_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((\.\./[^)]*)\)")
_COMMENT = re.compile(r"^<!-- .* -->\n", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called with each page; on GitHub these links work, in a site there is nothing that they could lead to."""

    def replaced(link: re.Match[str]) -> str:
        text, target = link.groups()
        return "[README](index.md)" if target == "../README.md" else text

    return _LINK.sub(replaced, _COMMENT.sub("", markdown))
