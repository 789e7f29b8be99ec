"""The registry of runtimes: the libraries that run exported graphs, one class and one file each.

    @register
    class Toy(Runtime):
        name, title, package = "toy", "Toy", "toy_library"

        def load(self, record, path): ...

`export_onnx(..., consumer="toy")`, `verify(folder, "toy")`, `Session.load(folder, "toy")` and the benchmarks then take
it. The files of this folder register themselves. They import PyTorch and their library on first use, so that the
requests of the commands are read without them.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypeVar, get_args

from xfm_fast.errors import ExportError, UnavailableError

from ..request import AttentionForm, DType, ExportRequest, OnnxRequest, Precision

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..manifest import GraphRecord, Manifest
    from ..slots import Slot

_ATTENTION_OPSET = 23
_BF16_OPSET = 22
_GELU_OPSET = 20
_NEWEST_OPSET = 24

LARGEST_FILE = 2**31 - 2**20
"""Protobuf reads no message of two gigabytes; larger graphs keep their weights beside the file."""


class Spelling(NamedTuple):
    """Form of attention and ONNX opset of a graph."""

    form: AttentionForm
    opset: int


class LoadedGraph(Protocol):
    """A graph that is ready to run."""

    def run(
        self, inputs: Mapping[str, Tensor], slot: Slot, sizes: Mapping[str, int], /
    ) -> dict[str, Tensor]:
        """All outputs by name, for contiguous inputs on the runtime's device with the sizes of a slot."""
        ...


class RunFunction:
    """A `LoadedGraph` made of a function."""

    def __init__(
        self, run: Callable[[Mapping[str, Tensor], Slot, Mapping[str, int]], dict[str, Tensor]]
    ) -> None:
        self.run = run


