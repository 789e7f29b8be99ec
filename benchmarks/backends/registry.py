"""The backends of the model: the works and dtypes of each, why one may be absent, and how it is loaded."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

import xfm_fast
from xfm_fast.errors import UnavailableError
from xfm_fast.export.runtimes import RUNTIMES, Runtime
from xfm_fast.kernels.cpu import int8
from xfm_fast.testing import SharedWeights

from ..record import OFFICIAL, OFFICIAL_CODE, OURS, Extra
from ..timing import DTYPES, why_not_compiled
from . import Engine, Schedule
from .official_code import CLONE_MARK, official_code_engine
from .official_finetuning import official_engine
from .ours import GRAPHS, export_engine, our_engine, served
from .public_modules import timm_engine, transformers_engine

# Of the largest value: a few times what rounding to int8 costs the base model.
INT8_BAND = 0.1
MODEL_WORK = tuple(GRAPHS)
# Encoders of Hugging Face that a kind of work passes through.
_ENCODERS = {
    "embed-image": frozenset({"vision"}),
    "embed-text": frozenset({"text"}),
    "rerank": frozenset({"fusion"}),
    "retrieve": frozenset({"text", "fusion"}),
}


@dataclass(frozen=True)
class Setup:
    """What a backend is loaded from; `scratch` is a folder for files of the run, `official` the official clone."""

    weights: SharedWeights
    work: str
    image_size: int
    dtype: str
    device: torch.device
    scratch: Path
    official: Path | None = None

    @property
    def model(self) -> Any:
        """The model in memory, shared by all backends."""
        return self.weights.model(self.image_size, DTYPES[self.dtype], self.work)


@dataclass(frozen=True)
class ModelBackend:
    """One way to do the work of the model.

    Attributes:
        name: stable; `label` is for readers.
        make: makes an engine; it may raise any error of its library.
        works: kinds of work that it takes part in (None: all).
        why_absent: the reason why it does not run on a device.
        package: has the version.
        heavy: it takes a minute or more to build, so that quick runs leave it out.
        by_name: it takes part only by its name.
        schedule: counts its operations.
        band: its allowed error, where rounding in a dtype does not explain it.
    """

    name: str
    label: str
    make: Callable[[Setup], Engine]
    works: tuple[str, ...] | None = MODEL_WORK
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    why_absent: Callable[[torch.device], str | None] = lambda device: None
    package: str = "torch"
    heavy: bool = False
    by_name: bool = False
    schedule: Schedule | None = "official"
    band: float | None = None

    @property
    def version(self) -> str | None:
        """Version of its package, None if absent."""
        return xfm_fast.__version__ if self.package == "xfm_fast" else _version(self.package)

    def load(self, setup: Setup) -> tuple[Engine, Extra]:
        """Return an engine, and the cost of its cold start: see `record`."""
        _ = setup.model  # weights are converted once and shared by all backends
        start = time.perf_counter()
        engine = self.make(setup)
        return engine, engine.cost or {"build_s": 0.0, "load_s": time.perf_counter() - start}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _official_code(setup: Setup) -> Engine:
    if setup.official is None:
        raise UnavailableError("--official names no clone of the official repository")
    return official_code_engine(setup.model, setup.official)


def _needs(
    *packages: str, on: Literal["cpu", "cuda"] | None = None
) -> Callable[[torch.device], str | None]:
    def why_absent(device: torch.device) -> str | None:
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        if missing:
            return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed"
        if on is None or device.type == on:
            return None
        if on == "cpu":
            return "runs on the CPU here"
        return f"needs an NVIDIA GPU, and this run is on {device.type}"

    return why_absent


def _torch_tensorrt(name: str, label: str, library: str) -> ModelBackend:
    """Return a variant of Torch-TensorRT; both are one module, so the distribution decides which one is here."""

    def why_absent(device: torch.device) -> str | None:
        if _version(name) is None:
            return f"{name} is not installed"
        return _needs("torch_tensorrt", library, on="cuda")(device)

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        # Its import registers the backend; by default GEMMs of fp32 are rounded to TF32.
        importlib.import_module("torch_tensorrt")
        return torch.compile(function, backend="tensorrt", options={"disable_tf32": True})

    return ModelBackend(
        name,
        f"official algorithm, {label}",
        lambda setup: official_engine(setup.model, compiled),
        why_absent=why_absent,
        package=name,
        heavy=True,
    )


def export_backends(runtime: type[Runtime]) -> Iterator[ModelBackend]:
    """Yield a runtime of exports; on a CPU with packed texts and int8 GEMMs too, which a run names with --baselines."""

    def make(setup: Setup, **form: bool) -> Engine:
        model = setup.weights.model(setup.image_size, torch.float32)
        dtype: Any = setup.dtype
        return export_engine(
            model, runtime.name, dtype, setup.work, setup.scratch, setup.device, **form
        )

    def why_not_on_cpu(device: torch.device) -> str | None:
        return "is measured on the CPU" if device.type != "cpu" else runtime.why_absent(device)

    backend = partial(
        ModelBackend,
        dtypes=runtime.dtypes,
        package=runtime.package.replace("_", "-"),
        heavy=True,
        schedule=None,
    )
    yield backend(
        runtime.name,
        runtime.title,
        make,
        why_absent=runtime.why_absent,
        by_name=not runtime.automatic,
    )
    if runtime.kind != "onnx":
        return
    yield backend(
        f"{runtime.name}-packed",
        f"{runtime.title}, packed texts",
        partial(make, packed=True),
        ("embed-text", "rerank"),
        why_absent=why_not_on_cpu,
        by_name=True,
    )
    yield backend(
        f"{runtime.name}-int8",
        f"{runtime.title}, int8",
        partial(make, int8=True),
        ("embed-image", "embed-text", "rerank"),
        why_absent=why_not_on_cpu,
        by_name=True,
        band=INT8_BAND,
    )


BACKENDS: tuple[ModelBackend, ...] = (
    ModelBackend(
        OURS,
        "xfm-fast",
        lambda setup: our_engine(served(setup.model)),
        None,
        package="xfm_fast",
        schedule="ours",
    ),
    ModelBackend(
        OFFICIAL, "official algorithm, eager", lambda setup: official_engine(setup.model), None
    ),
    ModelBackend(
        "xfm-fast-int8",
        "xfm-fast, GEMMs in int8",
        # A copy: the weights are shared by all backends, and quantising marks them.
        lambda setup: our_engine(copy.deepcopy(setup.model).quantise()),
        dtypes=("bf16",),
        package="xfm_fast",
        schedule="ours",
        band=INT8_BAND,
        why_absent=lambda device: int8.why_not() if device.type == "cpu" else "int8 is for CPUs",
    ),
    ModelBackend(
        OFFICIAL_CODE,
        "official code, a process of its own",
        _official_code,
        dtypes=("fp32",),
        why_absent=_needs("transformers", "timm", on="cpu"),
        package="transformers",
    ),
    ModelBackend(
        "torch-eager",
        "xfm-fast's schedule, plain PyTorch operations",
        lambda setup: our_engine(setup.model, "reference"),
        None,
        schedule="ours",
    ),
    ModelBackend(
        "torch-compile",
        "official algorithm, torch.compile",
        lambda setup: official_engine(setup.model, torch.compile),
        why_absent=why_not_compiled,
        heavy=True,
    ),
    _torch_tensorrt("torch-tensorrt", "Torch-TensorRT", "tensorrt"),
    _torch_tensorrt("torch-tensorrt-rtx", "Torch-TensorRT for RTX", "tensorrt_rtx"),
    ModelBackend(
        "huggingface",
        "Hugging Face transformers",
        lambda setup: transformers_engine(setup.model, _ENCODERS[setup.work]),
        why_absent=_needs("transformers"),
        package="transformers",
        schedule=None,
    ),
    ModelBackend(
        "timm",
        "timm",
        lambda setup: timm_engine(setup.model),
        ("embed-image",),
        why_absent=_needs("timm"),
        package="timm",
        schedule=None,
    ),
    ModelBackend(
        "flash-attn",
        "xfm-fast with flash-attn",
        lambda setup: our_engine(setup.model, "flash_attn"),
        ("embed-text", "rerank", "retrieve"),
        ("bf16",),
        _needs("flash_attn", on="cuda"),
        package="flash-attn",
        schedule="ours",
    ),
    *(backend for runtime in RUNTIMES.values() for backend in export_backends(runtime)),
)


def choose(
    names: Sequence[str],
    work: str,
    device: torch.device,
    *,
    quick: bool,
    official: Path | None = None,
) -> tuple[list[ModelBackend], dict[str, str]]:
    """Return the backends at a kind of work, and the reasons why the others are left out.

    xfm-fast and the official algorithm, to which everything is compared, always take part. No `names` stand for all
    backends that are installed, without the heavy ones in a quick run; `official` is a clone of the official code.
    Raises `UnavailableError` for an unknown name, or if `official` is no clone.
    """
    backends = {backend.name: backend for backend in BACKENDS}
    if unknown := [name for name in names if name not in backends]:
        raise UnavailableError(
            f"baseline {unknown[0]!r} is unknown; choose from {', '.join(backends)}"
        )
    # A path without the code must not end in a table without its row.
    if official is not None and not (official / CLONE_MARK).is_file():
        raise UnavailableError(
            f"--official {official} has no {CLONE_MARK}; name a clone of the official repository"
        )
    present, absent = [], {}
    for name, backend in backends.items():
        why = backend.why_absent(device)
        if backend.works is not None and work not in backend.works:
            why = f"has no {work}"
        elif name in (OURS, OFFICIAL):
            why = None
        elif name == OFFICIAL_CODE and official is None:
            why = "--official names no clone of the official repository"
        elif names and name not in names and name != OFFICIAL_CODE:
            why = "was not asked for"
        elif why is None and not names and backend.by_name:
            why = f"takes part by name; --baselines {name} takes it in"
        elif why is None and not names and quick and backend.heavy:
            why = f"is left out of quick runs; --baselines {name} takes it in"
        if why is None:
            present.append(backend)
        else:
            absent[name] = why
    return present, absent
