"""Operators registered with PyTorch: one node for `torch.compile`, with gradient and autocast.

Implementations are registered with define/impl for CPU and CUDA rather than `triton_op`: ahead-of-time autograd
decomposes a `triton_op` even for CPU tensors and so bypasses the CPU implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import formatannotation
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from xfm_fast.errors import InputError

NAMESPACE = "xfm_fast"
_library = torch.library.Library(NAMESPACE, "DEF")
_AUTOCAST = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def operator(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    autocast: bool | tuple[int, ...] = False,
) -> Callable[..., Any]:
    """Register an operator and return it.

    The implementation runs on CPU and CUDA tensors, there on the device of its first tensor. `setup_context` and
    `backward` are as in `torch.library.register_autograd`; second derivatives raise an error. `autocast` converts
    floating-point tensor arguments to autocast's dtype: all, or the arguments at these places. An empty tuple leaves it
    to the operator, which then saves no converted copy of a model's weights.
    """
    name = schema.split("(")[0]
    qualified = f"{NAMESPACE}::{name}"
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CPU")
    _library.impl(name, on_device_of_arguments(implementation), "CUDA")
    torch.library.register_fake(qualified, fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(
            qualified, _once(name, backward), setup_context=setup_context, lib=_library
        )
    registered = getattr(getattr(torch.ops, NAMESPACE), name).default
    if autocast is not False:
        for device, key in _AUTOCAST.items():
            places = None if autocast is True else autocast
            _library.impl(name, _casting(registered, device, key, places), key)
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
Tensors = Sequence[Any]
"""Outputs; None for one that was not saved."""
Gradients = Sequence[Tensor | None]


def differentiable(
    name: str,
    arguments: type[Any],
    forward: Callable[[Any, str], Tensors],
    fake: Callable[[Any, str], Tensors],
    backward: Callable[[Gradients, Any, Tensors, Sequence[bool], str], Gradients],
    *,
    wrt: tuple[str, ...],
    outputs: int,
    results: int | Callable[[Any, str], int] = 1,
    keep: Callable[[Any, Tensors, str], tuple[Any, Tensors]] | None = None,
    around: Callable[..., Gradients] | None = None,
    backward_fake: Callable[[Any, Tensors, Sequence[bool]], Gradients] | None = None,
    autocast: bool | tuple[int, ...] = False,
) -> Callable[..., tuple[Tensor, ...]]:
    """Register an operation and its gradient as operators; returns `call(arguments, backend)`, the outputs.

    `arguments` is a named tuple, whose annotations are the schema; tensors in a list are parts of one, and `backward`
    returns the gradient of their concatenation. `wrt`: the arguments with a gradient. `forward` returns `outputs`
    tensors, of which the first `results`, at most two, have a gradient; the others arrive in `backward` too, as does
    None for an upstream gradient of zeros. `keep` is what is saved of arguments and outputs, by default all. `around`
    wraps the operator of the gradient. `backward_fake` gives the gradients' shapes, by default those of the arguments.
    """
    fields: tuple[str, ...] = arguments._fields
    kinds = _schema_types(name, arguments)
    most = min(2, outputs) if callable(results) else results
    lists = [place for place, kind in enumerate(kinds) if kind == "Tensor[]"]
    places = [fields.index(field) for field in wrt]

    def schema(kinds: list[str]) -> str:
        return ", ".join(f"{kind} {field}" for kind, field in zip(kinds, fields, strict=True))

    def returned(count: int) -> str:
        return f"({', '.join(['Tensor'] * count)})"

    def run_backward(*given: Any) -> Any:
        upstream, rest = given[:most], given[most:]
        values, kept, (needs, backend) = rest[: len(fields)], rest[len(fields) : -2], rest[-2:]
        found = backward(upstream, arguments(*values), kept, needs, backend)
        return _results(_present(found, needs, upstream))

    def fake_backward(*given: Any) -> Any:
        upstream, rest = given[:most], given[most:]
        saved, kept, needs = arguments(*rest[: len(fields)]), rest[len(fields) : -2], rest[-2]
        if backward_fake is not None:
            return _results(_present(backward_fake(saved, kept, needs), needs, upstream))
        wholes = [getattr(saved, field) for field in wrt]
        wholes = [torch.cat(t) if isinstance(t, list) and t else t for t in wholes]
        made = [t.new_empty(t.shape) if isinstance(t, Tensor) else None for t in wholes]
        return _results(_present(made, needs, upstream))

    upstream_schema = ", ".join(f"Tensor? d{i}" for i in range(most))
    kept_schema = ", ".join(f"Tensor? kept{i}" for i in range(outputs))
    optional = schema(["Tensor?" if kind == "Tensor" else kind for kind in kinds])
    gradient = operator(
        f"{name}_backward({upstream_schema}, {optional}, {kept_schema}, bool[] needed, str backend) "
        f"-> {returned(len(wrt))}",
        run_backward,
        fake_backward,
        autocast=() if autocast == () else False,
    )

    def call_gradient(
        upstream: Gradients, saved: Any, kept: Tensors, needs: Sequence[bool], backend: str
    ) -> list[Tensor | None]:
        found = _tuple_of(gradient(*upstream, *saved, *kept, needs, backend))
        return [g if need else None for g, need in zip(found, needs, strict=True)]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        saved, ctx.backend, output = arguments(*inputs[:-1]), inputs[-1], _tuple_of(output)
        count = results(saved, ctx.backend) if callable(results) else results
        ctx.mark_non_differentiable(*output[count:])
        # Or else zeros are written for results that have no gradient.
        ctx.set_materialize_grads(False)
        kept = output if keep is None else ()
        if keep is not None:
            saved, kept = keep(saved, output, ctx.backend)
        values, parts = [*saved, *kept], list[Tensor]()
        for place in lists:
            parts += values[place]
            values[place] = len(values[place])
        ctx.save_for_backward(
            *[value if isinstance(value, Tensor) else None for value in values], *parts
        )
        ctx.values = [None if isinstance(value, Tensor) else value for value in values]

    def run_gradient(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        made: dict[str, Any] = {}
        if any(g is not None for g in upstream[:most]):
            tensors, count = ctx.saved_tensors, len(ctx.values)
            values = [
                v if t is None else t for t, v in zip(tensors[:count], ctx.values, strict=True)
            ]
            for place in lists:
                values[place], count = (
                    [*tensors[count : count + values[place]]],
                    count + values[place],
                )
            saved, wanted = (
                arguments(*values[: len(fields)]),
                [ctx.needs_input_grad[place] for place in places],
            )
            needs = [any(need) if isinstance(need, (list, tuple)) else need for need in wanted]
            given = (upstream[:most], saved, values[len(fields) :], needs, ctx.backend)
            found = call_gradient(*given) if around is None else around(call_gradient, *given)
            for field, g, need in zip(wrt, found, wanted, strict=True):
                parts = getattr(saved, field)
                made[field] = _divided(g, parts, need) if isinstance(parts, list) else g
        for field, need in zip(fields, ctx.needs_input_grad, strict=False):
            if isinstance(need, (list, tuple)):
                made.setdefault(field, [None] * len(need))
        return (*(made.get(field) for field in fields), None)

    registered = operator(
        f"{name}({schema(kinds)}, str backend) -> {returned(outputs)}",
        lambda *given: _results(forward(arguments(*given[:-1]), given[-1])),
        lambda *given: _results(fake(arguments(*given[:-1]), given[-1])),
        setup_context=setup_context,
        backward=run_gradient,
        autocast=autocast,
    )
    return lambda given, backend: _tuple_of(registered(*given, backend))


def _schema_types(name: str, arguments: type[Any]) -> list[str]:
    """Return the type in a schema of every field of a named tuple."""
    hints = get_type_hints(arguments)
    for field in arguments._fields:
        if hints[field] not in _TYPES:
            hint, known = formatannotation(hints[field]), ", ".join(map(formatannotation, _TYPES))
            raise InputError(
                f"{name}: the field {field} of {arguments.__name__} is {hint}; use one of {known}"
            )
    return [_TYPES[hints[field]] for field in arguments._fields]


def _results(tensors: Sequence[Tensor]) -> Any:
    """Return what an operator with these results returns: a single one stands alone."""
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


def _tuple_of(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else results


def _divided(gradient: Tensor | None, parts: Tensors, needs: Sequence[bool]) -> list[Tensor | None]:
    """The gradient of every part of a concatenation."""
    if gradient is None:
        return [None] * len(parts)
    pairs = zip(gradient.split([len(part) for part in parts]), needs, strict=True)
    return [part if need else None for part, need in pairs]


def _present(found: Gradients, needs: Sequence[bool], upstream: Gradients) -> tuple[Tensor, ...]:
    """Gradients, and empty tensors for those that nobody needs: an operator returns tensors only."""
    like = next(g for g in upstream if g is not None)
    pairs = zip(found, needs, strict=True)
    return tuple(g if need and g is not None else like.new_empty(0) for g, need in pairs)


class _Once(torch.autograd.Function):
    """A gradient as it is, which has no gradient with respect to what it was computed from."""

    @staticmethod
    def forward(ctx: Any, name: str, gradient: Tensor, *_: Tensor | None) -> Tensor:
        ctx.name = name
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise InputError(
            f"{ctx.name} has no second derivative; compute it within ops.use_backend('reference')"
        )


def _once(name: str, backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass that raises in second derivatives, since its kernels record no graph."""

    def gradients(ctx: Any, *upstream: Tensor | None) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *upstream)
        # Only with create_graph=True.
        with torch.no_grad():
            found = backward(ctx, *upstream)
        sources = (*upstream, *ctx.saved_tensors)
        return pytree.tree_map_only(Tensor, lambda g: _Once.apply(name, g, *sources), found)

    return gradients


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast on a device with registered operators; None where it is off."""
    if device.type not in _AUTOCAST or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def on_device_of_arguments(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """The implementation, run with the device of its first argument on a GPU as the current one."""

    def run(*arguments: Any) -> Any:
        device = next(
            a.device for a in arguments if isinstance(a, Tensor) and a.device.type == "cuda"
        )
        with torch.cuda.device(device):
            return implementation(*arguments)

    return run


def _casting(
    registered: Callable[..., Any], device: str, key: str, places: tuple[int, ...] | None
) -> Callable[..., Any]:
    # torch.library.register_autocast fixes one type at registration; autocast's own type can be fp16 or bf16.
    below = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast_and_call(*arguments: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(below):
            return registered(
                *(
                    _cast(a, dtype) if places is None or i in places else a
                    for i, a in enumerate(arguments)
                )
            )

    return cast_and_call


def _cast(argument: Any, dtype: torch.dtype) -> Any:
    if (
        isinstance(argument, Tensor)
        and argument.is_floating_point()
        and argument.dtype != torch.float64
    ):
        return argument.to(dtype)
    return argument
