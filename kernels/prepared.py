"""Kernels that a newer Triton compiled elsewhere, for a machine whose own compilers make attention wrong.

`write` fills a folder on any machine. With `XFM_PREPARED_KERNELS=FOLDER` attention runs where `hopper_fault` forbids
it: Triton takes a binary in place of what it compiles from the same source, from an override folder, whose keys it
computes itself. Every kernel is checked before its first launch: one that uses the tensor cores as only Hopper and
Blackwell do runs from the folder or not at all.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from xfm_fast.errors import InputError, UnavailableError

from .backend import compiler_fault, compiler_versions, use_backend
from .files import write_whole

ENVIRONMENT = "XFM_PREPARED_KERNELS"
MANIFEST, _VERSION = "manifest.json", 1
_FAMILY = Path(__file__).resolve().parent / "triton"
_OPTIONS = ("num_warps", "num_ctas", "num_stages", "maxnreg", "enable_fp_fusion")
_ENTRY = re.compile(r"\.entry\s+\w+\s*\(([^)]*)\)")


class NotPreparedError(UnavailableError):
    """A launch that only this machine's compiler has a binary for, which may be wrong."""


@dataclass(frozen=True)
class Launch:
    """A kernel as it was specialised, in values of JSON, and its binary once it is compiled."""

    module: str
    kernel: str
    signature: dict[str, str]
    constants: list[list[Any]]  # [path, value]
    attrs: list[list[Any]]
    options: dict[str, Any]
    file: str = ""
    sha256: str = ""
    shared: int = 0
    parameters: tuple[int, ...] = ()  # bits of each

    @staticmethod
    def of(fn: Any, compile: dict[str, Any]) -> Launch:
        """Return the launch that a hook of Triton is called for."""
        data, function = json.loads(compile["specialization_data"]), fn.jit_function.fn
        constants = zip(data["constant_keys"], data["constant_vals"], strict=True)
        attrs = zip(data["attrs_keys"], data["attrs_vals"], strict=True)
        return Launch(
            module=function.__module__,
            kernel=function.__qualname__,
            signature=data["signature"],
            constants=[list(pair) for pair in constants],
            attrs=[list(pair) for pair in attrs],
            options={name: data["options"].get(name) for name in _OPTIONS},
        )

    @property
    def key(self) -> str:
        """A key of the launch in all versions of Triton, without its options, which an override does not know."""
        attrs = sorted((path, value) for path, value in self.attrs if value)
        constants = sorted(self.constants, key=lambda pair: pair[0])
        identity = (self.module, self.kernel, self.signature, constants, attrs)
        return json.dumps(identity, sort_keys=True)

    @property
    def source(self) -> Any:
        """The source that Triton compiles."""
        from triton.compiler import ASTSource

        kernel = getattr(importlib.import_module(self.module), self.kernel)
        constants = {tuple(path): value for path, value in self.constants}
        attrs = {tuple(path): value for path, value in self.attrs}
        return ASTSource(kernel, self.signature, constants, attrs)


@dataclass(frozen=True)
class Manifest:
    """The contents of a folder of prepared kernels."""

    version: int
    arch: int
    compiler: list[str]  # versions of Triton and ptxas
    sources: str  # hash of the kernels' files
    purposes: dict[str, int]  # launches of each
    launches: list[Launch]

    def __str__(self) -> str:
        triton, ptxas = self.compiler
        return (
            f"{len(self.launches)} kernels for sm_{self.arch} by Triton {triton} and ptxas {ptxas}"
        )


