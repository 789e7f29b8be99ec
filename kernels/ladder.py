"""Which implementation runs a call: one ladder for all operations, from the narrowest condition to none.

`frozen` → `fp8` → `int8` → `inference` → `training` → `kernel` → `reference`. An operation offers some of these rungs;
a call takes the first that fits its arguments. `inference` and `training` are CPU paths, `kernel` is an operator with
implementations for the CPU, for Triton or for both, and `reference` runs anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from xfm_fast.errors import InputError

from . import fp8
from .backend import Backend, named, readable, resolve
from .cpu import int8
from .cpu.gemm import dense, is_frozen
from .flags import kind_of

Rung = Literal["frozen", "fp8", "int8", "inference", "training", "kernel", "reference"]
CPU_DTYPES = (torch.float32, torch.bfloat16)
# Added to the result of a GEMM, in any dtype.
_ENDS = ("residual", "gamma", "row_scale")


class Call(NamedTuple):
    """The backend as the caller named it, and the one that runs."""

    backend: Backend | None
    chosen: Backend


class Op:
    """An operation: a named tuple of arguments with a method `check`, and its rungs, called with (arguments, call).

    `weights` are fields of GEMM weights, which may be frozen or flagged for 8 bits; `int8_race` is the comparison that
    decides between int8 and floating point (`cpu.int8.is_faster`). `kernels` are backends of the rung `kernel`, and
    `fits` says by backend which arguments it takes unless it is named. `attention`: see `has_flash` of
    `backend.resolve`.
    """

    def __init__(
        self,
        name: str,
        arguments: type[Any],
        rungs: Mapping[Rung, Callable[[Any, Call], Any]],
        *,
        weights: tuple[str, ...] = (),
        int8_race: str = "",
        kernels: tuple[Backend, ...] = ("cpu", "triton"),
        fits: Mapping[Backend, Callable[[Any], bool]] | None = None,
        attention: bool = False,
    ) -> None:
        self.name, self.arguments = name, arguments
        self.rungs: dict[Rung, Callable[[Any, Call], Any]] = dict(rungs)
        self.weights, self.int8_race = weights, int8_race
        self.kernels, self.fits, self.attention = kernels, fits or {}, attention
        # Places of fields: a call of few rows takes a few microseconds.
        places = {field: place for place, field in enumerate(arguments._fields)}
        self._weights = [places[field] for field in weights]
        self._beside = [
            place for field, place in places.items() if field not in (*weights, "residual")
        ]
        self._operands = [place for field, place in places.items() if field not in _ENDS]
        self._chance = [places[field] for field in ("row_scale", "dropout_p") if field in places]
        OPS[name] = self

    def __call__(self, arguments: Any, backend: Backend | None = None) -> Any:
        """Check the arguments and run the first rung that takes them."""
        rungs, compiling = self.rungs, torch.compiler.is_compiling()
        if "frozen" in rungs and not compiling and self._frozen(arguments, backend):
            return rungs["frozen"](arguments, Call(backend, "cpu"))
        arguments.check()
        tensors = [value for value in arguments if isinstance(value, Tensor)]
        call = Call(backend, resolve(backend, *tensors, has_flash=self.attention))
        if self._weights:
            kinds = [kind_of(arguments[place]) for place in self._weights]
            if "fp8" in rungs and (fp8.on() or "fp8" in kinds) and self._in_fp8(arguments, tensors):
                return rungs["fp8"](arguments, call)
            in_int8 = "int8" in rungs and not compiling and all(kind == "int8" for kind in kinds)
            if in_int8 and self._in_int8(arguments, call):
                return rungs["int8"](arguments, call)
            if any(kinds) or (call.chosen == "reference" and not named(backend)):
                arguments = self._floating(arguments)
                tensors = [value for value in arguments if isinstance(value, Tensor)]
        # CPU paths are opaque to a compiler, which has its own.
        if "inference" in rungs and not compiling and self._infers(arguments, call, tensors):
            return rungs["inference"](arguments, call)
        if "training" in rungs and trains(
            call, _floats(arguments[place] for place in self._operands)
        ):
            return rungs["training"](arguments, call)
        fits = self.fits.get(call.chosen)
        if (
            "kernel" in rungs
            and call.chosen in self.kernels
            and (fits is None or named(backend) or fits(arguments))
        ):
            return rungs["kernel"](arguments, call)
        return rungs["reference"](arguments, call)

    def _frozen(self, arguments: Any, backend: Backend | None) -> bool:
        """True for a frozen model in inference mode: it skips checks, which cost as much as a GEMM of few rows."""
        weights = [arguments[place] for place in self._weights]
        if not (is_frozen(weights[0]) and torch.is_inference_mode_enabled()):
            return False
        x, residual = arguments.x, getattr(arguments, "residual", None)
        return (
            is_frozen(weights[-1])
            and x.is_cpu
            and x.dtype == weights[0].dtype
            and x.shape[-1] == weights[0].shape[1]
            and not named(backend)
            and not torch.is_autocast_enabled("cpu")
            and self._is_certain(arguments)
            and (residual is None or residual.shape == (*x.shape[:-1], weights[-1].shape[0]))
            and readable(*(value for value in arguments if isinstance(value, Tensor)))
        )

    def _in_fp8(self, arguments: Any, tensors: Sequence[Tensor]) -> bool:
        weights = [arguments[place] for place in self._weights]
        if len(weights) > 1:
            return any(map(fp8.is_active, weights))
        return fp8.should_use(arguments.x, weights[0], *tensors)

    def _in_int8(self, arguments: Any, call: Call) -> bool:
        """True for weights without gradient, in any stored dtype, where int8 is faster."""
        x, weights = arguments.x, [arguments[place] for place in self._weights]
        for weight in weights:
            records = torch.is_grad_enabled() and weight.requires_grad
            if records or weight.is_inference() or weight.device != x.device:
                return False
        others = _floats(arguments[place] for place in self._beside)
        return (
            self._is_certain(arguments)
            and infers(call, others)
            and int8.is_faster(self.int8_race, x, weights[0])
        )

    def _infers(self, arguments: Any, call: Call, tensors: Sequence[Tensor]) -> bool:
        if not self._is_certain(arguments):
            return False
        # Linear layers have no tensors of integers.
        if infers(call, tensors if self._weights else _floats(tensors)):
            return True
        if any(is_frozen(arguments[place]) for place in self._weights):
            raise InputError(
                "a weight is frozen for CPU inference and supports no gradient, autocast, other dtype or backend: "
                "call unfreeze() on the model first"
            )
        return False

    def _is_certain(self, arguments: Any) -> bool:
        """True without dropout and stochastic depth."""
        for place in self._chance:
            value = arguments[place]
            if value is not None and (isinstance(value, Tensor) or value):
                return False
        return True

    def _floating(self, arguments: Any) -> Any:
        """Weights for floating-point GEMMs, dense; flagged ones may have another dtype than x."""
        for name in self.weights:
            weight = getattr(arguments, name)
            if kind_of(weight) is not None:
                arguments = arguments._replace(**{name: weight.to(arguments.x.dtype)})
            elif weight is not None and weight.is_mkldnn:
                arguments = arguments._replace(**{name: dense(weight)})
        return arguments


OPS: dict[str, Op] = {}
"""Every operation by name. A new one registers itself, from any package."""


@contextmanager
def watching() -> Iterator[dict[str, str]]:
    """Yield what ran each operation in the block that named no backend: `triton`, `cpu`, `fp8`, `flash_attn`; `torch`
    where a device has no kernel of this project's; `reference`, once it was, where it has one that did not run.
    """
    ran: dict[str, str] = {}

    def watched(op: Op, rung: Rung, run: Callable[[Any, Call], Any]) -> Callable[[Any, Call], Any]:
        def call(arguments: Any, call: Call) -> Any:
            if not named(call.backend) and ran.get(op.name) != "reference":
                ran[op.name] = _runner(op, rung, call)
            return run(arguments, call)

        return call

    rungs: dict[Op, dict[Rung, Callable[[Any, Call], Any]]] = {op: op.rungs for op in OPS.values()}
    for op, own in rungs.items():
        op.rungs = {rung: watched(op, rung, run) for rung, run in own.items()}
    try:
        yield ran
    finally:
        for op, own in rungs.items():
            op.rungs = own


def _runner(op: Op, rung: Rung, call: Call) -> str:
    if rung != "reference":
        return "fp8" if rung == "fp8" else call.chosen
    has_kernel = "kernel" in op.rungs and (call.chosen == "reference" or call.chosen in op.kernels)
    return "reference" if has_kernel else "torch"


def infers(call: Call, tensors: Sequence[Tensor]) -> bool:
    """True where a CPU path for inference applies: one dtype, no gradient, compiler or autocast."""
    if call.chosen != "cpu" or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    grad, dtype = torch.is_grad_enabled(), tensors[0].dtype
    for t in tensors:
        if t.dtype != dtype or (grad and t.requires_grad):
            return False
    return dtype in CPU_DTYPES


def trains(call: Call, tensors: Sequence[Tensor]) -> bool:
    """True where the operator for CPU training applies, which is opaque to compilers."""
    if call.chosen != "cpu" or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    types, known = {t.dtype for t in tensors}, True
    if torch.is_autocast_enabled("cpu"):
        types, known = {torch.get_autocast_dtype("cpu")}, types <= {*CPU_DTYPES}
    known = known and not any(map(is_frozen, tensors))
    return (
        known
        and len(types) == 1
        and types <= {*CPU_DTYPES}
        and any(t.requires_grad for t in tensors)
    )


def runs_cpu_inference(backend: Backend | None, *tensors: Tensor | None) -> bool:
    """`infers` for a call with this backend."""
    present = [t for t in tensors if t is not None]
    return infers(Call(backend, resolve(backend, *present)), present)


def _floats(values: Iterable[Any]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
