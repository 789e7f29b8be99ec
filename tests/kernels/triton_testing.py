"""How Triton kernels are tested without a GPU: the interpreter, poisoned memory, seeded bugs.

Import this module before anything that imports Triton. `triton.jit` decides when it decorates whether a function is
compiled or interpreted, and Triton's own library is decorated when Triton is imported, so one process can do only one
of the two. Tests that compile start a process of their own with `compiling_environment()`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

os.environ.setdefault("TRITON_INTERPRET", "1")

HAS_TRITON = importlib.util.find_spec("triton") is not None


def interpreted_kernels() -> None:
    """Skips the test module that imports this one where Triton is missing. Runs when this module is imported.

    Raises:
        RuntimeError: Triton was imported as a compiler, so that kernels cannot be interpreted any more.
    """
    if not HAS_TRITON:
        pytest.skip("Triton is not installed", allow_module_level=True)
    if os.environ["TRITON_INTERPRET"] != "1":
        pytest.skip("TRITON_INTERPRET is set to something else than 1", allow_module_level=True)
    import triton
    import triton.language as tl

    if isinstance(tl.cdiv, triton.runtime.JITFunction):
        raise RuntimeError(
            "Triton was imported before TRITON_INTERPRET=1 was set; import tests.kernels.triton_testing first"
        )


interpreted_kernels()


def compiling_environment() -> dict[str, str]:
    """The environment of a subprocess in which Triton compiles instead of interpreting."""
    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)
    }


@contextmanager
def poison() -> Iterator[None]:
    """Within the block, memory that PyTorch leaves uninitialised holds NaN (floats) or garbage (integers).

    Covers `torch.empty`, `empty_like`, `empty_strided`, `new_empty` and `new_empty_strided`, so a kernel that leaves an
    element unwritten, or reads one that nobody wrote, shows it.
    """
    places: list[tuple[Any, str]] = [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ]
    originals = [(place, name, getattr(place, name)) for place, name in places]

    def poisoned(original: Any) -> Any:
        def allocate(*args: Any, **kwargs: Any) -> Tensor:
            return _fill_with_garbage(original(*args, **kwargs))

        return allocate

    for place, name, original in originals:
        setattr(place, name, poisoned(original))
    try:
        yield
    finally:
        for place, name, original in originals:
            setattr(place, name, original)


def _fill_with_garbage(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        if tensor.is_floating_point() or tensor.is_complex():
            return tensor.fill_(torch.nan)
        if tensor.dtype == torch.bool:
            return tensor.fill_(True)
        return tensor.fill_(torch.iinfo(tensor.dtype).max // 3)


@contextmanager
def mutated(file: str, old: str, new: str, folder: Path) -> Iterator[ModuleType]:
    """The package `kernels` with one piece of its source replaced, to show that a test notices the difference.

    Args:
        file: path below `kernels`, such as `"triton/relpos_table.py"`.
        old: text that must occur there; every occurrence is replaced by `new`.
        folder: an empty folder.

    Yields:
        The package; `importlib.import_module(f"{package.__name__}.triton.relpos_attention")` loads a part of it.
    """
    import xfm_fast.kernels

    source = Path(str(xfm_fast.kernels.__file__)).parent
    name = f"mutant_{abs(hash((file, old, new, str(folder))))}"
    root = folder / name
    (root / "triton").mkdir(parents=True)
    for path in (*source.glob("*.py"), *(source / "triton").glob("*.py")):
        shutil.copyfile(path, root / path.relative_to(source))
    text = (root / file).read_text()
    assert old in text, f"{file} does not contain {old!r} any more"
    (root / file).write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location(name, root / "__init__.py", submodule_search_locations=[str(root)])
    with _imported(spec) as package:
        yield package


@contextmanager
def _imported(spec: ModuleSpec | None) -> Iterator[ModuleType]:
    """A module that can be imported within the block: dataclasses look theirs up while they are made."""
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made
    try:
        spec.loader.exec_module(made)
        yield made
    finally:
        for module in [m for m in sys.modules if m == spec.name or m.startswith(f"{spec.name}.")]:
            del sys.modules[module]


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
    with _imported(spec) as copy:
        return copy
