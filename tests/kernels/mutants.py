"""Copies of kernel modules with a bug put in, to see that the tests notice."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def mutant(module: ModuleType, old: str, new: str, folder: Path) -> Any:
    """The module, imported once more from a copy of its source in which `new` stands for the only `old`.

    The copy is a file because Triton reads the source of a kernel; it lies beside nothing, and imports its neighbours
    by the package of the original.
    """
    assert module.__file__ is not None
    source = Path(module.__file__).read_text()
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in {module.__name__}"
    path = folder / f"mutant_{Path(module.__file__).name}"
    path.write_text(source.replace(old, new))
    name = f"{module.__package__}.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    # Dataclasses and named tuples look their module up while they are made.
    sys.modules[name] = copy
    try:
        spec.loader.exec_module(copy)
    finally:
        del sys.modules[name]
    return copy
