"""Reports of results documents, of whichever benchmark: page, picture, terminal, Markdown, and two set side by side."""

from .card import png
from .compare import Changes, compare
from .html import html
from .table import gains, markdown
from .terminal import print_changes, terminal

__all__ = ["Changes", "compare", "gains", "html", "markdown", "png", "print_changes", "terminal"]
