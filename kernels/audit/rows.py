"""Forms of the shipped kernels, and the rows of figures from their compilation."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..limits import HEAD_DIMS
from ..triton.launch import KernelSpec, LaunchConfig
from .architectures import ARCHITECTURES, LIMITS
from .compiling import compile_all
from .task import Figures, Task


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
        """The identity across audits, in which the configuration may change."""
        return f"{self.spec.name} | {describe_variant(self.variant)} | sm_{self.arch} | {self.dtype}"

    @cached_property
    def task(self) -> Task:
        """The compilation of this form."""
        return Task.of(self.spec.request(self.variant, self.dtype, self.arch, self.config), self.arch)

    @property
    def made_of(self) -> str:
        """A short hash of the kernel, its compiler and the files that measure it."""
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
        """The row for a JSON file."""
        ratios = ("instructions_per_tensor_core", "waits_per_tensor_core")
        return asdict(self) | {name: getattr(self, name) for name in ratios}


def shipped_kernels() -> list[KernelSpec]:
    """The kernels of every module in `kernels/triton`, by name; ValueError for a duplicate name."""
    from .. import triton as family

    kernels: dict[str, KernelSpec] = {}
    for module in sorted(info.name for info in pkgutil.iter_modules(family.__path__)):
        for spec in getattr(importlib.import_module(f"{family.__name__}.{module}"), "KERNELS", ()):
            if kernels.setdefault(spec.name, spec) is not spec:
                raise ValueError(f"two kernels are called {spec.name}; names are keys of tables and must differ")
    return [kernels[name] for name in sorted(kernels)]


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

    In bf16 at head dimension 64, as in the model: every form on Hopper, and each kernel's first on the other
    architectures. On Hopper also the other head dimensions of vision transformers, and the largest, with the most
    registers; bias attention, which the model does not call, at 64 only, since its other sizes compile for minutes. In
    fp16: each kernel's first form, on Ampere, which computes bf16 through fp32.
    """
    chosen: list[Form] = []
    seen: set[tuple[str, int, str]] = set()
    for form in forms:
        size = form.variant.get("head_dim", 64)
        kind = form.spec.name, form.arch, form.dtype
        if form.arch == 90 and form.dtype == "bf16":
            largest = max(variant.get("head_dim", 64) for variant in form.spec.variants)
            others = not form.spec.name.startswith("bias_attention") and (size in HEAD_DIMS or size == largest)
            included = size == 64 or others
        else:
            included = size == 64 and kind not in seen and (form.dtype == "bf16" or form.arch == 80)
        if included:
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
    """One row per form, in order; options as in `compile_all`."""
    forms = list(forms)
    figures = compile_all([form.task for form in forms], jobs=jobs, cache_dir=cache_dir, progress=progress)
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


def changed(forms: Iterable[Form], accepted: Mapping[str, Mapping[str, Any]]) -> list[Form]:
    """The forms with another `made_of` than the accepted row of their key."""
    return [form for form in forms if accepted.get(form.key, {}).get("made_of") != form.made_of]


def describe(config: LaunchConfig) -> str:
    """A launch configuration in one line: `BLOCK_M=64 BLOCK_N=64 warps=4 stages=2`."""
    tiles = [f"{name}={size}" for name, size in config.tiles.items()]
    return " ".join([*tiles, f"warps={config.num_warps}", f"stages={config.num_stages}"])


def describe_variant(variant: Mapping[str, Any]) -> str:
    """A variant in one line: `head_dim=64 tail=16`."""
    return " ".join(f"{name}={value}" for name, value in variant.items())
