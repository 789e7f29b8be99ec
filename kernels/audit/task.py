"""One compilation: its key, its figures, and the measurement of its machine code in a process of its own."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import io
import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..backend import compiler_versions, version_numbers
from ..triton.launch import CompileRequest
from . import hazards, sass
from .architectures import RESERVED_SHARED, occupancy, register_limit

_WARNING = re.compile(r"\((C751\d)\)")
_MEASURING = [Path(__file__).with_name(f"{name}.py") for name in ("architectures", "hazards", "sass", "task")]
_MEASURING_HASH = hashlib.sha256(b"".join(path.read_bytes() for path in _MEASURING)).hexdigest()


@dataclass(frozen=True)
class Task:
    """One compilation, picklable: the kernel by module and name; `key` identifies the figures in the cache."""

    module: str
    function: str
    request: CompileRequest
    arch: int
    key: str

    @classmethod
    def of(cls, request: CompileRequest, arch: int) -> Task:
        """The compilation of a request for one architecture; RuntimeError for an interpreted kernel."""
        kernel, request = request.kernel, replace(request, kernel=None)
        if not hasattr(kernel, "cache_key"):
            raise RuntimeError("kernels are interpreted in this process; unset TRITON_INTERPRET to compile them")
        versions = compiler(), ptxas_version(arch)
        parts = (source_hash(kernel), kernel.fn.__qualname__, repr(request), arch, *versions, _MEASURING_HASH)
        key = hashlib.sha256(repr(parts).encode()).hexdigest()
        return cls(kernel.fn.__module__, kernel.fn.__qualname__, request, arch, key)


def source_hash(kernel: Any) -> str:
    """Triton's hash of a kernel and of all that it calls, as if each began at line 0: its place changes no code."""
    pending, seen = [kernel], set[int]()
    while pending:
        function = pending.pop()
        if id(function) not in seen:
            seen.add(id(function))
            if function.starting_line_number:
                function.starting_line_number, function.hash = 0, None
            pending += [value for value in function.fn.__globals__.values() if hasattr(value, "starting_line_number")]
    return kernel.cache_key


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Measurements of one kernel's machine code; all empty where `error` is set."""

    registers: int = 0
    register_limit: int = 0  # the maximum at the same occupancy
    stack_bytes: int = 0
    shared_bytes: int = 0  # per block, static and dynamic
    occupancy: int = 0  # blocks per multiprocessor
    instructions: int = 0
    tensor_core: dict[str, int] | None = None  # instructions by opcode
    loop_instructions: int = 0  # of the main loop, as the next two
    loop_tensor_core: int = 0
    loop_waits: int = 0
    unfenced_writes: int = 0  # this and the next: see `hazards`
    unfenced_copies: int = 0
    unsafe_operands: int = 0  # `hazards.register_operands`, if the assembler may overwrite them
    warnings: list[str] | None = None  # the assembler's codes for serialised wgmma, such as `C7515`
    error: str = ""


def compiler() -> str:
    """Name and version of the compiler: `triton 3.9.0`; figures of two compilers are not comparable."""
    for package in ("triton", "triton-windows", "pytorch-triton"):
        try:
            return f"triton {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    raise RuntimeError("Triton is not installed; the audit compiles kernels with it")


def ptxas_version(arch: int) -> tuple[int, ...]:
    """The version of Triton's assembler for an architecture: (13, 4)."""
    return version_numbers(compiler_versions(arch)[1])


def start(scratch: str) -> None:
    """Prepare the process: Triton prints the assembler's log and caches in `scratch`."""
    os.environ |= {"TRITON_CACHE_DIR": scratch, "TRITON_DISABLE_LINE_INFO": "0", "TRITON_DUMP_PTXAS_LOG": "1"}


def measure(task: Task) -> Figures:
    """Compile a kernel and measure its machine code, or return the compiler's error."""
    try:
        return _measure(task)
    except Exception as error:  # the compiler raises errors of many classes
        return Figures(error=f"{type(error).__name__}: {error}")


def _measure(task: Task) -> Figures:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel: Any = importlib.import_module(task.module)
    for name in task.function.split("."):
        kernel = getattr(kernel, name)
    source = ASTSource(kernel, task.request.signature, task.request.constexprs, task.request.attrs)
    options = dict(task.request.options)
    with contextlib.redirect_stdout(io.StringIO()) as log:
        compiled: Any = triton.compile(source, target=GPUTarget("cuda", task.arch, 32), options=options)
    code = sass.parse(*disassemble(compiled.asm["cubin"]))
    loop, warps = code.main_loop, compiled.metadata.num_warps
    # From Hopper on the disassembler counts the driver's reserve as the kernel's.
    static = max(0, code.static_shared_bytes - (RESERVED_SHARED if task.arch >= 90 else 0))
    usage = {
        "registers": code.registers,
        "shared_bytes": static + compiled.metadata.shared,
        "warps": warps,
        "tensor_memory": getattr(compiled.metadata, "tmem_size", 0) or 0,
    }
    opcodes = sorted(i.opcode for i in code.instructions if i.tensor_core)
    overwritten = ptxas_version(task.arch) < (13, 3)
    return Figures(
        registers=code.registers,
        register_limit=register_limit(task.arch, **usage),
        stack_bytes=code.stack_bytes,
        shared_bytes=usage["shared_bytes"],
        occupancy=occupancy(task.arch, **usage),
        instructions=len(code.instructions),
        tensor_core=dict(Counter(opcodes)),
        loop_instructions=len(loop.instructions) if loop else 0,
        loop_tensor_core=loop.tensor_core if loop else 0,
        loop_waits=hazards.tensor_waits(loop),
        unfenced_writes=hazards.unfenced_writes(loop, warps),
        unfenced_copies=hazards.unfenced_copies(compiled.asm["ptx"]),
        unsafe_operands=hazards.register_operands(compiled.asm["ptx"]) if overwritten else 0,
        warnings=sorted(set(_WARNING.findall(log.getvalue()))),
    )


def disassemble(cubin: bytes) -> tuple[str, str]:
    """The listing and the resources of a binary, from the tools that come with Triton."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tools: Any = knobs.nvidia
        # -ndf skips the analysis of indirect branches, which Triton does not emit.
        listing = _output(tools.nvdisasm.path, "-c", "-ndf", file.name)
        return listing, _output(tools.cuobjdump.path, "-res-usage", file.name)


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr.strip()[:500]}")
    return done.stdout
