"""The audit: every shipped kernel, compiled for every architecture and type, one row of figures each."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..limits import HEAD_DIMS
from ..triton.launch import KernelSpec, LaunchConfig
from . import sass
from .architectures import ARCHITECTURES, limits, register_limit
from .compiling import Figures, Task, compile_all


@dataclass(frozen=True)
class Row:
    """One compilation.

    Attributes:
        variant: the properties that distinguish it from the kernel's other forms.
        config: tiles, warps and stages.
        shared_bytes: of one block, static and dynamic; `shared_limit` is the most that the architecture gives.
        occupancy: blocks that one multiprocessor holds at once.
        tensor_core: tensor-core instructions by name; empty where there are none.
        multiplies: whether the kernel is meant to use the tensor cores.
        loads: global loads of the whole kernel by kind and bits, such as `{"LDGSTS.128": 6}`; `inner_loads`: those in
            inner loops; `tile_loads`: of these, all but the loads of scalars and of a value per row.
        wide_loads: whether every tile in an inner loop is loaded with at least 128 bits a thread; none where no loop
            loads any. `wide_share`: the part of the bits that is.
        instructions: of the whole kernel; `loop_instructions` and `loop_tensor_core`: of its main loop; `loop_waits`:
            those of them that wait for Hopper's tensor cores.
        register_limit: the most registers that leave the occupancy as it is.
        staged_tiles, unfenced_writes, unfenced_copies: see `hazards`.
        unsafe_operands: `hazards.register_operands`, where the assembler may overwrite them.
        warnings: codes of the assembler's warnings; C7510 to C7519 say that tensor-core products run one by one.
        made_of: a hash of the kernel, its compiler and the audit itself.
        error: what the compiler said, if it failed; then all figures are zero.
    """

    kernel: str
    variant: dict[str, Any]
    config: str
    arch: int
    dtype: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    shared_limit: int
    occupancy: int
    tensor_core: dict[str, int]
    multiplies: bool
    loads: dict[str, int]
    inner_loads: dict[str, int]
    tile_loads: dict[str, int]
    wide_loads: bool | None
    wide_share: float | None
    instructions: int
    loop_instructions: int
    loop_tensor_core: int
    local_loads: int
    local_stores: int
    loop_waits: int = 0
    register_limit: int = 255
    staged_tiles: int = 0
    unfenced_writes: int = 0
    unfenced_copies: int = 0
    unsafe_operands: int = 0
    warnings: tuple[str, ...] = ()
    made_of: str = ""
    error: str = ""

    @property
    def form(self) -> str:
        """The variant in one word for each property: `head_dim=64 tail=16`."""
        return _describe_variant(self.variant)

    @property
    def key(self) -> str:
        """The parts that identify the row from one audit to the next; the configuration may change."""
        return _key(self.kernel, self.variant, self.arch, self.dtype)

    @property
    def instructions_per_tensor_core(self) -> float | None:
        """Instructions of the main loop for each one that multiplies matrices."""
        return self.loop_instructions / self.loop_tensor_core if self.loop_tensor_core else None

    @property
    def waits_per_tensor_core(self) -> float | None:
        """Waits in the main loop for each product of Hopper's tensor cores; 1 where they run one by one."""
        return (
            self.loop_waits / self.loop_tensor_core if self.tensor_core.get("HGMMA") and self.loop_tensor_core else None
        )

    @property
    def serialised(self) -> tuple[str, ...]:
        """The warnings of the assembler that say that products of the tensor cores run one by one."""
        return tuple(code for code in self.warnings if "C7510" <= code <= "C7519")

    def as_dict(self) -> dict[str, Any]:
        """The row for a JSON file."""
        return asdict(self) | {
            "instructions_per_tensor_core": self.instructions_per_tensor_core,
            "waits_per_tensor_core": self.waits_per_tensor_core,
        }


def shipped_kernels() -> list[KernelSpec]:
    """The kernels of every module in `kernels/triton`, by name.

    Raises:
        ValueError: two kernels have one name.
    """
    from .. import triton as family

    found: dict[str, KernelSpec] = {}
    for module in sorted(info.name for info in pkgutil.iter_modules(family.__path__)):
        for spec in getattr(importlib.import_module(f"{family.__name__}.{module}"), "KERNELS", ()):
            if found.setdefault(spec.name, spec) is not spec:
                raise ValueError(f"two kernels are called {spec.name}; names are keys of tables and must differ")
    return [found[name] for name in sorted(found)]


