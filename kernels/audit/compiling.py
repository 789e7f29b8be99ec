"""Compilation of the shipped kernels without a GPU, and the figures of their machine code.

Each kernel is compiled in a worker process: Triton's compiler can abort, and the audit then loses one kernel. Figures
are cached by a hash of the kernel, its compiler and the files that measure it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import io
import json
import os
import pkgutil
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from queue import Queue
from typing import Any

from triton.backends.compiler import GPUTarget

from ..backend import compiler_versions, version_numbers
from ..checks import HEAD_DIMS
from ..files import cache_folder, write_whole
from ..triton.launch import CompileRequest, KernelSpec, LaunchConfig
from . import machine_code
from .machine_code import ARCHITECTURES, LIMITS, RESERVED_SHARED, occupancy, register_limit

_WARNING = re.compile(r"\((C751\d)\)")
_MEASURING = (Path(__file__), Path(machine_code.__file__))
_MEASURING_HASH = hashlib.sha256(b"".join(path.read_bytes() for path in _MEASURING)).hexdigest()


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
    loop_instructions: int = 0  # this and the next two: of the main loop
    loop_tensor_core: int = 0
    loop_waits: int = 0
    unfenced_writes: int = 0  # this and the next: see `machine_code`
    unfenced_copies: int = 0
    unsafe_operands: int = 0  # register operands of wgmma, if the assembler may overwrite them
    warnings: list[str] | None = None  # the assembler's codes for serialised wgmma, such as `C7515`
    error: str = ""


@dataclass(frozen=True)
class Task:
    """One compilation, picklable: the kernel by module and name; `key` identifies the figures in the cache."""

    module: str
    function: str
    request: CompileRequest
    arch: int
    key: str


@dataclass(frozen=True)
class Form:
    """A variant of a kernel for one architecture and dtype, with its launch configuration."""

    spec: KernelSpec
    variant: Mapping[str, Any]
    arch: int
    dtype: str
    config: LaunchConfig

    @property
    def key(self) -> str:
        """Identity across audits, in which the configuration may change."""
        return (
            f"{self.spec.name} | {describe_variant(self.variant)} | sm_{self.arch} | {self.dtype}"
        )

    @cached_property
    def task(self) -> Task:
        """Compilation of this form; RuntimeError for an interpreted kernel."""
        request = self.spec.request(self.variant, self.dtype, self.arch, self.config)
        kernel, request = request.kernel, replace(request, kernel=None)
        if not hasattr(kernel, "cache_key"):
            raise RuntimeError(
                "kernels are interpreted in this process; unset TRITON_INTERPRET to compile them"
            )
        versions = compiler(), ptxas_version(self.arch)
        name, source = kernel.fn.__qualname__, source_hash(kernel)
        inputs = (source, name, repr(request), self.arch, *versions, _MEASURING_HASH)
        key = hashlib.sha256(repr(inputs).encode()).hexdigest()
        return Task(kernel.fn.__module__, name, request, self.arch, key)

    @property
    def made_of(self) -> str:
        """Short hash of the kernel, its compiler and the files that measure it."""
        return self.task.key[:16]


@dataclass(frozen=True, kw_only=True)
class Row(Figures):
    """The figures of one form."""

    key: str  # of the form
    kernel: str
    variant: str  # `head_dim=64 tail=16`
    config: str
    arch: int
    dtype: str
    shared_limit: int  # of a block
    made_of: str = ""  # of the form

    @property
    def instructions_per_tensor_core(self) -> float | None:
        """Instructions of the main loop per tensor-core instruction."""
        return self.loop_instructions / self.loop_tensor_core if self.loop_tensor_core else None

    @property
    def waits_per_tensor_core(self) -> float | None:
        """Waits in the main loop per HGMMA; 1 where they are serialised, None for other tensor cores."""
        hopper = "HGMMA" in (self.tensor_core or ())
        return self.loop_waits / self.loop_tensor_core if hopper and self.loop_tensor_core else None

    def as_dict(self) -> dict[str, Any]:
        """Return the row for a JSON file."""
        ratios = ("instructions_per_tensor_core", "waits_per_tensor_core")
        return asdict(self) | {name: getattr(self, name) for name in ratios}


def shipped_kernels() -> list[KernelSpec]:
    """Return the kernels of all modules in `kernels/triton`, by name; ValueError for a duplicate name."""
    from .. import triton as family

    kernels: dict[str, KernelSpec] = {}
    for module in sorted(info.name for info in pkgutil.iter_modules(family.__path__)):
        for spec in getattr(importlib.import_module(f"{family.__name__}.{module}"), "KERNELS", ()):
            if kernels.setdefault(spec.name, spec) is not spec:
                raise ValueError(
                    f"two kernels are called {spec.name}; names are keys of tables and must differ"
                )
    return [kernels[name] for name in sorted(kernels)]


def shipped_forms(
    specs: Iterable[KernelSpec],
    arches: Iterable[int] = ARCHITECTURES,
    dtypes: Iterable[str] = ("fp16", "bf16"),
) -> list[Form]:
    """Return all forms of the kernels, with their launch configurations."""
    arches, dtypes = tuple(arches), tuple(dtypes)
    return [
        Form(spec, variant, arch, dtype, spec.config(variant, dtype, arch))
        for spec in specs
        for variant in spec.variants
        for arch in arches
        for dtype in dtypes
        if dtype in spec.dtypes and (not spec.arches or arch in spec.arches)
    ]


def representative(forms: Iterable[Form]) -> list[Form]:
    """Select the forms of the short audit, about a quarter of all.

    In bf16 at head dimension 64, as in the model: every form on Hopper, and each kernel's first on the other
    architectures. On Hopper also the other head dimensions of vision transformers, and the largest, with the most
    registers; bias attention, which the model does not call, at 64 only, since its other sizes compile for minutes. In
    fp16: each kernel's first form, on Ampere, which computes bf16 through fp32.
    """
    selected: list[Form] = []
    seen: set[tuple[str, int, str]] = set()
    for form in forms:
        size = form.variant.get("head_dim", 64)
        group = form.spec.name, form.arch, form.dtype
        if form.arch == 90 and form.dtype == "bf16":
            included = size == 64
            if not form.spec.name.startswith("bias_attention"):
                largest = max(variant.get("head_dim", 64) for variant in form.spec.variants)
                included |= size in (*HEAD_DIMS, largest)
        else:
            first = size == 64 and group not in seen
            included = first and (form.dtype == "bf16" or form.arch == 80)
        if included:
            seen.add(group)
            selected.append(form)
    return selected


def changed(forms: Iterable[Form], accepted: Mapping[str, Mapping[str, Any]]) -> list[Form]:
    """Select the forms whose `made_of` differs from that of the accepted row."""
    return [form for form in forms if accepted.get(form.key, {}).get("made_of") != form.made_of]


def compile_rows(
    forms: Iterable[Form],
    *,
    jobs: int | None = None,
    cache_dir: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Compile forms and return one row each, in order; options as in `compile_all`."""
    forms = list(forms)
    figures = compile_all(
        [form.task for form in forms], jobs=jobs, cache_dir=cache_dir, progress=progress
    )
    return [
        Row(
            **asdict(figures[form.task.key]),
            key=form.key,
            kernel=form.spec.name,
            variant=describe_variant(form.variant),
            config=describe(form.config),
            arch=form.arch,
            dtype=form.dtype,
            shared_limit=LIMITS[form.arch].block_shared,
            made_of=form.made_of,
        )
        for form in forms
    ]


