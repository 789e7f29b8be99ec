"""Selection of the implementation: by the device, or by name for a call or a block."""

from __future__ import annotations

import importlib
import importlib.util
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

from xfm_fast.errors import InputError

if TYPE_CHECKING:
    from .emulation import Launch

_Function = TypeVar("_Function", bound=Callable[..., Any])

Backend = Literal["auto", "reference", "cpu", "triton", "flash_attn"]
_BACKENDS: tuple[Backend, ...] = get_args(Backend)
# Compute capability below which the Triton kernels do not run: Ampere brought bf16 and asynchronous copies.
_OLDEST_GPU = (8, 0)


class _Block(threading.local):
    """The backend of the current thread's block (the compiler can trace a thread-local, not a context variable)."""

    backend: Backend = "auto"


_block = _Block()


@contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Run the operations of a block on the named backend."""
    outside, _block.backend = _block.backend, _checked(name)
    try:
        yield
    finally:
        _block.backend = outside


_emulated: list[int] = []


@contextmanager
def emulating(target: str, **options: Any) -> Iterator[list[Launch]]:
    """Let the backend `triton` take CPU tensors within the block and run them by `emulation.emulated`."""
    from .emulation import emulated

    with emulated(target, **options) as launches:
        _emulated.append(int(target.removeprefix("sm_")))
        try:
            yield launches
        finally:
            _emulated.pop()


def emulated_architecture() -> int | None:
    """Return the architecture of the block of `emulating`, or None outside."""
    return _emulated[-1] if _emulated else None


def resolve(backend: Backend | None, *tensors: Tensor | None, has_flash: bool = False) -> Backend:
    """Return the backend that runs an operation on these tensors: `reference`, `cpu`, `triton` or `flash_attn`.

    `has_flash` marks attention: other operations treat a block of `flash_attn` as `auto`, and attention on Hopper needs
    a compiler without the faults of `hopper_fault`. ValueError for nested, sparse and quantised tensors, for tensors on
    several devices, and for a named backend that cannot run here; `auto` falls back to `reference`, as it does within
    `torch.func`, forward-mode differentiation and traces, and for tensors that are not `plain`.
    """
    name = _block.backend if backend is None else _checked(backend)
    if name == "flash_attn" and not has_flash:
        if backend is not None:
            raise InputError(
                "backend 'flash_attn' has attention of packed sequences only; use 'auto' or another one"
            )
        name = "auto"
    device, double = None, False
    for tensor in tensors:
        if tensor is None:
            continue
        dense = tensor.layout is torch.strided or tensor.is_mkldnn
        if tensor.is_nested or tensor.is_quantized or not dense:
            raise InputError(
                f"a tensor is nested, sparse or quantised ({tensor.layout}, {tensor.dtype}); give a dense one, as from "
                "to_padded_tensor(), to_dense() or dequantize()"
            )
        if device is None:
            device = tensor.device
        elif tensor.device != device:
            raise InputError(
                f"tensors live on {device} and {tensor.device}; move them to one device"
            )
        double = double or tensor.dtype == torch.float64
    assert device is not None
    if torch.compiler.is_exporting():
        # What reads an exported graph does not have this project's operators.
        return "reference"
    if transformed():
        if name not in ("auto", "reference"):
            raise InputError(
                f"backend {name!r} knows neither torch.func nor forward mode; use 'auto' or 'reference'"
            )
        return "reference"
    if not torch.compiler.is_compiling() and (traced() or not plain(*tensors)):
        if name not in ("auto", "reference"):
            classes = sorted({type(tensor).__name__ for tensor in tensors if tensor is not None})
            raise InputError(
                f"backend {name!r} reads memory, which a trace does not record and a tensor subclass may lack (here "
                f"{', '.join(classes)}); use 'auto' or 'reference'"
            )
        return "reference"
    if name == "auto":
        if device.type == "cpu":
            return "cpu"
        if double or _why_not("triton", device.type, device.index) is not None:
            return "reference"
        if has_flash and (fault := _compiler_fault(device.type, device.index)) is not None:
            _warn(fault)
            return "reference"
        return "triton"
    why_not = _why_not(name, device.type, device.index)
    if why_not is None and name == "triton" and has_flash:
        why_not = _compiler_fault(device.type, device.index)
    if double and name == "triton" and why_not is None:
        why_not = "a tensor is float64 and the kernels compute in fp32 at most"
    if why_not is not None:
        raise InputError(f"backend {name!r} cannot run: {why_not}; use 'auto' or another one")
    return name


def named(backend: Backend | None) -> bool:
    """Return whether the caller named a backend, which must not be replaced."""
    return (_block.backend if backend is None else backend) != "auto"


def _checked(name: Backend) -> Backend:
    if name not in _BACKENDS:
        raise InputError(f"backend {name!r} is unknown; choose one of {', '.join(_BACKENDS)}")
    return name


AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}
"""Dispatch keys of autocast by device; other devices have no registered operators."""


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype of autocast on a device with registered operators; None where it is off."""
    if device.type not in AUTOCAST_KEYS or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def constant_when_compiled(function: _Function) -> _Function:
    """Mark a function as `torch.compiler.assume_constant_result` does, without importing all of the compiler."""
    setattr(function, "_dynamo_marked_constant", True)  # noqa: B010
    return function


