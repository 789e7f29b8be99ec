"""Reports of a results document of any benchmark: terminal, Markdown, page, and two documents compared."""

from .compare import Changes, compare, print_changes
from .page import html, terminal
from .tables import markdown, print_chart

__all__ = ["Changes", "compare", "html", "markdown", "print_changes", "print_chart", "terminal"]
