"""The house rules that a program can check: which way imports point, and what no file may hold.

Arrows between the parts of `xfm_fast` point one way,
`cli → reproduce, serve, benchmarks → finetuning, loading, search → training, tasks, export → models → kernels`:
a part imports from lower levels and from beside it, and no two parts import each other.
"""

import ast
import re
import sys
import tokenize
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

from tests.sizes import BUDGET, ROOT, files_of_tests, over_budget, sources, tree

LEVELS = {
    "errors": 0,
    "io": 1,
    "config": 1,
    "memory": 1,
    "kernels": 1,
    "batches": 2,
    "packing": 2,
    "tokenizer": 2,
    "data": 2,
    "checkpoint": 2,
    "models": 3,
    "graphs": 4,
    "objectives": 4,
    "replace": 4,
    "training": 5,
    "tasks": 5,
    "export": 5,
    "finetuning": 6,
    "loading": 6,
    "search": 6,
    "benchmarks": 7,
    "serve": 7,
    "reproduce": 7,
    "cli": 8,
    "__main__": 9,
}
# flash_attn is a backend that is asked for by name.
KERNELS_MAY_IMPORT = sys.stdlib_module_names | {
    "torch",
    "triton",
    "llvmlite",
    "numpy",
    "flash_attn",
    "xfm_fast.kernels",
    "xfm_fast.errors",
}
BANNER = re.compile(r"#\s*([-=#*~_─═])\s*(\1\s*){3,}")
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")


SOURCES = sources()
FILES = [*SOURCES, *files_of_tests()]


def _module(path: Path) -> str:
    """The import name: kernels/ops.py is xfm_fast.kernels.ops, tests/test_x.py is tests.test_x."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] not in ("xfm_fast", "tests"):
        parts = ("xfm_fast", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_module(path) for path in SOURCES}


def _part(module: str) -> str | None:
    """The part of the house that a module is of: `models` for xfm_fast.models.text, none for the package itself."""
    parts = module.split(".")
    if parts[0] != "xfm_fast" or len(parts) == 1:
        return None
    return next((name for name in LEVELS if parts[1] == name or parts[1].startswith(f"{name}_")), parts[1])


def _level(part: str) -> int:
    """A part that the table lacks stands beside the models."""
    return LEVELS.get(part, LEVELS["models"])


def _imports(path: Path) -> Iterator[tuple[str, int]]:
    """Names and lines of all that a file imports, at its head or inside functions, relative imports resolved."""
    module = _module(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            for alias in node.names:
                # `from xfm_fast import kernels` imports a module, `from xfm_fast.errors import InputError` a name.
                inner = f"{base}.{alias.name}"
                yield (inner if inner in MODULES else base), node.lineno


def _within(module: str, packages: set[str] | frozenset[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def test_the_tree_is_seen() -> None:
    assert {"xfm_fast.config", "xfm_fast.kernels"} <= MODULES
    assert len(FILES) == len({path.resolve() for path in FILES})


def test_no_files_import_each_other() -> None:
    """Imports for type checkers and inside functions count; a package's face hands names on and does not."""
    files = {_module(path): path for path in SOURCES if path.name != "__init__.py"}
    graph = {module: {each for each, _ in _imports(path)} & files.keys() - {module} for module, path in files.items()}
    TopologicalSorter(graph).prepare()


def test_arrows_point_one_way() -> None:
    wrong = []
    for path in SOURCES:
        source = _part(_module(path))
        if source is None:
            continue
        for imported, line in _imports(path):
            target = _part(imported)
            if target is None or target == source:
                continue
            if (target == "cli" and source != "__main__") or _level(target) > _level(source):
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {source} imports {imported}")
    assert not wrong, "imports against the arrows:\n" + "\n".join(wrong)


def test_no_two_parts_import_each_other() -> None:
    arrows: dict[str, set[str]] = {}
    for path in SOURCES:
        source = _part(_module(path))
        targets = {_part(imported) for imported, _ in _imports(path)}
        if source is not None:
            arrows.setdefault(source, set()).update(target for target in targets if target not in (None, source))
    mutual = sorted((a, b) for a, targets in arrows.items() for b in targets if a < b and a in arrows.get(b, ()))
    assert not mutual, f"pairs of parts that import each other: {mutual}"


def test_kernels_know_nothing_of_models() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {imported}"
        for path in SOURCES
        if _part(_module(path)) == "kernels"
        for imported, line in _imports(path)
        if not _within(imported, KERNELS_MAY_IMPORT)
    ]
    assert not wrong, "kernels/ may import the standard library, torch, triton, numpy and flash_attn:\n" + "\n".join(
        wrong
    )


def _places(path: Path, lines: Iterator[int]) -> list[str]:
    return [f"{path.relative_to(ROOT)}:{line}" for line in lines]


def test_linked_folders_are_imported_by_their_package_name() -> None:
    """`import kernels` would run the files a second time and register every operator twice."""
    links = ("kernels", "export", "benchmarks")
    wrong = [
        place
        for path in FILES
        for place in _places(path, (line for name, line in _imports(path) if name.split(".")[0] in links))
    ]
    assert not wrong, f"write xfm_fast.kernels: {wrong}"


def test_files_are_named_after_an_idea() -> None:
    assert not {path.stem for path in FILES} & {"utils", "util", "helpers", "misc", "common"}


def test_comments_are_sober() -> None:
    """Neither banners nor to-do notes, for which there are issues."""
    wrong = []
    for path in FILES:
        with tokenize.open(path) as source:
            comments = [t for t in tokenize.generate_tokens(source.readline) if t.type == tokenize.COMMENT]
        found = (t.start[0] for t in comments if BANNER.match(t.string) or UNFINISHED.search(t.string))
        wrong += _places(path, found)
    assert not wrong


def test_torch_load_reads_weights_only() -> None:
    wrong = []
    for path in FILES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                if arguments.get("weights_only") != "True":
                    wrong += _places(path, iter([node.lineno]))
    assert not wrong, "torch.load without weights_only=True runs code from the file"


def test_size_and_language_stay_within_the_budget() -> None:
    assert not list(over_budget())


def test_few_files_have_one_importer() -> None:
    """A file that one other file imports usually belongs into it."""
    importers: dict[str, set[Path]] = {}
    for path in SOURCES:
        for imported, _ in _imports(path):
            if imported in MODULES and path.name != "__init__.py":
                importers.setdefault(imported, set()).add(path)
    single = sorted(module for module, paths in importers.items() if len(paths) == 1)
    assert len(single) <= BUDGET["limits"]["files with one importer"], single
