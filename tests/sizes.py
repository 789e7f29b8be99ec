"""Size and language of the source against budget.toml; `make sizes` prints both."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUDGET = tomllib.loads((ROOT / "budget.toml").read_text(encoding="utf-8"))
_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises):$", re.MULTILINE)


def sources() -> list[Path]:
    """Every Python file of the package; the links in xfm_fast are not entered."""
    return sorted(
        path
        for folder in ("xfm_fast", "kernels", "export", "benchmarks")
        for path in _python(ROOT / folder)
    )


def files_of_tests() -> list[Path]:
    """Every Python file of the tests."""
    return sorted(_python(ROOT / "tests"))


def folder_of(path: Path) -> str:
    """The folder that a file counts for: `xfm_fast/models`, `kernels/triton`, `tests`."""
    parts = path.relative_to(ROOT).parts[:-1]
    return "tests" if parts[0] == "tests" else "/".join(parts[:2])


def lines_per_folder() -> dict[str, int]:
    """Lines of Python by folder, tests as one."""
    lines: Counter[str] = Counter()
    for path in (*sources(), *files_of_tests()):
        lines[folder_of(path)] += path.read_text(encoding="utf-8").count("\n")
    return dict(sorted(lines.items()))


def figures() -> dict[str, float]:
    """What budget.toml limits under `[limits]`."""
    files, words, total = sources(), Counter[str](), 0
    functions = names = sections = 0
    public = set(re.findall(r"\w+", (ROOT / "docs/api.md").read_text(encoding="utf-8")))
    for path in files:
        total += path.read_text(encoding="utf-8").count("\n")
        for node in ast.walk(tree(path)):
            if not isinstance(
                node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module
            ):
                continue
            text = ast.get_docstring(node) or ""
            words.update(re.findall("[a-z]+", text.lower()))
            if isinstance(node, ast.Module):
                continue
            functions += not isinstance(node, ast.ClassDef)
            names += any(word in BUDGET["words"]["names"] for word in node.name.lower().split("_"))
            sections += bool(_SECTION.search(text)) and node.name not in public
    rare = sum(words[word] for word in BUDGET["words"]["rare"])
    return {
        "source lines": total,
        "source files": len(files),
        "functions per 1,000 lines": round(1000 * functions / total, 1),
        "rare words per 10,000 of docstrings": round(10_000 * rare / words.total(), 1),
        "participle names": names,
        "docstring sections outside docs/api.md": sections,
    }


@cache
def tree(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def over_budget() -> Iterator[str]:
    """What is larger than allowed, or missing from the budget."""
    for name, lines in lines_per_folder().items():
        allowed = BUDGET["lines"].get(name)
        if allowed is None:
            yield f"{name}: {lines} lines and no budget; add it under [lines]"
        elif lines > allowed:
            yield f"{name}: {lines} lines, {lines - allowed} over budget"
    yield from (
        f"{n}: {v}, allowed {BUDGET['limits'][n]}"
        for n, v in figures().items()
        if v > BUDGET["limits"][n]
    )


def main() -> None:
    """Print lines per folder with the budget and the change since the last tag, then the other figures."""
    since = _git("describe", "--tags", "--abbrev=0").strip()
    changes = Counter[str]()
    if since:
        for line in _git("diff", "--numstat", since, "--", "*.py").splitlines():
            added, removed, name = line.split("\t")
            changes[folder_of(ROOT / name)] += int(added) - int(removed)
    print(f"{'folder':24} {'lines':>7} {'budget':>7}" + (f"  since {since}" if since else ""))
    for name, lines in lines_per_folder().items():
        print(
            f"{name:24} {lines:7,} {BUDGET['lines'].get(name, 0):7,}"
            + (f"  {changes[name]:+,}" if since else "")
        )
    for name, value in figures().items():
        print(f"{name}: {value:,} (≤ {BUDGET['limits'][name]:,})")


def _git(*words: str) -> str:
    return subprocess.run(
        ["git", *words], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout


def _python(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


if __name__ == "__main__":
    main()