@constant_when_compiled
def transformed() -> bool:
    """Return whether a functorch transform or forward-mode differentiation is active, which kernels do not support."""
    level = torch._C._functorch.maybe_current_level()  # pyright: ignore[reportAttributeAccessIssue]
    return level is not None or forward_ad._current_level >= 0


PLAIN: set[type[Tensor]] = {Tensor, nn.Parameter}
"""Classes of tensors whose memory kernels may read."""
PACKED: set[type[Tensor]] = set()
"""Those in a layout that kernels know and PyTorch does not."""
_keys = torch._C._dispatch_keys
# Dispatch keys of dense tensors, made in inference mode or not: no subclass, lazy conjugate, wrapper or proxy.
_DENSE: set[int] = set()
_RECORDING = [
    getattr(torch._C._TorchDispatchModeKey, name) for name in ("FAKE", "PROXY", "FUNCTIONAL")
]


def readable(*tensors: Tensor | None) -> bool:
    """Return whether kernels may read these tensors by address: all are `plain`, and nothing is `traced`."""
    return not traced() and plain(*tensors)


def plain(*tensors: Tensor | None) -> bool:
    """Return whether all tensors have memory of their own, dense or frozen in a layout, on any device."""
    for tensor in tensors:
        if tensor is None or (type(tensor) in PLAIN and _keys(tensor).raw_repr() in _DENSE):
            continue
        if type(tensor) not in PLAIN or not _is_dense(tensor):
            return False
    return True


def traced() -> bool:
    """Return whether operations are recorded or replaced (`make_fx`, `torch.jit.trace`, `FakeTensorMode`)."""
    if torch._C._get_tracing_state() is not None or _len_torch_dispatch_stack_pre_dispatch():
        return True
    # Modes that only observe, such as a counter of operations, do not matter.
    return torch._C._len_torch_dispatch_stack() > 0 and any(
        torch._C._get_dispatch_mode(key) is not None for key in _RECORDING
    )


