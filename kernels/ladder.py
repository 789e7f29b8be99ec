"""Which implementation runs a call: one ladder for all operations, from the narrowest condition to none.

`frozen` → `fp8` → `int8` → `inference` → `training` → `kernel` → `reference`. An operation offers some of these rungs;
a call takes the first that fits its arguments. `inference` and `training` are CPU paths, `kernel` is an operator with
implementations for the CPU, for Triton or for both, and `reference` runs anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor

from xfm_fast.errors import InputError

from . import fp8
from .backend import Backend, named, readable, resolve
from .cpu import int8
from .cpu.gemm import CPU_DTYPES, dense, is_frozen
from .flags import kind_of
from .library import Gradients, Outputs, differentiable

Rung = Literal["frozen", "fp8", "int8", "inference", "training", "kernel", "reference"]
A = TypeVar("A", bound=Any)


@dataclass(slots=True)
class Call:
    """The backend that the caller asked for, and the one that runs."""

    requested: Backend | None
    backend: Backend


class Op(Generic[A]):
    """An operation: its arguments, its definition, and faster implementations by rung of the ladder.

    Args:
        name: of the operation and of its operators.
        arguments: a dataclass with a method `check`, whose fields carry their roles (see `checks`).
        reference: the definition in plain PyTorch, called with the arguments.
        rungs: implementations, called with (arguments, call).
        backward: called with the gradient of each of the `outputs` results, None for zeros, and the arguments; returns
            gradients by field. The reference becomes an operator with this gradient, the rung `kernel`.
        int8_race: the comparison that decides between int8 and floating point (`cpu.int8.is_faster`).
        kernels: backends of the rung `kernel`; `fits` says by backend which arguments it takes unless it is named.
        attention: see `has_flash` of `backend.resolve`.
    """

    def __init__(
        self,
        name: str,
        arguments: type[A],
        rungs: Mapping[Rung, Callable[[A, Call], Any]] | None = None,
        *,
        reference: Callable[[A], Any] | None = None,
        backward: Callable[..., Gradients] | None = None,
        outputs: int = 1,
        int8_race: str = "",
        kernels: tuple[Backend, ...] = ("cpu", "triton"),
        fits: Mapping[Backend, Callable[[A], bool]] | None = None,
        attention: bool = False,
    ) -> None:
        self.name, self.int8_race, self.attention = name, int8_race, attention
        self.kernels, self.fits = kernels, fits or {}
        self.is_composed = backward is not None
        self.rungs: dict[Rung, Callable[[A, Call], Any]] = dict(rungs or {})
        if reference is not None:
            self.rungs["reference"] = lambda arguments, _: reference(arguments)
            if backward is not None:
                self.rungs["kernel"] = _operator(name, arguments, reference, backward, outputs)
        self.roles = {f.name: f.metadata.get("role", "operand") for f in fields(arguments)}
        self.weights = [name for name, role in self.roles.items() if role == "weight"]
        self.chance = [name for name, role in self.roles.items() if role == "chance"]
        OPS[name] = self

    def __call__(self, arguments: A, backend: Backend | None = None) -> Any:
        """Check the arguments and run the first rung that takes them."""
        rungs, compiling = self.rungs, torch.compiler.is_compiling()
        inference = not compiling and torch.is_inference_mode_enabled()
        if inference and "frozen" in rungs and self._takes_frozen(arguments, backend):
            return rungs["frozen"](arguments, Call(backend, "cpu"))
        tensors, weights, operands = self._tensors(arguments)
        call = Call(backend, resolve(backend, *tensors, has_flash=self.attention))
        arguments.check()
        if weights:
            formats = [*map(kind_of, weights)]
            in_fp8, in_int8 = fp8.block.on or "fp8" in formats, {*formats} == {"int8"}
            if in_fp8 and "fp8" in rungs and fp8.takes(weights, tensors):
                return rungs["fp8"](arguments, call)
            quantised = in_int8 and "int8" in rungs and not compiling
            if quantised and self._takes_int8(arguments, call, weights, operands):
                return rungs["int8"](arguments, call)
            if any(formats) or (call.backend == "reference" and not named(backend)):
                self._convert_weights(arguments)
                tensors, weights, operands = self._tensors(arguments)
        frozen = any(map(is_frozen, weights))
        # CPU paths are opaque to a compiler, which has its own.
        if "inference" in rungs and not compiling and self._is_certain(arguments):
            # Linear layers have no tensors of integers.
            if infers(call, tensors if weights else [t for t in tensors if t.is_floating_point()]):
                return rungs["inference"](arguments, call)
            if frozen:
                raise InputError(
                    "a weight is frozen for CPU inference and supports no gradient, autocast, other dtype or backend: "
                    "call unfreeze() on the model first"
                )
        if "training" in rungs and not frozen and trains(call, [*operands, *weights]):
            return rungs["training"](arguments, call)
        if "kernel" in rungs and call.backend in self.kernels:
            fits = self.fits.get(call.backend)
            if fits is None or named(backend) or fits(arguments):
                return rungs["kernel"](arguments, call)
        return rungs["reference"](arguments, call)

    def _tensors(self, arguments: A) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return all tensors, and the weights and operands of GEMMs among them."""
        tensors, weights, operands = [], [], []
        for name, role in self.roles.items():
            value = getattr(arguments, name)
            if isinstance(value, Tensor):
                value = [value]
            elif not isinstance(value, list):
                continue
            tensors += value
            if role == "weight":
                weights += value
            elif role == "operand":
                operands += value
        return tensors, weights, operands

    def _takes_frozen(self, arguments: A, backend: Backend | None) -> bool:
        """Return whether a frozen model runs in inference mode; checks would cost as much as a GEMM of few rows."""
        first, last = getattr(arguments, self.weights[0]), getattr(arguments, self.weights[-1])
        x, residual = arguments.x, getattr(arguments, "residual", None)
        return (
            is_frozen(first)
            and is_frozen(last)
            and readable(*self._tensors(arguments)[0])
            and x.is_cpu
            and x.dtype == first.dtype
            and x.shape[-1] == first.shape[1]
            and not named(backend)
            and not torch.is_autocast_enabled("cpu")
            and self._is_certain(arguments)
            and (residual is None or residual.shape == (*x.shape[:-1], last.shape[0]))
        )

    def _takes_int8(
        self, arguments: A, call: Call, weights: Sequence[Tensor], operands: Sequence[Tensor]
    ) -> bool:
        """Return whether int8 is faster for these weights, which must have no gradient but may have any dtype."""
        for weight in weights:
            records = torch.is_grad_enabled() and weight.requires_grad
            if records or weight.is_inference() or weight.device != arguments.x.device:
                return False
        gamma = getattr(arguments, "gamma", None)
        return (
            self._is_certain(arguments)
            and infers(call, operands if gamma is None else [*operands, gamma])
            and int8.is_faster(self.int8_race, arguments.x, weights[0])
        )

    def _is_certain(self, arguments: A) -> bool:
        """Return whether the call has neither dropout nor stochastic depth."""
        for name in self.chance:
            value = getattr(arguments, name)
            if value is not None and (isinstance(value, Tensor) or value):
                return False
        return True

    def _convert_weights(self, arguments: A) -> None:
        """Replace flagged and frozen weights by dense ones in the dtype of x."""
        for name in self.weights:
            value = getattr(arguments, name)
            if isinstance(value, list):
                setattr(arguments, name, [_floating(weight, arguments.x) for weight in value])
            elif value is not None:
                setattr(arguments, name, _floating(value, arguments.x))


