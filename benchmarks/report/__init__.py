"""Reports of a results document of any benchmark: terminal, Markdown, page, picture, and two documents compared."""

from .compare import Changes, compare, print_changes
from .page import html, png, terminal
from .tables import markdown

__all__ = ["Changes", "compare", "html", "markdown", "png", "print_changes", "terminal"]