@contextmanager
def untraced() -> Iterator[None]:
    """Run operations within the block instead of recording them: their results are constants of a trace."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with _disable_current_modes():
            yield
    finally:
        torch._C._set_tracing_state(state)  # pyright: ignore[reportAttributeAccessIssue]


def _is_dense(tensor: Tensor) -> bool:
    if tensor.is_mkldnn or type(tensor) in PACKED:
        return True
    for inference in (False, True):
        with torch.inference_mode(inference):
            keys = _keys(torch.empty(0, device=tensor.device)).raw_repr()
        if _keys(tensor).raw_repr() == keys:
            _DENSE.add(keys)
            return True
    return False


@constant_when_compiled
def _why_not(name: Backend, device: str, index: int | None) -> str | None:
    """Return the reason why a backend cannot run on a device, or None."""
    if name == "reference":
        return None
    if name == "cpu":
        return None if device == "cpu" else f"a tensor lives on {device}"
    if name == "triton" and not _installed("triton"):
        return "the package triton is not installed"
    flash = _installed("flash_attn") or _installed("flash_attn_interface")
    if name == "flash_attn" and not flash:
        return "the package flash_attn is not installed"
    # The interpreter and the emulation run Triton kernels on CPU tensors: slow, for tests.
    interpreted = _emulated or os.environ.get("TRITON_INTERPRET") == "1"
    if name == "triton" and device == "cpu" and interpreted:
        return None
    if device != "cuda":
        return f"it needs a CUDA GPU and the tensors live on {device}"
    capability = torch.cuda.get_device_capability(index)
    if capability < _OLDEST_GPU:
        return f"GPU {index} has compute capability {capability[0]}.{capability[1]} and the kernels need 8.0"
    return None


@constant_when_compiled
def _compiler_fault(device: str, index: int | None) -> str | None:
    """Return the reason why compiled attention would be wrong on a device, or None."""
    if device != "cuda" or torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(index)
    arch = 10 * major + minor
    fault = compiler_fault(arch)
    if fault is None or not os.environ.get("XFM_PREPARED_KERNELS"):
        return fault
    # By name: it imports this module.
    why_not = importlib.import_module(f"{__package__}.prepared").why_not(arch)
    return None if why_not is None else f"{fault}; {why_not}"


def compiler_fault(arch: int) -> str | None:
    """Return the fault of this machine's compilers that makes attention wrong on an NVIDIA architecture, or None."""
    if arch // 10 == 9:
        return hopper_fault(*compiler_versions())
    return blackwell_fault(compiler_versions()[0]) if arch // 10 == 10 else None


def hopper_fault(triton: str, ptxas: str) -> str | None:
    """Return the fault of a compiler that makes attention wrong on Hopper, or None.

    Before 3.7.1, Triton does not order an asynchronous copy to shared memory before the tensor cores that read it.
    Before 13.3, ptxas overwrites registers that the tensor cores still read.
    """
    remedy = "install triton >= 3.9, or set TRITON_PTXAS_PATH to ptxas >= 13.3 with triton >= 3.7.1"
    if version_numbers(triton) < (3, 7, 1):
        return f"Triton {triton} lacks fences before the tensor cores of Hopper; {remedy}"
    if version_numbers(ptxas) < (13, 3):
        return f"ptxas {ptxas} overwrites operands of the tensor cores of Hopper; {remedy}"
    return None


def blackwell_fault(triton: str) -> str | None:
    """Return the fault of Triton that makes attention wrong on GPUs with tensor memory (sm_100), or None.

    3.5.1 and 3.7.0 lack proxy fences before the tensor cores, and a barrier between loads of tensor memory and stores
    over it; 3.9.0 has both, and versions between were not tried.
    """
    if version_numbers(triton) < (3, 9):
        return f"Triton {triton} lacks fences and barriers for the tensor cores of Blackwell; install triton >= 3.9"
    return None


@cache
def compiler_versions(arch: int = 90) -> tuple[str, str]:
    """Return the versions of Triton and of the ptxas that assembles an architecture's code."""
    import triton
    from triton.backends.nvidia.compiler import get_ptxas

    return triton.__version__, str(get_ptxas(arch).version)


def version_numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a version: 3.7.1+git → (3, 7, 1)."""
    return tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdecimal())


@constant_when_compiled
@cache
def _warn(fault: str) -> None:
    warnings.warn(f"attention runs on PyTorch's kernels: {fault}", RuntimeWarning, stacklevel=2)


@cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