OPS: dict[str, Op[Any]] = {}
"""Every operation by name. A new one registers itself, from any package."""


def _floating(weight: Tensor, x: Tensor) -> Tensor:
    return dense(weight) if kind_of(weight) is None else weight.to(x.dtype)


def _operator(
    name: str,
    arguments: type[A],
    reference: Callable[[A], Any],
    backward: Callable[..., Gradients],
    outputs: int,
) -> Callable[[A, Call], Any]:
    """Register the reference as an operator with this gradient."""

    def forward(arguments: A, _: str) -> Outputs:
        result = reference(arguments)
        return (result,) if isinstance(result, Tensor) else result

    run = differentiable(
        name,
        arguments,
        forward,
        forward,
        lambda upstream, arguments, *_: backward(*upstream, arguments),
        outputs=outputs,
        results=outputs,
        keep=lambda arguments, outputs, _: (arguments, [None] * len(outputs)),
    )

    def call_operator(arguments: A, call: Call) -> Any:
        results = run(arguments, call.backend)
        return results if outputs > 1 else results[0]

    return call_operator


@contextmanager
def watching() -> Iterator[dict[str, str]]:
    """Yield what ran each operation in the block that named no backend: `triton`, `cpu`, `fp8`, `flash_attn`; `torch`
    where a device has no kernel of this project's; `reference`, once it was, where it has one that did not run.
    """
    ran: dict[str, str] = {}

    def watch(op: Op[Any], rung: Rung, run: Callable[[Any, Call], Any]) -> Callable[..., Any]:
        def run_watched(arguments: Any, call: Call) -> Any:
            if not named(call.requested) and ran.get(op.name) != "reference":
                ran[op.name] = _runner(op, rung, call)
            return run(arguments, call)

        return run_watched

    rungs = {op: op.rungs for op in OPS.values()}
    for op in rungs:
        op.rungs = {rung: watch(op, rung, run) for rung, run in op.rungs.items()}
    try:
        yield ran
    finally:
        for op, unwatched in rungs.items():
            op.rungs = unwatched


def _runner(op: Op[Any], rung: Rung, call: Call) -> str:
    if op.is_composed and call.backend == "triton":
        return "torch"
    if rung != "reference":
        return "fp8" if rung == "fp8" else call.backend
    if call.backend == "cpu" and "cpu" in op.fits:
        # On a CPU `fits` says where a kernel gains; PyTorch computes the rest by intent.
        return "torch"
    supported = call.backend == "reference" or call.backend in op.kernels
    return "reference" if "kernel" in op.rungs and supported else "torch"


def infers(call: Call, tensors: Sequence[Tensor]) -> bool:
    """Return whether a CPU path for inference applies: one dtype, no gradient, compiler or autocast."""
    if call.backend != "cpu" or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    grad, dtype = torch.is_grad_enabled(), tensors[0].dtype
    for tensor in tensors:
        if tensor.dtype != dtype or (grad and tensor.requires_grad):
            return False
    return dtype in CPU_DTYPES


def trains(call: Call, tensors: Sequence[Tensor]) -> bool:
    """Return whether an operator for CPU training applies, which is opaque to compilers."""
    if call.backend != "cpu" or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    autocast, records = torch.is_autocast_enabled("cpu"), False
    for tensor in tensors:
        one_dtype = autocast or tensor.dtype == tensors[0].dtype
        if tensor.dtype not in CPU_DTYPES or not one_dtype:
            return False
        records = records or tensor.requires_grad
    return records and (not autocast or torch.get_autocast_dtype("cpu") in CPU_DTYPES)


def runs_cpu_inference(backend: Backend | None, *tensors: Tensor | None) -> bool:
    """Return `infers` for a call with this backend."""
    present = [tensor for tensor in tensors if tensor is not None]
    return infers(Call(backend, resolve(backend, *present)), present)
