"""Every library in its turn, whichever this machine runs faster; and Triton kernels interpreted or compiled.

Every test of a module `test_triton_*` exists three times: interpreted, on a machine without a GPU; compiled, marked
`gpu`; and compiled and emulated, in a process with XFM_EMULATE (`test_emulated.py`). bf16, whose sums and products the
interpreter gets wrong, is tested in the last two.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from xfm_fast.errors import InputError
from xfm_fast.kernels.backend import _compiler_fault
from xfm_fast.kernels.cpu import selection
from xfm_fast.kernels.prepared import NotPreparedError

LIBRARIES = (
    "aten",
    "onednn",
    "onednn-packed",
    "onednn+gelu",
    "tiled",
    "exp2",
    "llvm",
    "transposed",
    "eager",
)
_compare = selection._compare
_compared: dict[tuple[str, torch.dtype], selection.Selection] = {}


def compared(operation: str, race: selection.Race, dtype: torch.dtype) -> selection.Selection:
    """What the processor said once about these candidates; one that runs but errs is a failure, not a rejection."""
    key = (operation, dtype)
    if key not in _compared:
        _compared[key] = _compare(operation, race, dtype)
    rejected = _compared[key].rejected
    assert not any("relative error" in reason for reason in rejected.values()), (
        f"{operation}: {rejected}"
    )
    return _compared[key]


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Wherever one of several implementations is chosen, this one is, if it is among them and the processor has it."""

    def forced(operation: str, race: selection.Race, dtype: torch.dtype) -> selection.Selection:
        found = compared(operation, race, dtype)
        usable = [name for name in race.candidates if name not in found.rejected]
        chosen = request.param if request.param in usable else usable[0]
        return selection.Selection(operation, dtype, chosen, found.seconds, found.rejected)

    monkeypatch.setattr(selection, "_compare", forced)
    monkeypatch.setattr(selection, "_selections", {})
    return request.param


def each_library(*names: str) -> pytest.MarkDecorator:
    """A test that runs with each of these libraries."""
    return pytest.mark.parametrize("library", names or LIBRARIES, indirect=True)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Triton tests run interpreted and compiled, or emulated for the architectures in XFM_EMULATE."""
    if metafunc.module.__name__.rpartition(".")[2].startswith("test_triton_"):
        emulated = os.environ.get("XFM_EMULATE", "").split()
        ways = (
            [*emulated]
            if emulated
            else ["interpreted", pytest.param("compiled", marks=pytest.mark.gpu)]
        )
        metafunc.parametrize("execution", ways, indirect=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Skip what this GPU's compilers would get wrong, and what no prepared kernel is there for."""
    try:
        return (yield)
    except (InputError, NotPreparedError) as error:
        fault = _compiler_fault("cuda", 0) if torch.cuda.is_available() else None
        if isinstance(error, NotPreparedError) or (fault is not None and fault in str(error)):
            pytest.skip(str(error))
        raise


@pytest.fixture(autouse=True)
def execution(request: pytest.FixtureRequest) -> Iterator[None]:
    """How the kernels of a Triton test run; nothing for other tests."""
    way = getattr(request, "param", None)
    if way == "interpreted" and os.environ["TRITON_INTERPRET"] != "1":
        pytest.skip(
            "Triton compiles in this process; without a GPU or with TRITON_INTERPRET=1 it interprets"
        )
    if way is not None and way.startswith("sm_"):
        from xfm_fast.kernels.backend import emulating

        with emulating(way):
            yield
        return
    if way != "compiled":
        yield
        return
    if os.environ["TRITON_INTERPRET"] == "1":
        pytest.skip("Triton interprets in this process; unset TRITON_INTERPRET")
    from tests.kernels.triton_testing import compiled_kernels

    with compiled_kernels(torch.device("cuda")):
        yield