def record(work: Callable[[], object], arch: int) -> list[Launch]:
    """Return the launches of `work` on a GPU that need not be there.

    It runs on CPU tensors, without GEMMs, whose results no launch depends on. The process can be used for nothing else
    afterwards.
    """
    from .audit.compiling import pretend

    launches: dict[str, Launch] = {}

    def ask(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        launch = Launch.of(fn, compile)
        launches[repr(launch)] = launch
        return True

    pretend(arch, ask)
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings(action="ignore"):  # of the override
        for name, first in {"mm": 0, "bmm": 0, "addmm": 1}.items():
            for overload in ("", ".out"):
                library.impl(name + overload, _empty_gemm(first), "CPU", allow_override=True)
    with use_backend("triton"):
        work()
    return [*launches.values()]


def _empty_gemm(first: int) -> Callable[..., torch.Tensor]:
    """Make a GEMM with an empty result, whose factors begin at this operand."""

    def gemm(*operands: torch.Tensor, out: torch.Tensor | None = None, **_: Any) -> torch.Tensor:
        x, y = operands[first : first + 2]
        return x.new_empty(*x.shape[:-1], y.shape[-1]) if out is None else out

    return gemm


def write(
    folder: Path,
    purposes: Mapping[str, Sequence[Launch]],
    arch: int,
    progress: Callable[[str], None] = lambda line: None,
) -> Manifest:
    """Compile the launches of every purpose, and write those on asynchronous tensor cores into the folder.

    Other kernels are right with any compiler. The manifest is written last. InputError if this machine's compilers have
    the faults themselves, or two launches differ in options alone, which an override does not know.
    """
    if fault := compiler_fault(arch):
        raise InputError(f"kernels cannot be prepared with these compilers: {fault}")
    launches: dict[str, Launch] = {}
    for launch in itertools.chain.from_iterable(purposes.values()):
        options = launches.setdefault(launch.key, launch).options
        if options != launch.options:
            raise InputError(
                f"{launch.kernel} is launched with {options} and with {launch.options}"
            )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    for old in folder.glob("*.cubin"):
        old.unlink()
    compiled: list[Launch] = []
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn"), _start) as pool:
        binaries = pool.map(_compile, launches.values(), [arch] * len(launches))
        for index, launch in enumerate(launches.values()):
            cubin, ptx, shared = next(binaries)
            name = f"{index:03d}-{launch.module.rpartition('.')[2]}-{launch.kernel}.cubin"
            progress(f"{index + 1} of {len(launches)}: {name}, {len(cubin) >> 10} KiB")
            if _is_asynchronous(ptx):
                write_whole(folder / name, cubin)
                launch = replace(launch, file=name, shared=shared, parameters=_parameters(ptx))
                compiled.append(replace(launch, sha256=hashlib.sha256(cubin).hexdigest()))
    manifest = Manifest(
        version=_VERSION,
        arch=arch,
        compiler=[*compiler_versions(arch)],
        sources=_sources(),
        purposes={purpose: len(launches) for purpose, launches in purposes.items()},
        launches=compiled,
    )
    write_whole(folder / MANIFEST, (json.dumps(asdict(manifest), indent=1) + "\n").encode())
    return manifest


def _sources() -> str:
    """Hash the files of all Triton kernels: an edit of any may change a binary or a launch."""
    digest = hashlib.sha256()
    for path in sorted(_FAMILY.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _start() -> None:
    # Line tables are half of a binary.
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"


def _compile(launch: Launch, arch: int) -> tuple[bytes, str, int]:
    import triton
    from triton.backends.compiler import GPUTarget

    options = {name: value for name, value in launch.options.items() if value is not None}
    compiled: Any = triton.compile(
        launch.source, target=GPUTarget("cuda", arch, 32), options=options
    )
    return compiled.asm["cubin"], compiled.asm["ptx"], compiled.metadata.shared


def _is_asynchronous(ptx: str) -> bool:
    """Return whether a kernel has instructions whose operands a faulty compiler does not protect."""
    return "wgmma" in ptx or "tcgen05" in ptx


def _parameters(ptx: str) -> tuple[int, ...]:
    """Return the bits of each parameter."""
    entry = _ENTRY.search(ptx)
    if entry is None:
        return ()
    return tuple(int(bits) for bits in re.findall(r"\.param\s+\.[a-z]+(\d+)", entry[1]))


def read(folder: Path, arch: int) -> Manifest:
    """Read and check a folder; InputError if it is damaged, or of another GPU or other sources."""
    again = "prepare it again with python3 -m xfm_fast.benchmarks.device --prepare"
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
        if content["version"] != _VERSION:
            raise InputError(
                f"{folder} has version {content['version']!r} and this code reads {_VERSION}; {again}"
            )
        launches = [
            Launch(**{**launch, "parameters": tuple(launch["parameters"])})
            for launch in content["launches"]
        ]
        manifest = Manifest(**{**content, "launches": launches})
    except OSError as error:
        raise InputError(
            f"{folder / MANIFEST} cannot be read ({error.strerror}); {again}"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder / MANIFEST} is damaged ({error!r:.200}); {again}") from None
    if manifest.arch != arch:
        raise InputError(f"{folder} is for sm_{manifest.arch} and the GPU is sm_{arch}; {again}")
    if manifest.sources != _sources():
        raise InputError(
            f"files in {_FAMILY} differ from those that {folder} was prepared from; {again}"
        )
    for launch in manifest.launches:
        content, inside = b"", launch.file == Path(launch.file).name
        with suppress(OSError):
            content = (folder / launch.file).read_bytes() if inside else b""
        if hashlib.sha256(content).hexdigest() != launch.sha256:
            raise InputError(f"{folder / launch.file} is missing or damaged; {again}")
    return manifest


@cache
def why_not(arch: int) -> str | None:
    """Install the folder of the environment; return the reason why that is impossible, or None."""
    try:
        install(Path(os.environ[ENVIRONMENT]), arch)
    except InputError as error:
        return str(error)
    return None


def install(folder: Path, arch: int) -> Manifest:
    """Let Triton take the binaries of a folder in this process, and check all launches of our kernels."""
    from triton import knobs

    runtime: Any = knobs.runtime
    manifest = read(folder, arch)
    if not hasattr(runtime, "jit_post_compile_hook") or not hasattr(knobs.compilation, "override"):
        raise InputError(
            f"Triton {compiler_versions(arch)[0]} is too old for prepared kernels; install triton >= 3.6"
        )
    overriding = _Overriding(folder.resolve(), {launch.key: launch for launch in manifest.launches})
    knobs.compilation.override, knobs.cache.override_dir = True, overriding.scratch.name
    runtime.jit_cache_hook = _chained(overriding.before, runtime.jit_cache_hook)
    runtime.jit_post_compile_hook = _chained(overriding.after, runtime.jit_post_compile_hook)
    return manifest


def _chained(hook: Callable[..., None], installed: Any) -> Any:
    """Call a hook for our kernels, and then the hook that was installed before."""

    def call(*, key: Any, fn: Any, compile: dict[str, Any], **options: Any) -> Any:
        if fn.jit_function.fn.__module__.startswith(f"{__package__}.triton."):
            hook(key, fn, compile)
        return None if installed is None else installed(key=key, fn=fn, compile=compile, **options)

    return call


class _Overriding:
    """Hooks that Triton calls before and after it compiles one of our kernels for its first launch."""

    def __init__(self, folder: Path, launches: dict[str, Launch]) -> None:
        self.folder, self.launches = folder, launches
        self.scratch = tempfile.TemporaryDirectory(prefix="xfm-kernels-")

    def before(self, key: Any, fn: Any, compile: dict[str, Any]) -> None:
        """Link the binary where Triton looks for one: its key depends on its version."""
        from triton.compiler import ASTSource
        from triton.runtime.cache import get_override_manager

        if launch := self.launches.get(Launch.of(fn, compile).key):
            constants, attrs = compile["constants"], compile["configs"][0]
            source: Any = ASTSource(fn.jit_function, compile["signature"], constants, attrs)
            manager: Any = get_override_manager(source.hash())
            path = Path(manager._make_path(f"{source.name[:150]}.cubin"))
            path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                path.symlink_to(self.folder / launch.file)

    def after(self, key: Any, fn: Any, compile: dict[str, Any]) -> None:
        """Raise an error if the kernel must not be launched."""
        compiled = fn.jit_function.device_caches[compile["device"]][0]
        if fault := _why_refused(compiled[key], self.launches.get(Launch.of(fn, compile).key)):
            # The next launch would use it.
            del compiled[key]
            raise NotPreparedError(f"{fn.jit_function.fn.__qualname__} {fault}")


def _why_refused(compiled: Any, launch: Launch | None) -> str | None:
    """Return the reason why a kernel must not be launched, or None."""
    again = "prepare the kernels again for what is run here"
    if launch is None:
        missing = f"is not among the prepared kernels in this form; {again}"
        return missing if _is_asynchronous(compiled.asm["ptx"]) else None
    options = {name: getattr(compiled.metadata, name, None) for name in launch.options}
    if options != launch.options:
        return f"was prepared with {launch.options} and is launched with {options}; {again}"
    if hashlib.sha256(compiled.asm["cubin"]).hexdigest() != launch.sha256:
        return (
            "comes from a cache that was filled without the prepared kernels; "
            "set TRITON_CACHE_DIR to an empty folder"
        )
    if _parameters(compiled.asm["ptx"]) != launch.parameters:
        passed = _parameters(compiled.asm["ptx"])
        return f"takes {launch.parameters} bits of parameters, and this Triton passes {passed}"
    if compiled.metadata.shared < launch.shared:
        return f"needs {launch.shared} B of shared memory and this Triton gives {compiled.metadata.shared}"
    return None