class Runtime:
    """A library on a device. A subclass sets the class attributes; its constructor checks machine and export.

    Attributes:
        name: Of the runtime, in options.
        title: Of the library, in messages.
        kind: The kind of export that it runs.
        package: The module that it imports.
        extra: The extra of this project that installs it.
        request: The options of its export.
        exporter: The function that exports for it, called with model, folder, request and consumer.
        automatic: False for files that run code when they are loaded, which a user names.
        precisions: The dtypes that it can compute an fp32 export in, an argument `precision` of the constructor.
        dtypes: The dtypes that benchmarks run it in.
        devices: The devices that it runs on.
        description: Library, version and device, for the manifest.
        device: Where inputs and outputs lie.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    kind: ClassVar[str] = "onnx"
    package: ClassVar[str]
    extra: ClassVar[str] = ""
    request: ClassVar[type[ExportRequest]] = OnnxRequest
    exporter: ClassVar[str] = "xfm_fast.export.onnx:export_onnx"
    automatic: ClassVar[bool] = True
    precisions: ClassVar[tuple[Precision, ...]] = ()
    dtypes: ClassVar[tuple[DType, ...]] = ("fp32", "bf16")
    devices: ClassVar[tuple[str, ...]] = ("cpu",)

    description: str
    device: torch.device

    def __init__(self, manifest: Manifest, device: torch.device | None = None) -> None:
        import torch

        self.library: Any = self.import_library()
        if device is not None and device.type != "cpu":
            raise UnavailableError(
                f"{self.title} is used on the CPU here, not on {device}; use device='cpu'"
            )
        self.device = torch.device("cpu")
        self.description = f"{self.name} {getattr(self.library, '__version__', '')}, CPU"

    def load(self, record: GraphRecord, path: Path) -> LoadedGraph:
        """Read a graph; raises `ExportError` where the library cannot load it."""
        raise NotImplementedError

    @classmethod
    def why_absent(cls, device: torch.device) -> str | None:
        """Why a benchmark on a device cannot export for it and run it; None where it can."""
        missing = [
            name
            for name in (cls.package, "onnx", "onnxscript")
            if importlib.util.find_spec(name) is None
        ]
        if missing:
            return f"{' and '.join(missing)} not installed"
        if device.type in cls.devices:
            return None
        needs = "runs on the CPU" if "cpu" in cls.devices else "needs an NVIDIA GPU"
        return f"{needs}, and this run is on {device.type}"

    @classmethod
    def export(cls, model: Any, folder: str | Path, request: Any = None, **given: Any) -> Manifest:
        """Export graphs of a model for this runtime, see `export_onnx`."""
        module, _, name = cls.exporter.partition(":")
        exporter: Any = getattr(importlib.import_module(module), name)
        return exporter(model, folder, request=request, **{"consumer": cls.name, **given})

    @classmethod
    def spelling(cls, dtype: str, opset: int | None = None) -> Spelling:
        """Attention form and opset of its ONNX files; by default the oldest opset with the operators."""
        data_type(dtype)
        if opset is not None and not _GELU_OPSET <= opset <= _NEWEST_OPSET:
            raise UnavailableError(
                f"opset {opset} is not supported; choose {_GELU_OPSET} (the first with Gelu) to {_NEWEST_OPSET}, "
                f"{_ATTENTION_OPSET} being the first with Attention"
            )
        if dtype == "bf16" and opset is not None and opset < _BF16_OPSET:
            raise UnavailableError(
                f"opset {opset} has no bf16 convolution; choose {_BF16_OPSET} to {_NEWEST_OPSET}, or --dtype fp16"
            )
        if dtype == "fp32":
            return Spelling("primitives", opset or _GELU_OPSET)
        opset = opset or _ATTENTION_OPSET
        return Spelling("opset23" if opset >= _ATTENTION_OPSET else "primitives", opset)

    @classmethod
    def import_library(cls) -> Any:
        """The module of the library; raises `UnavailableError` with the install command."""
        try:
            return importlib.import_module(cls.package)
        except (ImportError, OSError) as error:
            remedy = f"pip install '.[{cls.extra}]'" if cls.extra else f"install {cls.package}"
            raise UnavailableError(
                f"{cls.title} is not installed ({' '.join(str(error).split())}); {remedy}"
            ) from None


_Kind = TypeVar("_Kind", bound=type[Runtime])
_registered: dict[str, type[Runtime]] = {}


def register(runtime: _Kind) -> _Kind:
    """Make a runtime known by its name; a decorator."""
    _registered[runtime.name] = runtime
    return runtime


def runtimes() -> Mapping[str, type[Runtime]]:
    """All runtimes by name."""
    _import_own()
    return _registered


@cache
def _import_own() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


def find_runtime(name: str) -> type[Runtime]:
    """The runtime of a name; raises `UnavailableError` for an unknown one."""
    if name not in runtimes():
        raise UnavailableError(f"runtime {name!r} is unknown; choose from {', '.join(runtimes())}")
    return runtimes()[name]


def data_type(name: str) -> DType:
    """The dtype of a name; raises `UnavailableError` for an unknown one."""
    if name not in get_args(DType):
        raise UnavailableError(
            f"dtype {name!r} is unknown; choose from {', '.join(get_args(DType))}"
        )
    return name  # pyright: ignore[reportReturnType]


def choose_runtime(manifest: Manifest, folder: Path) -> str:
    """The runtime that `auto` stands for; raises `ExportError` for files that run code when they are loaded."""
    fitting = [each for each in runtimes().values() if each.kind == manifest.kind]
    if not fitting:
        raise ExportError(
            f"{folder} holds {manifest.kind!r}, which no runtime runs; register one, or export again"
        )
    fitting.sort(key=lambda each: each.name != manifest.consumer)
    first = fitting[0]
    if not first.automatic:
        raise ExportError(
            f"{folder} holds files of {first.title}, native code that runs when it is loaded; if you trust their "
            f"origin, ask for it by name: runtime={first.name!r}, or --runtime {first.name} on the command line"
        )
    installed = (
        each.name
        for each in fitting
        if each.automatic and importlib.util.find_spec(each.package) is not None
    )
    return next(installed, first.name)


def open_runtime(
    name: str,
    manifest: Manifest,
    device: torch.device | str | None = None,
    precision: Precision | None = None,
) -> Runtime:
    """The runtime of a name, on a device, for an export."""
    import torch

    kind = find_runtime(name)
    if manifest.kind != kind.kind:
        fitting = next(
            (each.name for each in runtimes().values() if each.kind == manifest.kind), "auto"
        )
        raise ExportError(
            f"runtime {name!r} runs {kind.kind} and this export holds {manifest.kind}; load it with "
            f"runtime={fitting!r}, or export again with xfm-fast export --to {kind.kind}"
        )
    if precision is not None and precision not in kind.precisions:
        raise UnavailableError(
            f"precision={precision!r} is not offered by {name}; choose from {', '.join(kind.precisions) or 'none'}, or "
            "leave it out"
        )
    chosen: dict[str, Any] = {} if precision is None else {"precision": precision}
    return kind(manifest, None if device is None else torch.device(device), **chosen)


def failed_run(
    description: str, graph: str, inputs: Mapping[str, Tensor], reason: str
) -> ExportError:
    """The error of a graph that loaded but does not run."""
    shapes = ", ".join(f"{name} {[*value.shape]}" for name, value in inputs.items())
    return ExportError(
        f"{description} failed in graph {graph!r} on {shapes} ({reason}); try smaller batches"
    )


def first_line(error: Exception) -> str:
    """The first line of a library's error message, or the name of its class."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