def audit(
    specs: Iterable[KernelSpec],
    arches: Iterable[int] = ARCHITECTURES,
    dtypes: Iterable[str] = ("fp16", "bf16"),
    *,
    everything: bool = True,
    jobs: int | None = None,
    cache_dir: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Compiles kernels and reports on each.

    Args:
        specs: such as `shipped_kernels()`.
        arches: such as `(80, 90)`.
        dtypes: Triton's names; a kernel is compiled for those of them that it ships.
        everything: all forms of a kernel; otherwise those that `representative` picks.
        jobs: compiling processes; by default one for each core.
        cache_dir: where figures are kept, so that only what changed is compiled again.
        progress: is told how many compilations are done, and of how many.
    """
    wanted = shipped_forms(specs, arches, dtypes)
    if not everything:
        wanted = representative(wanted)
    return compile_rows(wanted, jobs=jobs, cache_dir=cache_dir, progress=progress)


@dataclass(frozen=True)
class Form:
    """A kernel in one of its forms, for one architecture and type."""

    spec: KernelSpec
    variant: Mapping[str, Any]
    arch: int
    dtype: str
    config: LaunchConfig

    @property
    def key(self) -> str:
        """The parts that identify the form from one audit to the next; the configuration may change."""
        return _key(self.spec.name, self.variant, self.arch, self.dtype)


def shipped_forms(
    specs: Iterable[KernelSpec], arches: Iterable[int] = ARCHITECTURES, dtypes: Iterable[str] = ("fp16", "bf16")
) -> list[Form]:
    """Every form of the kernels, with its own launch configuration."""
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
    """The forms of the short audit, about a quarter of all.

    In bf16, the model's type, at head dimension 64, the model's: every form on Hopper, and each kernel's first on the
    other architectures, which differ in the compiler's last stages. On Hopper also the other head dimensions of vision
    transformers, and the largest, which needs most registers. Of attention with a bias of any origin, which the model
    does not call, 64 alone: its other sizes compile for minutes. In fp16, whose code differs in the names of
    instructions: each kernel's first form, on Ampere, which computes bf16 by way of fp32 where the others need not.
    """
    chosen: list[Form] = []
    seen: set[tuple[str, int, str]] = set()
    for form in forms:
        size = form.variant.get("head_dim", 64)
        kind = form.spec.name, form.arch, form.dtype
        if form.arch == 90 and form.dtype == "bf16":
            largest = max(variant.get("head_dim", 64) for variant in form.spec.variants)
            others = not form.spec.name.startswith("bias_attention") and (size in HEAD_DIMS or size == largest)
            wanted = size == 64 or others
        else:
            wanted = size == 64 and kind not in seen and (form.dtype == "bf16" or form.arch == 80)
        if wanted:
            seen.add(kind)
            chosen.append(form)
    return chosen


def compile_rows(
    forms: Iterable[Form],
    *,
    jobs: int | None = None,
    cache_dir: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """One row for each form, in their order; the arguments are those of `audit`."""
    made = [(form, _task(form)) for form in forms]
    figures = compile_all([task for _, task in made], jobs=jobs, cache_dir=cache_dir, progress=progress)
    return [_row(form, task, figures[task.figures_key]) for form, task in made]


def changed(forms: Iterable[Form], accepted: Mapping[str, Mapping[str, Any]]) -> list[Form]:
    """The forms whose row would be made of something else than the accepted one (by `Row.key`): compiling the others
    again says nothing new.
    """
    return [form for form in forms if accepted.get(form.key, {}).get("made_of") != _task(form).made_of]


def _task(form: Form) -> Task:
    return Task.of(form.spec.request(form.variant, form.dtype, form.arch, form.config), form.arch)


def describe(config: LaunchConfig) -> str:
    """A launch configuration in one line: `BLOCK_M=64 BLOCK_N=64 warps=4 stages=2`."""
    tiles = [f"{name}={size}" for name, size in config.tiles.items()]
    return " ".join([*tiles, f"warps={config.num_warps}", f"stages={config.num_stages}"])


def _describe_variant(variant: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in variant.items())


def _key(kernel: str, variant: Mapping[str, Any], arch: int, dtype: str) -> str:
    return f"{kernel} | {_describe_variant(variant)} | sm_{arch} | {dtype}"


def _row(form: Form, task: Task, found: Figures) -> Row:
    spec, arch = form.spec, form.arch
    tiles = found.tile_loads or {}
    bits = {load: count * sass.load_bits(load) for load, count in tiles.items()}
    wide = sum(amount for load, amount in bits.items() if sass.load_bits(load) >= 128)
    most = 0
    if not found.error:
        most = register_limit(
            arch,
            registers=found.registers,
            shared_bytes=found.shared_bytes,
            warps=found.warps,
            tensor_memory=found.tensor_memory,
        )
    return Row(
        kernel=spec.name,
        variant=dict(form.variant),
        config=describe(form.config),
        arch=arch,
        dtype=form.dtype,
        registers=found.registers,
        stack_bytes=found.stack_bytes,
        shared_bytes=found.shared_bytes,
        shared_limit=limits(arch).block_shared,
        occupancy=found.occupancy,
        tensor_core=found.tensor_core or {},
        multiplies=spec.tensor_core,
        loads=found.loads or {},
        inner_loads=found.inner_loads or {},
        tile_loads=tiles,
        wide_loads=wide == sum(bits.values()) if bits else None,
        wide_share=wide / sum(bits.values()) if bits else None,
        instructions=found.instructions,
        loop_instructions=found.loop_instructions,
        loop_tensor_core=found.loop_tensor_core,
        local_loads=found.local_loads,
        local_stores=found.local_stores,
        loop_waits=found.loop_waits,
        register_limit=most,
        staged_tiles=found.staged_tiles,
        unfenced_writes=found.unfenced_writes,
        unfenced_copies=found.unfenced_copies,
        unsafe_operands=found.unsafe_operands,
        warnings=tuple(found.warnings or ()),
        made_of=task.made_of,
        error=found.error,
    )
