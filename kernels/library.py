"""Operators registered with PyTorch: one node for `torch.compile`, with gradient and autocast.

Implementations are registered with define/impl for CPU and CUDA rather than `triton_op`: ahead-of-time autograd
decomposes a `triton_op` even for CPU tensors and so bypasses the CPU implementation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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

    Args:
        schema: `"name(Tensor x, int n) -> Tensor"`.
        implementation: runs on CPU and CUDA tensors, there on the device of its first tensor.
        fake: gives shapes, strides and dtypes of the results.
        setup_context, backward: as in `torch.library.register_autograd`; second derivatives raise an error.
        autocast: convert floating-point tensor arguments to autocast's dtype: all, or the arguments at these places. An
            empty tuple leaves it to the operator, which then saves no converted copy of a model's weights.
    """
    name = schema.split("(")[0]
    qualified = f"{NAMESPACE}::{name}"
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CPU")
    _library.impl(name, on_device_of_arguments(implementation), "CUDA")
    torch.library.register_fake(qualified, fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(qualified, _once(name, backward), setup_context=setup_context, lib=_library)
    registered = getattr(getattr(torch.ops, NAMESPACE), name).default
    if autocast is not False:
        for device, key in _AUTOCAST.items():
            places = None if autocast is True else autocast
            _library.impl(name, _casting(registered, device, key, places), key)
    return registered


class _Once(torch.autograd.Function):
    """A gradient as it is, which has no gradient with respect to what it was computed from."""

    @staticmethod
    def forward(ctx: Any, name: str, gradient: Tensor, *_: Tensor | None) -> Tensor:
        ctx.name = name
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise InputError(f"{ctx.name} has no second derivative; compute it within ops.use_backend('reference')")


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
        device = next(a.device for a in arguments if isinstance(a, Tensor) and a.device.type == "cuda")
        with torch.cuda.device(device):
            return implementation(*arguments)

    return run


def like(*places: int) -> Callable[..., tuple[Tensor, ...]]:
    """A fake with the shapes and dtypes of the arguments at these places."""
    return lambda *given: tuple(given[i].new_empty(given[i].shape) for i in places)


def _casting(
    registered: Callable[..., Any], device: str, key: str, places: tuple[int, ...] | None
) -> Callable[..., Any]:
    # torch.library.register_autocast fixes one type at registration; autocast's own type can be fp16 or bf16.
    below = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast_and_call(*arguments: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(below):
            return registered(
                *(_cast(a, dtype) if places is None or i in places else a for i, a in enumerate(arguments))
            )

    return cast_and_call


def _cast(argument: Any, dtype: torch.dtype) -> Any:
    if isinstance(argument, Tensor) and argument.is_floating_point() and argument.dtype != torch.float64:
        return argument.to(dtype)
    return argument
