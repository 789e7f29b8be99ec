"""Compiles many kernels at once, in processes of their own, and remembers what it found.

A process for each core, because Triton's compiler may abort: then one compilation is lost and the process replaced.
Binaries are cached under a hash of what is compiled, figures under that and a hash of what reads the machine code:
a better reading needs no compilation.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import importlib.metadata
import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from queue import Queue
from typing import Any

from ..backend import compiler_versions, version_numbers
from ..files import cache_folder, write_whole
from ..triton.launch import CompileRequest


@dataclass(frozen=True)
class Task:
    """One compilation, as data that another process can read: the kernel by its name, not as an object.

    Attributes:
        key: of the binary.
    """

    module: str
    function: str
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attrs: dict[tuple[int, ...], list[list[Any]]]
    options: dict[str, int]
    arch: int
    key: str

    @property
    def figures_key(self) -> str:
        """The key of the figures, which are read from the binary."""
        return _hash(self.key, _source(*_READING))

    @property
    def made_of(self) -> str:
        """A short hash of all that decides a row of the audit: the kernel, its compiler, and this package."""
        return _hash(self.key, _source(*_PACKAGE))[:16]

    @classmethod
    def of(cls, request: CompileRequest, arch: int) -> Task:
        """The compilation of a request for one architecture.

        Raises:
            RuntimeError: Triton was imported as an interpreter, so there is nothing to compile.
        """
        kernel = request.kernel
        if not hasattr(kernel, "cache_key"):
            raise RuntimeError("kernels are interpreted in this process; unset TRITON_INTERPRET to compile them")
        content = (request.signature, _plain(request.constexprs), request.attrs, request.options)
        key = _hash(
            kernel.cache_key,
            kernel.fn.__qualname__,
            repr(content),
            arch,
            compiler(),
            ptxas_version(arch),
            _source(*_COMPILING),
        )
        return cls(
            kernel.fn.__module__, kernel.fn.__qualname__, request.signature, request.constexprs,
            request.attrs, request.options, arch, key,
        )  # fmt: skip


@dataclass(frozen=True)
class Binary:
    """The outcome of one compilation.

    Attributes:
        listing: the disassembly, with encodings and source lines; `resources`: what the binary needs.
        row_lines: source lines that load a value per row, see `sass.row_lines`.
        warnings: codes of the assembler's warnings, such as `C7515`.
        unfenced_copies, unsafe_operands: see `rows.Row`.
    """

    listing: str
    resources: str
    row_lines: list[tuple[str, int]]
    warnings: list[str]
    shared_bytes: int
    tensor_memory: int
    warps: int
    unfenced_copies: int = 0
    unsafe_operands: int = 0


@dataclass(frozen=True)
class Figures:
    """What the binary of one kernel for one architecture shows; `error` is set and all else empty where it failed.

    The fields are those of `rows.Row`.
    """

    registers: int = 0
    stack_bytes: int = 0
    shared_bytes: int = 0
    tensor_memory: int = 0
    warps: int = 0
    occupancy: int = 0
    instructions: int = 0
    tensor_core: dict[str, int] | None = None
    loads: dict[str, int] | None = None
    local_loads: int = 0
    local_stores: int = 0
    loop_instructions: int = 0
    loop_tensor_core: int = 0
    loop_waits: int = 0
    inner_loads: dict[str, int] | None = None
    tile_loads: dict[str, int] | None = None
    staged_tiles: int = 0
    unfenced_writes: int = 0
    unfenced_copies: int = 0
    unsafe_operands: int = 0
    warnings: list[str] | None = None
    error: str = ""


def compiler() -> str:
    """Name and version of what compiles, such as `triton 3.9.0`: figures of two compilers are not comparable."""
    for package in ("triton", "triton-windows", "pytorch-triton"):
        try:
            return f"triton {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    raise RuntimeError("Triton is not installed; the audit compiles kernels with it")


def ptxas_version(arch: int) -> tuple[int, ...]:
    """Of the assembler that Triton takes for an architecture: (13, 4)."""
    return version_numbers(compiler_versions(arch)[1])


def default_cache() -> Path:
    """The folder of cached figures: `$XDG_CACHE_HOME/xfm-fast/audit`."""
    return cache_folder("audit")


def compile_all(
    tasks: Iterable[Task],
    *,
    jobs: int | None = None,
    cache_dir: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Figures]:
    """`figures_key` → figures of every task, each compiled once.

    Args:
        tasks: the compilations; a repeated key is compiled once.
        jobs: processes; by default one for each core.
        cache_dir: where figures are kept from run to run.
        progress: is told how many compilations are done, and of how many, cached ones not counted.
    """
    folder = default_cache() if cache_dir is None else cache_dir
    wanted = {task.figures_key: task for task in tasks}
    found = {key: figures for key in wanted if (figures := _read(folder, key)) is not None}
    missing = [task for key, task in wanted.items() if key not in found]
    if not missing:
        return found
    workers = min(len(missing), jobs or len(os.sched_getaffinity(0)))
    idle: Queue[_Worker] = Queue()
    with tempfile.TemporaryDirectory(prefix="xfm-audit-") as scratch, ThreadPoolExecutor(workers) as threads:
        for number in range(workers):
            idle.put(_Worker(Path(scratch), number, folder))

        def run(task: Task) -> Figures:
            worker = idle.get()
            try:
                return worker.compile(task)
            finally:
                idle.put(worker)

        try:
            for done, (task, figures) in enumerate(zip(missing, threads.map(run, missing), strict=True), 1):
                found[task.figures_key] = figures
                if not figures.error:
                    _write(_place(folder, task.figures_key, "json"), json.dumps(asdict(figures)).encode())
                if progress is not None:
                    progress(done, len(missing))
        finally:
            threads.shutdown(cancel_futures=True)
            for _ in range(workers):
                idle.get().close()
    return found


class _Worker:
    """A compiling process, started when it is first needed and again after it died."""

    def __init__(self, scratch: Path, number: int, folder: Path) -> None:
        self._scratch = scratch
        self._folder = folder
        self._log = scratch / f"worker-{number}.log"
        self._process: subprocess.Popen[str] | None = None

    def compile(self, task: Task) -> Figures:
        process = self._process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(base64.b64encode(pickle.dumps(task)).decode() + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._process = None
            said = self._log.read_text(errors="replace").strip().splitlines()
            return Figures(error=f"the compiler died with exit code {process.wait()}: {' '.join(said[-1:])}")
        return Figures(**json.loads(answer))

    def close(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait()

    def _start(self) -> subprocess.Popen[str]:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
            "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
            "TRITON_CACHE_DIR": str(self._scratch),
            "TRITON_DISABLE_LINE_INFO": "0",
            "TRITON_DUMP_PTXAS_LOG": "1",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", f"{__package__}.worker", str(self._folder)]
        with self._log.open("w") as log:
            return subprocess.Popen(
                command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
            )


def _plain(constexprs: dict[str, Any]) -> dict[str, str]:
    return {name: repr(value) for name, value in constexprs.items()}


_COMPILING = ("worker.py", "sass.py", "hazards.py")
_READING = ("worker.py", "figures.py", "sass.py", "hazards.py", "architectures.py")
_PACKAGE = sorted(path.name for path in Path(__file__).parent.iterdir() if path.suffix == ".py")


def _hash(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@cache
def _source(*names: str) -> str:
    """A hash of files of this package."""
    return hashlib.sha256(b"".join(Path(__file__).with_name(name).read_bytes() for name in names)).hexdigest()


def read_binary(folder: Path, key: str) -> Binary | None:
    """A binary of the cache; none if it is not there, or damaged."""
    try:
        fields = json.loads(gzip.decompress(_place(folder, key, "json.gz").read_bytes()))
        return Binary(**fields | {"row_lines": [tuple(pair) for pair in fields["row_lines"]]})
    except (OSError, EOFError, ValueError, TypeError, KeyError):
        return None


def write_binary(folder: Path, key: str, binary: Binary) -> None:
    """Keeps a binary in the cache."""
    _write(_place(folder, key, "json.gz"), gzip.compress(json.dumps(asdict(binary)).encode(), mtime=0))


def _place(folder: Path, key: str, kind: str) -> Path:
    return folder / key[:2] / f"{key}.{kind}"


def _read(folder: Path, key: str) -> Figures | None:
    try:
        return Figures(**json.loads(_place(folder, key, "json").read_text()))
    except (OSError, ValueError, TypeError):  # absent, or cut short by a full disk
        return None


def _write(place: Path, content: bytes) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    # Two audits may run at once.
    write_whole(place, content)
