"""The house rules that a program can check: which way imports point, and what no file may hold.

Arrows between the parts of `xfm_fast` point one way,
`cli → reproduce, serve, benchmarks → finetuning, loading, encoders, search → training, tasks, export → models →
plans → kernels`:
a part imports from lower levels and from beside it, and no two parts import each other.
"""

import ast
import re
import sys
import tokenize
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

from tools.sizes import BUDGET, ROOT, files_of_tests, over_budget, sources, tree

LEVELS = {
    "errors": 0,
    "io": 1,
    "config": 1,
    "memory": 1,
    "kernels": 1,
    "batches": 2,
    "packing": 2,
    "tokenizer": 2,
    "plans": 2,
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
    "encoders": 6,
    "embedding": 6,
    "search": 6,
    "testing": 6,
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
    """Return the import name: xfm_fast.kernels.ops of kernels/ops.py, tests.test_x of tests/test_x.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] not in ("xfm_fast", "tests", "tools"):
        parts = ("xfm_fast", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_module(path) for path in SOURCES}


def _part(module: str) -> str | None:
    """Return the level's name: `models` of xfm_fast.models.text, None of the package itself."""
    parts = module.split(".")
    if parts[0] != "xfm_fast" or len(parts) == 1:
        return None
    return next(
        (name for name in LEVELS if parts[1] == name or parts[1].startswith(f"{name}_")), parts[1]
    )


def _level(part: str) -> int:
    """Return the level in the table, that of the models by default."""
    return LEVELS.get(part, LEVELS["models"])


def _imports(path: Path) -> Iterator[tuple[str, int]]:
    """Yield the absolute name and the line of every import, inside functions too."""
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
    assert {"xfm_fast.config", "xfm_fast.kernels.ops"} <= MODULES
    assert len(FILES) == len({path.resolve() for path in FILES})


def test_no_files_import_each_other() -> None:
    """Imports for type checkers and inside functions count; a package's face hands names on and does not."""
    files = {_module(path): path for path in SOURCES if path.name != "__init__.py"}
    graph = {
        module: {name for name, _ in _imports(path)} & files.keys() - {module}
        for module, path in files.items()
    }
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
            arrows.setdefault(source, set()).update(
                target for target in targets if target not in (None, source)
            )
    mutual = sorted(
        (a, b) for a, targets in arrows.items() for b in targets if a < b and a in arrows.get(b, ())
    )
    assert not mutual, f"pairs of parts that import each other: {mutual}"


def test_kernels_know_nothing_of_models() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {imported}"
        for path in SOURCES
        if _part(_module(path)) == "kernels"
        for imported, line in _imports(path)
        if not _within(imported, KERNELS_MAY_IMPORT)
    ]
    assert not wrong, (
        "kernels/ may import the standard library, torch, triton, numpy and flash_attn:\n"
        + "\n".join(wrong)
    )


def _places(path: Path, lines: Iterator[int]) -> list[str]:
    return [f"{path.relative_to(ROOT)}:{line}" for line in lines]


def test_linked_folders_are_imported_by_their_package_name() -> None:
    """`import kernels` would run the files a second time and register every operator twice."""
    links = ("kernels", "export", "benchmarks")
    wrong = [
        place
        for path in FILES
        for place in _places(
            path, (line for name, line in _imports(path) if name.split(".")[0] in links)
        )
    ]
    assert not wrong, f"write xfm_fast.kernels: {wrong}"


def test_files_are_named_after_an_idea() -> None:
    assert not {path.stem for path in FILES} & {"utils", "util", "helpers", "misc", "common"}


def test_comments_are_sober() -> None:
    """Neither banners nor to-do notes, for which there are issues."""
    wrong = []
    for path in FILES:
        with tokenize.open(path) as source:
            comments = [
                t for t in tokenize.generate_tokens(source.readline) if t.type == tokenize.COMMENT
            ]
        lines = (
            t.start[0] for t in comments if BANNER.match(t.string) or UNFINISHED.search(t.string)
        )
        wrong += _places(path, lines)
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


def test_package_docstrings_name_what_exists() -> None:
    """Names in backticks are modules of the package or identifiers in its files."""
    missing = []
    for path in SOURCES:
        if path.name != "__init__.py":
            continue
        members = [other for other in SOURCES if path.parent in other.parents]
        text = "\n".join(other.read_text(encoding="utf-8") for other in members)
        docstring = ast.get_docstring(tree(path)) or ""
        words = set(re.findall(r"\w+", text.replace(docstring, "")))
        words |= {part for other in members for part in other.with_suffix("").parts}
        for quoted in re.findall(r"`([a-z_]\w*(?:\.\w+)*)`", docstring):
            if not set(quoted.split(".")) <= words:
                missing.append(f"{path.relative_to(ROOT)}: {quoted}")
    assert not missing