def describe(config: LaunchConfig) -> str:
    """Format a launch configuration: `BLOCK_M=64 BLOCK_N=64 warps=4 stages=2`."""
    return f"{describe_variant(config.tiles)} warps={config.num_warps} stages={config.num_stages}"


def describe_variant(variant: Mapping[str, Any]) -> str:
    """Format a variant: `head_dim=64 tail=16`."""
    return " ".join(f"{name}={value}" for name, value in variant.items())


def compile_all(
    tasks: Iterable[Task],
    *,
    jobs: int | None = None,
    cache_dir: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Figures]:
    """Compile tasks in `jobs` processes (default: one per core) and return their figures by key.

    `progress(done, total)` counts compilations, without the cached ones.
    """
    folder = cache_folder("audit") if cache_dir is None else cache_dir
    unique = {task.key: task for task in tasks}
    results: dict[str, Figures] = {}
    for key in unique:
        # Absent and damaged files are measured again.
        with contextlib.suppress(OSError, ValueError, TypeError):
            results[key] = Figures(**json.loads((folder / f"{key}.json").read_text()))
    missing = [task for key, task in unique.items() if key not in results]
    if not missing:
        return results
    folder.mkdir(parents=True, exist_ok=True)
    count = min(len(missing), jobs or len(os.sched_getaffinity(0)))
    idle: Queue[ProcessPoolExecutor] = Queue()
    with (
        tempfile.TemporaryDirectory(prefix="xfm-audit-") as scratch,
        ThreadPoolExecutor(count) as threads,
    ):

        def new_process() -> ProcessPoolExecutor:
            return ProcessPoolExecutor(1, get_context("spawn"), start, (scratch,))

        def run(task: Task) -> Figures:
            process = idle.get()
            try:
                return process.submit(measure, task).result()
            except BrokenProcessPool as error:
                process = new_process()
                return Figures(error=f"the compiler died: {error}")
            finally:
                idle.put(process)

        for _ in range(count):
            idle.put(new_process())
        try:
            for done, (task, figures) in enumerate(
                zip(missing, threads.map(run, missing), strict=True), 1
            ):
                results[task.key] = figures
                if not figures.error:
                    write_whole(folder / f"{task.key}.json", json.dumps(asdict(figures)).encode())
                if progress is not None:
                    progress(done, len(missing))
        finally:
            threads.shutdown(cancel_futures=True)
            for _ in range(count):
                idle.get().shutdown()
    return results


