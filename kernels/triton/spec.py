"""What it takes to compile a kernel ahead of time, exactly as a launch would, on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

TRITON_TYPE = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
_INTEGERS = {"i32", "i64", "u32", "u64"}


@dataclass(frozen=True)
class LaunchConfig:
    """How a kernel is cut into programs.

    Attributes:
        tiles: values of the kernel's tile constants, such as `{"BLOCK_M": 128, "BLOCK_N": 64}`.
        num_warps: warps of one program.
        num_stages: depth of the software pipeline over a loop's loads.
    """

    tiles: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True)
class CompileRequest:
    """What to compile: `ASTSource(r.kernel, r.signature, r.constexprs, r.attrs)`, with `options=r.options`."""

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attrs: dict[tuple[int, ...], list[list[Any]]]
    options: dict[str, int]


@dataclass(frozen=True)
class KernelSpec:
    """A kernel and the forms in which it is shipped.

    Attributes:
        name: unique over all families; also the kernel's key in `tuning/<arch>.json`.
        kernel: the `triton.jit` function.
        variants: the forms to compile, each a set of named properties such as `{"head_dim": 64, "dropout": False}`.
        types: (variant, Triton dtype such as `"bf16"`) → Triton type of every argument that is not a `tl.constexpr`:
            `"*bf16"`, `"*fp32"`, `"i32"`, `"fp32"`.
        constants: (variant, dtype, launch configuration) → value of every `tl.constexpr` argument.
        config: (variant, dtype, architecture such as 90) → launch configuration.
        unaligned: arguments whose address or value is not a multiple of 16. All other pointers and all integers named
            `stride_*` are, in the launches that matter, and are compiled so.
        tensor_core: whether the kernel multiplies matrices, and so must use the tensor cores.
        dtypes: compute types shipped.
    """

    name: str
    kernel: Any
    variants: tuple[Mapping[str, Any], ...]
    types: Callable[[Mapping[str, Any], str], dict[str, str]]
    constants: Callable[[Mapping[str, Any], str, LaunchConfig], dict[str, Any]]
    config: Callable[[Mapping[str, Any], str, int], LaunchConfig]
    unaligned: frozenset[str] = field(default_factory=frozenset)
    tensor_core: bool = True
    dtypes: tuple[str, ...] = ("fp16", "bf16")

    def request(
        self, variant: Mapping[str, Any], dtype: str, arch: int, config: LaunchConfig | None = None
    ) -> CompileRequest:
        """The compilation of one variant for one type and architecture, with its own or another configuration."""
        config = self.config(variant, dtype, arch) if config is None else config
        types, constants = self.types(variant, dtype), self.constants(variant, dtype, config)
        names: list[str] = self.kernel.arg_names
        if set(types) | set(constants) != set(names) or set(types) & set(constants):
            wrong = (set(types) | set(constants)) ^ set(names) | set(types) & set(constants)
            raise ValueError(f"kernel {self.name}: arguments missing, unknown or given twice: {sorted(wrong)}")
        signature = {name: types.get(name, "constexpr") for name in names}
        attrs: dict[tuple[int, ...], list[list[Any]]] = {
            (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if self._aligned(name, signature[name])
        }
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        return CompileRequest(self.kernel, signature, constants, attrs, options)

    def _aligned(self, name: str, kind: str) -> bool:
        if name in self.unaligned:
            return False
        return kind.startswith("*") or (kind in _INTEGERS and name.startswith("stride_"))