def test_few_files_have_one_importer() -> None:
    """A file that one other file imports usually belongs into it."""
    importers: dict[str, set[Path]] = {}
    for path in SOURCES:
        for imported, _ in _imports(path):
            if imported in MODULES and path.name != "__init__.py":
                importers.setdefault(imported, set()).add(path)
    single = sorted(module for module, paths in importers.items() if len(paths) == 1)
    limit = BUDGET["limits"]["files with one importer"]
    message = (
        f'{len(single)}; raise "files with one importer" in budget.toml for an entry of a registry'
    )
    assert len(single) <= limit, f"{message}: {' '.join(single)}"


# Functions that may open by themselves, and what they open.
OPENING = {
    (
        "xfm_fast/training/recipe.py",
        "read_recipe",
    ): "a recipe of the package, which may be an archive",
    ("xfm_fast/finetuning/recipe.py", "_official"): "a table of the package",
}
OPENED_BY_NAME = {"open", "safe_open", "load_file"}
OPENED_BY_METHOD = {
    "open",
    "read_text",
    "read_bytes",
    "memmap",
    "fromfile",
    "loadtxt",
    "genfromtxt",
}
# What is open already, or lies in memory.
OPEN = {"file", "fileobj", "BytesIO"}


def _openings(path: Path) -> Iterator[tuple[str, int]]:
    """Yield the function and line of every call that opens an existing file by its name."""
    functions = [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef)]
    for function, call in ((f, node) for f in functions for node in ast.walk(f)):
        if not isinstance(call, ast.Call):
            continue
        name = ast.unparse(call.func)
        args = [*call.args, *(keyword.value for keyword in call.keywords)]
        method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
        if (
            name not in OPENED_BY_NAME | {"np.load", "torch.load"}
            and method not in OPENED_BY_METHOD
        ):
            continue
        words = {keyword.arg for keyword in call.keywords}
        words.update(word for arg in args for word in _words(arg))
        is_new = any(
            isinstance(arg, ast.Constant) and arg.value in ("w", "wb", "x", "xb") for arg in args
        )
        # An entry of `READERS` has a function of this name.
        if not is_new and not words & OPEN and not name.startswith("READERS["):
            yield function.name, call.lineno


def _words(node: ast.AST) -> Iterator[str]:
    for child in ast.walk(node):
        if isinstance(child, ast.Name):
            yield child.id
        elif isinstance(child, ast.Attribute):
            yield child.attr


def test_foreign_files_are_opened_by_one_function(tmp_path: Path) -> None:
    """Data, recipes, indexes and logs that are read back go through `xfm_fast.io`, which waits for no pipe."""
    parts = {("xfm_fast", part) for part in ("data", "training", "finetuning", "search", "tasks")}
    openings = {
        (path.relative_to(ROOT).as_posix(), function): line
        for path in SOURCES
        if path.relative_to(ROOT).parts[:2] in parts
        for function, line in _openings(path)
    }
    assert {place: line for place, line in openings.items() if place not in OPENING} == {}
    assert openings.keys() == OPENING.keys()


def test_a_file_opened_elsewhere_is_found(tmp_path: Path) -> None:
    calls = [
        "open(path)",
        "path.open('rb')",
        "path.open('a')",
        "path.read_text()",
        "os.open(path, 0)",
        "np.load(path)",
        "np.memmap(path, np.int64)",
        "Image.open(path)",
        "io.open(path, encoding='utf-8')",
        "torch.load(path)",
        "safe_open(path, 'pt')",
        "load_file(path)",
    ]
    allowed = [
        "open_data(path)",
        "read_bytes(path, 10)",
        "path.open('xb')",
        "tarfile.open(fileobj=file)",
        "Image.open(io.BytesIO(data))",
        "np.memmap(file, np.int64)",
    ]
    code = tmp_path / "code.py"
    code.write_text(
        "".join(f"def f{n}(path):\n    return {call}\n" for n, call in enumerate(calls + allowed))
    )
    assert [line // 2 for _, line in _openings(code)] == [n + 1 for n in range(len(calls))]