def start(scratch: str) -> None:
    """Prepare the process: Triton prints the assembler's log and caches in `scratch`."""
    os.environ |= {
        "TRITON_CACHE_DIR": scratch,
        "TRITON_DISABLE_LINE_INFO": "0",
        "TRITON_DUMP_PTXAS_LOG": "1",
    }


def measure(task: Task) -> Figures:
    """Compile a kernel and measure its machine code, or return the compiler's error."""
    try:
        return _measure(task)
    except Exception as error:  # the compiler raises errors of many classes
        return Figures(error=f"{type(error).__name__}: {error}")


def _measure(task: Task) -> Figures:
    import triton
    from triton.compiler import ASTSource

    kernel: Any = importlib.import_module(task.module)
    for name in task.function.split("."):
        kernel = getattr(kernel, name)
    source = ASTSource(kernel, task.request.signature, task.request.constexprs, task.request.attrs)
    options = dict(task.request.options)
    with contextlib.redirect_stdout(io.StringIO()) as log:
        compiled: Any = triton.compile(
            source, target=GPUTarget("cuda", task.arch, 32), options=options
        )
    code, ptx = machine_code.parse(*disassemble(compiled.asm["cubin"])), compiled.asm["ptx"]
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
        loop_waits=machine_code.tensor_waits(loop),
        unfenced_writes=machine_code.unfenced_writes(loop, warps),
        unfenced_copies=machine_code.unfenced_copies(ptx),
        unsafe_operands=machine_code.register_operands(ptx) if overwritten else 0,
        warnings=sorted(set(_WARNING.findall(log.getvalue()))),
    )


def disassemble(cubin: bytes) -> tuple[str, str]:
    """Return the listing and the resource usage of a binary, by the tools that come with Triton."""
    from triton import knobs

    tools: Any = knobs.nvidia
    outputs = []
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        # -ndf skips the analysis of indirect branches, which Triton does not emit.
        for command in ((tools.nvdisasm.path, "-c", "-ndf"), (tools.cuobjdump.path, "-res-usage")):
            process = subprocess.run(
                [*command, file.name], capture_output=True, text=True, check=False
            )
            if process.returncode:
                tool, reason = Path(command[0]).name, process.stderr.strip()[:500]
                raise RuntimeError(f"{tool} failed: {reason}")
            outputs.append(process.stdout)
    return outputs[0], outputs[1]


def source_hash(kernel: Any) -> str:
    """Return Triton's hash of a kernel and its callees, as if each began at line 0: line numbers change no code."""
    pending, seen = [kernel], set[int]()
    while pending:
        function = pending.pop()
        if id(function) not in seen:
            seen.add(id(function))
            if function.starting_line_number:
                function.starting_line_number, function.hash = 0, None
            values = function.fn.__globals__.values()
            pending += [value for value in values if hasattr(value, "starting_line_number")]
    return kernel.cache_key


def compiler() -> str:
    """Return name and version of the compiler, `triton 3.9.0`; figures of two compilers are not comparable."""
    for package in ("triton", "triton-windows", "pytorch-triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"triton {importlib.metadata.version(package)}"
    raise RuntimeError("Triton is not installed; the audit compiles kernels with it")


def ptxas_version(arch: int) -> tuple[int, ...]:
    """Return the version of Triton's assembler for an architecture: (13, 4)."""
    return version_numbers(compiler_versions(arch)[1])


class _AbsentGPU:
    """The driver interface that Triton's compiler needs, for a GPU of an architecture that is absent."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def pretend(arch: int, hook: Callable[..., bool] | None = None) -> Callable[..., Any]:
    """Compile all later launches of this process for an architecture, and launch none.

    The operations take CPU tensors by the backend `triton`. Triton's `jit_cache_hook` becomes `hook`, which returns
    True to skip the compilation. Returns the patched `JITFunction.run`, to be wrapped in its turn.
    """
    from triton import knobs
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from .. import backend
    from .. import triton as family

    driver.set_active(_AbsentGPU(arch))  # pyright: ignore[reportArgumentType]
    # An H100's, with four programs for each multiprocessor.
    programs = 528
    properties = {
        "architecture": lambda device: arch,
        "multiprocessors": lambda device: programs // 4,
        "first_stage_programs": lambda steps, device: max(1, min(steps, programs)),
    }
    for info in pkgutil.iter_modules(family.__path__):
        module = importlib.import_module(f"{family.__name__}.{info.name}")
        for name in properties.keys() & vars(module).keys():
            setattr(module, name, properties[name])
    backend._why_not = lambda name, device, index: None
    launch = JITFunction.run

    def run(kernel: Any, *args: Any, **options: Any) -> Any:
        return launch(kernel, *args, **{**options, "warmup": True})

    JITFunction.run = run  # type: ignore[method-assign]
    if hook is not None:
        knobs.runtime.jit_cache_hook = hook
    return run
