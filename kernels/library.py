"""Operators registered with PyTorch: one node for `torch.compile`, with gradient and autocast.

Implementations are registered with define/impl for CPU and CUDA rather than `triton_op`: ahead-of-time autograd
decomposes a `triton_op` even for CPU tensors and so bypasses the CPU implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from inspect import formatannotation
from typing import Any, Generic, TypeVar, cast, get_type_hints

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from xfm_fast.errors import InputError

from .backend import AUTOCAST_KEYS

A = TypeVar("A")
NAMESPACE = "xfm_fast"
_library = torch.library.Library(NAMESPACE, "DEF")


def operator(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    autocast: bool | Sequence[int] = False,
) -> Callable[..., Any]:
    """Register an operator and return it.

    The implementation runs on CPU and CUDA tensors, there on the device of its first tensor. `setup_context` and
    `backward` are as in `torch.library.register_autograd`. `autocast` converts floating-point tensor arguments to
    autocast's dtype: all, or those at these indices. An empty sequence leaves it to the operator, which then saves no
    converted copy of a model's weights.
    """
    name = schema.split("(")[0]
    qualified = f"{NAMESPACE}::{name}"
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CPU")
    _library.impl(name, on_device_of_arguments(implementation), "CUDA")
    torch.library.register_fake(qualified, fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(
            qualified, backward, setup_context=setup_context, lib=_library
        )
    registered = getattr(getattr(torch.ops, NAMESPACE), name).default
    if autocast is not False:
        for device, key in AUTOCAST_KEYS.items():
            indices = None if autocast is True else autocast
            _library.impl(name, _casting(registered, device, key, indices), key)
    return registered


# Annotations of arguments, and their types in a schema.
_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    float: "float",
    int: "SymInt",
    int | None: "int?",
    bool: "bool",
    tuple[int, int]: "int[]",
    tuple[bool, ...]: "bool[]",
    list[Tensor]: "Tensor[]",
    torch.dtype: "ScalarType",
}
Outputs = Sequence[Any]
"""Outputs of an operator; None for one that was not saved."""
Upstream = Sequence[Tensor | None]
"""Gradients of outputs; None for zeros."""
Needs = Mapping[str, bool]
"""Which gradients are computed, by field."""
Gradients = Mapping[str, Tensor | None]
"""Gradients by field; zeros for a field that is absent or None."""
_SAVED = object()


def differentiable(
    name: str,
    arguments: type[A],
    forward: Callable[[A, str], Outputs],
    fake: Callable[[A, str], Outputs],
    backward: Callable[[Upstream, A, Outputs, Needs, str], Gradients],
    *,
    outputs: int = 1,
    results: int | Callable[[A, str], int] = 1,
    keep: Callable[[A, Outputs, str], tuple[A, Outputs]] | None = None,
    around: Callable[..., Gradients] | None = None,
    backward_fake: Callable[[A, Outputs, Needs], Gradients] | None = None,
    autocast: bool | Sequence[str] = False,
) -> Callable[[A, str], tuple[Tensor, ...]]:
    """Register an operation and its gradient as operators; return `call(arguments, backend)`, the outputs.

    `arguments` is a dataclass whose annotations are the schema. Its tensors have a gradient unless their role is
    `CHANCE` or `CONSTANT`; to `backward`, a list of tensors is one concatenated tensor.

    Args:
        forward: returns `outputs` tensors, of which the first `results` have a gradient; `backward` receives all.
        fake: the same for tensors without contents.
        keep: selects what is saved of arguments and outputs, by default all.
        around: wraps the operator of the gradient, to compute outside of it.
        backward_fake: shapes of the gradients, by default those of the arguments.
        autocast: fields that autocast converts, or all; empty leaves it to the operator (see `operator`).
    """
    types = _schema_types(name, arguments)
    operation = _Differentiable(
        name, arguments, types, forward, fake, backward, results, keep, around, backward_fake
    )
    schema = ", ".join(f"{type} {field}" for field, type in types.items())
    # A callable counts outputs whose gradients are refused: `backward` receives two at most.
    operation.upstream = min(2, outputs) if callable(results) else results
    upstream = ", ".join(f"Tensor? d{i}" for i in range(operation.upstream))
    saved = ", ".join(f"Tensor? saved{i}" for i in range(outputs))
    operation.gradient = operator(
        f"{name}_backward({upstream}, {schema.replace('Tensor ', 'Tensor? ')}, {saved}, "
        f"bool[] needed, str backend) -> {_tuple_type(len(operation.wrt))}",
        operation.run_backward,
        operation.fake_backward,
        autocast=() if autocast == () else False,
    )
    indices = autocast if isinstance(autocast, bool) else [*map([*types].index, autocast)]
    operation.registered = operator(
        f"{name}({schema}, str backend) -> {_tuple_type(outputs)}",
        operation.run_forward,
        operation.fake_forward,
        setup_context=operation.save,
        backward=operation.differentiate,
        autocast=indices,
    )
    return operation.call


@dataclass
class _Differentiable(Generic[A]):
    """An operation and its gradient as operators: their implementations, and what autograd calls."""

    name: str
    arguments: type[A]
    types: dict[str, str]
    forward: Callable[[A, str], Outputs]
    fake: Callable[[A, str], Outputs]
    backward: Callable[[Upstream, A, Outputs, Needs, str], Gradients]
    results: int | Callable[[A, str], int]
    keep: Callable[[A, Outputs, str], tuple[A, Outputs]] | None
    around: Callable[..., Gradients] | None
    backward_fake: Callable[[A, Outputs, Needs], Gradients] | None
    upstream: int = 1
    registered: Callable[..., Any] = field(init=False)
    gradient: Callable[..., Any] = field(init=False)

    def __post_init__(self) -> None:
        roles = {f.name: f.metadata.get("role") for f in fields(cast(Any, self.arguments))}
        self.names = [*self.types]
        self.wrt = {
            name: index
            for index, (name, type) in enumerate(self.types.items())
            if type.startswith("Tensor") and roles[name] not in ("chance", "constant")
        }

    def call(self, arguments: A, backend: str) -> tuple[Tensor, ...]:
        """Run the operator."""
        values = []
        for name in self.names:
            values.append(getattr(arguments, name))
        output = self.registered(*values, backend)
        return (output,) if isinstance(output, Tensor) else output

    def run_forward(self, *inputs: Any) -> Any:
        """Implement the operator."""
        outputs = self.forward(self.arguments(*inputs[:-1]), inputs[-1])
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def fake_forward(self, *inputs: Any) -> Any:
        """Make outputs without contents."""
        outputs = self.fake(self.arguments(*inputs[:-1]), inputs[-1])
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def save(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Save arguments and outputs for the gradient."""
        saved, ctx.backend = self.arguments(*inputs[:-1]), inputs[-1]
        outputs = (output,) if isinstance(output, Tensor) else output
        results = self.results(saved, ctx.backend) if callable(self.results) else self.results
        ctx.mark_non_differentiable(*outputs[results:])
        # Or else zeros are written for results that have no gradient.
        ctx.set_materialize_grads(False)
        if self.keep is not None:
            saved, outputs = self.keep(saved, outputs, ctx.backend)
        ctx.values, tensors, values = [], [], []
        for name in self.names:
            values.append(getattr(saved, name))
        for value in (*values, *outputs):
            if isinstance(value, Tensor):
                tensors.append(value)
                value = _SAVED
            elif isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
                tensors += value
                value = [_SAVED] * len(value)
            ctx.values.append(value)
        ctx.save_for_backward(*tensors)

    def differentiate(self, ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        """Compute the gradients of all inputs, as autograd expects them."""
        if torch.is_grad_enabled():
            return self._refuse_second(ctx, *upstream)
        upstream = upstream[: self.upstream]
        needs, gradients = {}, dict[str, Any]()
        for name, index in self.wrt.items():
            need = ctx.needs_input_grad[index]
            needs[name] = any(need) if isinstance(need, (list, tuple)) else need
        if upstream.count(None) < len(upstream):
            tensors, values = iter(ctx.saved_tensors), []
            for value in ctx.values:
                if value is _SAVED:
                    value = next(tensors)
                elif isinstance(value, list) and value and value[0] is _SAVED:
                    value = [next(tensors) for _ in value]
                values.append(value)
            saved, outputs = self.arguments(*values[: len(self.names)]), values[len(self.names) :]
            if self.around is None:
                gradients |= self.call_gradient(upstream, saved, outputs, needs, ctx.backend)
            else:
                compute = self.call_gradient
                gradients |= self.around(compute, upstream, saved, outputs, needs, ctx.backend)
            for name, index in self.wrt.items():
                if self.types[name] == "Tensor[]":
                    chunks, need = getattr(saved, name), ctx.needs_input_grad[index]
                    gradients[name] = _split(gradients.get(name), chunks, need)
        for name, need in zip(self.names, ctx.needs_input_grad, strict=False):
            if isinstance(need, (list, tuple)):
                gradients.setdefault(name, [None] * len(need))
        return (*map(gradients.get, self.names), None)

    def _refuse_second(self, ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        """Compute first gradients under `create_graph=True`; their kernels record no graph for second ones."""
        with torch.no_grad():
            first = self.differentiate(ctx, *upstream)
        sources = (*upstream, *ctx.saved_tensors)
        return pytree.tree_map_only(Tensor, lambda g: _Once.apply(self.name, g, *sources), first)

    def call_gradient(
        self, upstream: Upstream, saved: A, outputs: Outputs, needs: Needs, backend: str
    ) -> Gradients:
        """Run the operator of the gradient."""
        inputs: list[Any] = [*upstream]
        for name in self.names:
            inputs.append(getattr(saved, name))
        results = self.gradient(*inputs, *outputs, [*needs.values()], backend)
        results = (results,) if isinstance(results, Tensor) else results
        gradients = {}
        for name, gradient in zip(needs, results, strict=True):
            if needs[name]:
                gradients[name] = gradient
        return gradients

    def run_backward(self, *inputs: Any) -> Any:
        """Implement the operator of the gradient."""
        upstream, saved, outputs, needs, backend = self._backward_inputs(inputs)
        gradients = self.backward(upstream, saved, outputs, needs, backend)
        return self._tensors_only(gradients, upstream, saved, needs)

    def fake_backward(self, *inputs: Any) -> Any:
        """Make gradients without contents."""
        upstream, saved, outputs, needs, _ = self._backward_inputs(inputs)
        gradients = {} if self.backward_fake is None else self.backward_fake(saved, outputs, needs)
        return self._tensors_only(gradients, upstream, saved, needs)

    def _tensors_only(
        self, gradients: Gradients, upstream: Upstream, saved: A, needs: Needs
    ) -> Any:
        """Return gradients in order, zeros for absent ones and empty where none is needed."""
        first = upstream[0]
        for gradient in upstream:
            first = gradient if first is None else first
        assert first is not None
        tensors = []
        for name, need in needs.items():
            gradient = gradients.get(name)
            if need and gradient is None:
                value = getattr(saved, name)
                value = torch.cat(value) if self.types[name] == "Tensor[]" else value
                gradient = None if value is None else torch.zeros_like(value)
            tensors.append(gradient if need and gradient is not None else first.new_empty(0))
        return tensors[0] if len(tensors) == 1 else tuple(tensors)

    def _backward_inputs(
        self, inputs: tuple[Any, ...]
    ) -> tuple[tuple[Tensor | None, ...], A, tuple[Any, ...], dict[str, bool], str]:
        first, end = self.upstream, self.upstream + len(self.names)
        *_, needed, backend = inputs
        needs = dict(zip(self.wrt, needed, strict=True))
        return inputs[:first], self.arguments(*inputs[first:end]), inputs[end:-2], needs, backend


def _schema_types(name: str, arguments: type[Any]) -> dict[str, str]:
    """Return the type in a schema of every field of a dataclass."""
    hints, types = get_type_hints(arguments), {}
    for argument in fields(arguments):
        hint = hints[argument.name]
        if hint not in _TYPES:
            shown, allowed = formatannotation(hint), ", ".join(map(formatannotation, _TYPES))
            raise InputError(
                f"{name}: the field {argument.name} of {arguments.__name__} is {shown}; use one of {allowed}"
            )
        types[argument.name] = _TYPES[hint]
    return types


def _tuple_type(count: int) -> str:
    return f"({', '.join(['Tensor'] * count)})"


def _split(
    gradient: Tensor | None, chunks: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradient of each chunk of a concatenation."""
    if gradient is None:
        return [None] * len(chunks)
    pairs = zip(gradient.split([len(chunk) for chunk in chunks]), needs, strict=True)
    return [chunk if need else None for chunk, need in pairs]


class _Once(torch.autograd.Function):
    """The identity of a first gradient, whose own gradient is refused."""

    @staticmethod
    def forward(ctx: Any, name: str, gradient: Tensor, *_: Tensor | None) -> Tensor:
        ctx.name = name
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise InputError(
            f"{ctx.name} has no second derivative; compute it within ops.use_backend('reference')"
        )


def on_device_of_arguments(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an implementation so that the GPU of its first CUDA tensor is the current device."""

    def run(*arguments: Any) -> Any:
        for argument in arguments:
            if isinstance(argument, Tensor) and argument.device.type == "cuda":
                with torch.cuda.device(argument.device):
                    return implementation(*arguments)
        raise AssertionError("no argument is on a GPU")

    return run


def _casting(
    registered: Callable[..., Any], device: str, key: str, indices: Sequence[int] | None
) -> Callable[..., Any]:
    # torch.library.register_autocast fixes one dtype at registration; autocast's own can be fp16 or bf16.
    below = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast_and_call(*arguments: Any) -> Any:
        dtype, inputs = torch.get_autocast_dtype(device), [*arguments]
        for index in range(len(inputs)) if indices is None else indices:
            value = inputs[index]
            if isinstance(value, Tensor) and value.is_floating_point():
                inputs[index] = value if value.dtype == torch.float64 else value.to(dtype)
        with torch._C._ExcludeDispatchKeyGuard(below):
            return registered(*inputs)

    return cast_and_call
