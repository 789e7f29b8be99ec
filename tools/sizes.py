"""Measure the size and language of the source against budget.toml; `make sizes` prints both."""

from __future__ import annotations

import ast
import io
import re
import tokenize
import tomllib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUDGET = tomllib.loads((ROOT / "budget.toml").read_text(encoding="utf-8"))
WIDE = 20
"""Tokens of a line that a reader takes in at once."""
_LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


def sources() -> list[Path]:
    """List the Python files of the package, without the links in xfm_fast."""
    roots = ("xfm_fast", "kernels", "export", "benchmarks")
    return sorted(path for root in roots for path in _python(ROOT / root))


def files_of_tests() -> list[Path]:
    """List the Python files of the tests and of the tools."""
    return sorted([*_python(ROOT / "tests"), *_python(ROOT / "tools")])


@cache
def tree(path: Path) -> ast.Module:
    """Parse a file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def package_of(path: Path) -> str:
    """Return the package whose budget a file counts for: `xfm_fast/models`, `kernels/triton`."""
    return "/".join(path.relative_to(ROOT).parts[:-1][:2])


@cache
def tokens_of_lines(path: Path) -> Counter[int]:
    """Count the tokens of each line of code, without comments and docstrings."""
    docstrings = {
        node.value.lineno
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }
    counts: Counter[int] = Counter()
    text = path.read_text(encoding="utf-8")
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        is_docstring = token.type == tokenize.STRING and token.start[0] in docstrings
        if token.type not in _LAYOUT and not is_docstring:
            counts[token.start[0]] += 1
    return counts


def tokens_of_packages() -> dict[str, int]:
    """Count the tokens of code in each package."""
    counts: Counter[str] = Counter()
    for path in sources():
        counts[package_of(path)] += tokens_of_lines(path).total()
    return dict(sorted(counts.items()))


def figures() -> dict[str, float]:
    """Measure what budget.toml limits under `[limits]`."""
    paths = sources()
    lines = [count for path in paths for count in tokens_of_lines(path).values()]
    names = [name for path in paths for name in _stored_names(tree(path))]
    openings = [word for path in paths for word in _first_words(tree(path))]
    words = BUDGET["words"]
    return {
        "source files": len(paths),
        "tokens per code line": round(sum(lines) / len(lines), 1),
        "lines of more than 20 tokens, percent": _percent([count > WIDE for count in lines]),
        "fmt: skip": sum(path.read_text(encoding="utf-8").count("# fmt: skip") for path in paths),
        "vague names, percent": _percent([name in words["vague"] for name in names]),
        "docstrings that open with an article, percent": _percent(
            [word in words["openings"] for word in openings]
        ),
    }


def over_budget() -> Iterator[str]:
    """Name what exceeds its limit, or has none."""
    slack = 1 + BUDGET["slack"]
    for package, count in tokens_of_packages().items():
        limit = BUDGET["tokens"].get(package)
        if limit is None:
            yield f"{package}: {count} tokens and no budget; add it under [tokens]"
        elif count > limit * slack:
            yield f"{package}: {count} tokens, {count - limit} more than its budget of {limit}"
    for name, value in figures().items():
        if value > BUDGET["limits"][name]:
            yield f"{name}: {value}, allowed {BUDGET['limits'][name]}"


def main() -> None:
    """Print tokens per package and the other figures beside their limits."""
    packages = tokens_of_packages()
    print(f"{'package':24} {'tokens':>8} {'budget':>8}")
    for package, count in packages.items():
        print(f"{package:24} {count:8,} {BUDGET['tokens'].get(package, 0):8,}")
    print(f"{'all':24} {sum(packages.values()):8,} {sum(BUDGET['tokens'].values()):8,}")
    for name, value in figures().items():
        print(f"{name}: {value:,} (≤ {BUDGET['limits'][name]:,})")


def _stored_names(module: ast.Module) -> Iterator[str]:
    """Yield the name of every assigned variable and every parameter."""
    for node in ast.walk(module):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg


def _first_words(module: ast.Module) -> Iterator[str]:
    """Yield the first word of every function's docstring."""
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            match = re.match(r"\W*(\w+)", ast.get_docstring(node) or "")
            if match:
                yield match[1].lower()


def _percent(matches: list[bool]) -> float:
    return round(100 * sum(matches) / len(matches), 1)


def _python(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


if __name__ == "__main__":
    main()
