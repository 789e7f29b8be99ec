"""How Triton kernels are tested: interpreted, emulated, compiled on a GPU; poisoned memory.

Import this module before anything that imports Triton: `triton.jit` decides when it decorates whether a function is
compiled or interpreted, so one process can do only one of the two. Tests that compile start a process of their own with
`compiling_environment()`. Tests make their tensors on the CPU; `compiled_kernels` carries the arguments of every
launcher to the GPU, with their strides and shared memory, and its results back, so the same tests run on both.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tests.kernels.accuracy import assert_accurate, draws
from tests.kernels.cases import Arguments, Case, converted, run

if TYPE_CHECKING:
    from xfm_fast.kernels.triton.launch import LaunchConfig

# As tests/conftest.py decides it for the whole suite.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"
EMULATED = os.environ.get("XFM_EMULATE", "").split()
"""Architectures that kernels are emulated for."""
interpreted_only = pytest.mark.skipif(
    not INTERPRETED, reason="a compiled kernel keeps the constants it was made with"
)


def interpreted_kernels() -> None:
    """Skip the test module that imports this one where kernels can neither be interpreted nor compiled and run."""
    if not HAS_TRITON:
        pytest.skip("Triton is not installed", allow_module_level=True)
    if not INTERPRETED:
        if not torch.cuda.is_available() and "XFM_EMULATE" not in os.environ:
            pytest.skip(
                "TRITON_INTERPRET is not 1, and there is no GPU to run on", allow_module_level=True
            )
        return
    import triton
    import triton.language as tl

    if isinstance(tl.cdiv, triton.runtime.JITFunction):
        raise RuntimeError(
            "Triton was imported before TRITON_INTERPRET=1 was set; import tests.kernels.triton_testing first"
        )
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        _numbers_of_arrays()


def _numbers_of_arrays() -> None:
    """Older interpreters take the number out of an array of one element in a way that NumPy 2.4 gave up."""
    from triton.runtime import interpreter

    own = interpreter._patch_lang_tensor

    def patched(tensor: Any, *scope: Any) -> None:
        own(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patched


interpreted_kernels()


def _modules() -> list[Any]:
    """Those of all Triton kernels."""
    import xfm_fast.kernels.triton as family

    return [
        importlib.import_module(f"{family.__name__}.{name}")
        for _, name, _ in iter_modules(family.__path__)
    ]


# Before a test takes TRITON_INTERPRET out of the environment.
_modules()


class Carried:
    """A launcher whose tensors are carried to a device and back, each with the whole memory that it is a view of.

    Writes into arguments, and results in the memory of arguments, reach those of the caller. Calls among launchers,
    with tensors that are there already, go straight through.
    """

    def __init__(self, function: Callable[..., Any], device: torch.device) -> None:
        self.function, self.device = function, device
        self.__name__, self.__module__, self.__doc__ = (
            function.__name__,
            function.__module__,
            function.__doc__,
        )

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, form = pytree.tree_flatten((args, kwargs))
        if Carried._depth or not any(isinstance(leaf, Tensor) for leaf in leaves):
            return self.function(*args, **kwargs)
        here: dict[int, Tensor] = {}
        there: dict[int, Tensor] = {}

        def over(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            key = leaf.untyped_storage().data_ptr()
            if key not in there:
                here[key] = _whole_memory(leaf)
                # A copy even where the device is the same, so that the way there and back can be tested without a GPU.
                there[key] = here[key].to(self.device, copy=True)
            return _view(there[key], leaf)

        moved = pytree.tree_unflatten([over(leaf) for leaf in leaves], form)
        Carried._depth += 1
        try:
            found = self.function(*moved[0], **moved[1])
        finally:
            Carried._depth -= 1
        for key, memory in there.items():
            here[key].copy_(memory)
        of_arguments = {memory.untyped_storage().data_ptr(): key for key, memory in there.items()}

        def back(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            key = of_arguments.get(leaf.untyped_storage().data_ptr())
            return leaf.cpu() if key is None or not leaf.numel() else _view(here[key], leaf)

        return pytree.tree_map(back, found)

    _depth = 0


def _whole_memory(tensor: Tensor) -> Tensor:
    """The memory that a tensor is a view of, as bytes."""
    return torch.tensor([], dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _view(memory: Tensor, like: Tensor) -> Tensor:
    """The tensor in other memory that lies there as `like` lies in its own."""
    empty = torch.tensor([], dtype=like.dtype, device=memory.device)
    return empty.set_(memory.untyped_storage(), like.storage_offset(), like.shape, like.stride())


@contextmanager
def compiled_kernels(device: torch.device) -> Iterator[None]:
    """Within the block, the launchers of `xfm_fast.kernels.triton` take CPU tensors and run on this device, and the
    backend `triton` of the operations does.
    """
    import xfm_fast.kernels.triton as family
    from xfm_fast.kernels import backend

    modules = _modules()
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            for name, value in vars(module).copy().items():
                # Imported ones too: a module calls its neighbours' launchers by its own name for them.
                own = inspect.isfunction(value) and value.__module__.startswith(family.__name__)
                if own and not name.startswith("_"):
                    patch.setattr(module, name, Carried(value, device))
        why_not = backend._why_not
        patch.setattr(
            backend,
            "_why_not",
            lambda name, kind, index: (
                None if (name, kind) == ("triton", "cpu") else why_not(name, kind, index)
            ),
        )
        yield


def assert_triton_is_accurate(case: Case, arguments: Arguments, **options: Any) -> None:
    """Results and gradients of an operation by Triton are as accurate as plain PyTorch's, and of its dtypes.

    Memory that a kernel leaves unwritten holds NaN; `options` are for the operation on Triton only.
    """
    dtype = next(
        t.dtype for t in arguments.values() if isinstance(t, Tensor) and t.is_floating_point()
    )
    # Compiled sums are fused and in order, and GPUs compute fp32 exponentials to two units in the last place.
    compiled = not INTERPRETED and dtype == torch.float32
    plain = draws(lambda: run(case, converted(arguments, dtype), "reference"), fused=compiled)
    truth = run(case, converted(arguments, torch.float64), "reference")
    with poison():
        found = run(case, arguments, "triton", **options)
    for i, (value, true) in enumerate(zip(found, truth, strict=True)):
        assert value.dtype == plain[0][i].dtype
        assert_accurate(
            value, [each[i] for each in plain], true, f"result {i}", factor=2.5 if compiled else 2.0
        )


def philox(key: int, counter: Sequence[Any], rounds: int) -> list[np.ndarray]:
    """Philox4x32 (Salmon et al., SC 2011), written down a second time: four 32-bit words, held in 64 bits, for each
    counter of four such words.
    """
    low, high = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1, c2, c3 = np.broadcast_arrays(*counter)
    key0, key1 = key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF
    for _ in range(rounds):
        product0, product2 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c2 = (
            (product2 >> high) ^ c1 ^ np.uint64(key0),
            (product0 >> high) ^ c3 ^ np.uint64(key1),
        )
        c1, c3 = product2 & low, product0 & low
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


@contextmanager
def configured(config: Callable[[str], LaunchConfig]) -> Iterator[None]:
    """Within the block, kernels of attention take this configuration by their names."""
    from xfm_fast.kernels.triton import attention_tiles, launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_tiles, "config_for", lambda name, *_, **__: config(name))
        launch.cached_options.cache_clear()
        try:
            yield
        finally:
            launch.cached_options.cache_clear()


def compiling_environment() -> dict[str, str]:
    """The environment of a subprocess in which Triton compiles instead of interpreting."""
    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)
    }


@contextmanager
def poison() -> Iterator[None]:
    """Within the block, memory that PyTorch leaves uninitialised holds NaN (floats) or garbage (integers)."""
    places: list[tuple[Any, str]] = [
        (torch, name) for name in ("empty", "empty_like", "empty_strided")
    ]
    places += [(Tensor, name) for name in ("new_empty", "new_empty_strided")]

    def poisoned(original: Any) -> Any:
        @torch.no_grad()
        def allocate(*args: Any, **kwargs: Any) -> Tensor:
            tensor: Tensor = original(*args, **kwargs)
            if tensor.dtype == torch.bool:
                return tensor.fill_(True)
            return tensor.fill_(
                torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max // 3
            )

        return allocate

    with pytest.MonkeyPatch.context() as patch:
        for place, name in places:
            patch.setattr(place, name, poisoned(getattr(place, name)))
        yield
