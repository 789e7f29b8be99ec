"""MkDocs hook: links to repository files that are not pages become plain text."""

from __future__ import annotations

import re
from typing import Any

_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(\.\./[^)]*\)")
_COMMENT = re.compile(r"^<!-- .* -->\n", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page without links out of docs/ and without comments."""
    return _LINK.sub(r"\1", _COMMENT.sub("", markdown))
