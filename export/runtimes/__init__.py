"""The registry of runtimes: the libraries that run exported graphs, one class and one file each.

    @register
    class Toy(Runtime):
        name, title, package = "toy", "Toy", "toy_library"

        def load(self, record, path): ...

The commands, `export_onnx(..., consumer="toy")`, `verify(folder, "toy")`, `Session.load(folder, "toy")` and the
benchmarks read the registry. The files of this folder register themselves. They import PyTorch and their library on
first use, so that `--help` is fast.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar, get_args

from xfm_fast.errors import ExportError, UnavailableError

from ..request import AttentionForm, DType, ExportRequest, OnnxRequest, Precision

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..manifest import GraphRecord, Manifest
    from ..slots import Slot

    RunGraph = Callable[[Mapping[str, Tensor], Slot, Mapping[str, int]], dict[str, Tensor]]
    """Runs a loaded graph: contiguous inputs on the runtime's device, their slot and sizes → outputs by name."""

_ATTENTION_OPSET = 23
_BF16_OPSET = 22
_GELU_OPSET = 20
_NEWEST_OPSET = 24

LARGEST_FILE = 2**31 - 2**20
"""Protobuf reads no message of two gigabytes; larger graphs keep their weights beside the file."""


class Exporter(NamedTuple):
    """The export of a runtime, in two stages: the caller releases the model between them."""

    check: Callable[[Any], Any]
    """Checks a request before a checkpoint is read; raises an `XFMError`."""
    start: Callable[..., AbstractContextManager[Callable[[], Manifest]]]
    """Exports what needs the model, from (model, folder, request, **options); yields the function that finishes."""


class Spelling(NamedTuple):
    """Form of attention and ONNX opset of a graph."""

    form: AttentionForm
    opset: int


class Runtime:
    """A library on a device. A subclass sets the class attributes; its constructor checks machine and export.

    Attributes:
        name: Name in options.
        title: Name of the library in messages.
        kind: `Manifest.kind` of the exports that it runs.
        package: Module that it imports.
        extra: Extra of this project that installs it.
        request: Options of its export.
        artefact: What its export writes, in the help of the command.
        automatic: False for files that run code when they are loaded: `auto` never chooses them.
        preferred: `auto` chooses it before the others of its kind, after the export's consumer.
        precisions: Values of the constructor's argument `precision`, the dtypes to compute an fp32 export in.
        dtypes: Dtypes that benchmarks run it in.
        devices: Types of the devices that it runs on.
        description: Library, version and device, for the manifest.
        device: Device of inputs and outputs.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    kind: ClassVar[str] = "onnx"
    package: ClassVar[str]
    extra: ClassVar[str] = ""
    request: ClassVar[type[ExportRequest]] = OnnxRequest
    artefact: ClassVar[str] = "ONNX graphs"
    automatic: ClassVar[bool] = True
    preferred: ClassVar[bool] = False
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

    def load(self, record: GraphRecord, path: Path) -> RunGraph:
        """Read a graph and return the function that runs it; raises `ExportError` if the library cannot load it."""
        raise NotImplementedError

    @classmethod
    def why_absent(cls, device: torch.device) -> str | None:
        """Return why a benchmark on a device cannot export for it and run it; None if it can."""
        packages = dict.fromkeys((cls.package, "onnx", "onnxscript"))
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        if missing:
            return f"{' and '.join(missing)} not installed"
        if device.type in cls.devices:
            return None
        needs = "runs on the CPU" if "cpu" in cls.devices else "needs an NVIDIA GPU"
        return f"{needs}, and this run is on {device.type}"

    @classmethod
    def exporter(cls) -> Exporter | None:
        """Return what exports for this runtime, or None if its files are ONNX graphs."""
        return None

    @classmethod
    def spelling(cls, dtype: str, opset: int | None = None) -> Spelling:
        """Return attention form and opset of its ONNX files; the default is the oldest opset with the operators."""
        check_dtype(dtype)
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
        """Import the library; raises `UnavailableError` with the install command."""
        try:
            return importlib.import_module(cls.package)
        except (ImportError, OSError) as error:
            remedy = f"pip install '.[{cls.extra}]'" if cls.extra else f"install {cls.package}"
            raise UnavailableError(
                f"{cls.title} is not installed ({' '.join(str(error).split())}); {remedy}"
            ) from None


RUNTIMES: dict[str, type[Runtime]] = {}
"""All runtimes by name."""

R = TypeVar("R", bound=type[Runtime])


def register(runtime: R) -> R:
    """Add a runtime to `RUNTIMES`; a class decorator."""
    RUNTIMES[runtime.name] = runtime
    return runtime


def find_runtime(name: str) -> type[Runtime]:
    """Return the runtime of a name; raises `UnavailableError` for an unknown one."""
    if name not in RUNTIMES:
        raise UnavailableError(f"runtime {name!r} is unknown; choose from {', '.join(RUNTIMES)}")
    return RUNTIMES[name]


def check_dtype(name: str) -> DType:
    """Return the dtype of a name; raises `UnavailableError` for an unknown one."""
    if name not in get_args(DType):
        raise UnavailableError(
            f"dtype {name!r} is unknown; choose from {', '.join(get_args(DType))}"
        )
    return name  # pyright: ignore[reportReturnType]


def choose_runtime(manifest: Manifest, folder: Path) -> str:
    """Return the runtime that `auto` stands for: the export's consumer, or another of its kind that is installed.

    Raises `ExportError` for files that run code when they are loaded.
    """
    candidates = [runtime for runtime in RUNTIMES.values() if runtime.kind == manifest.kind]
    if not candidates:
        raise ExportError(
            f"{folder} holds {manifest.kind!r}, which no runtime runs; register one, or export again"
        )
    candidates.sort(key=lambda runtime: (runtime.name != manifest.consumer, not runtime.preferred))
    first = candidates[0]
    if not first.automatic:
        raise ExportError(
            f"{folder} holds files of {first.title}, native code that runs when it is loaded; if you trust their "
            f"origin, ask for it by name: runtime={first.name!r}, or --runtime {first.name} on the command line"
        )
    for runtime in candidates:
        if runtime.automatic and importlib.util.find_spec(runtime.package) is not None:
            return runtime.name
    return first.name


def open_runtime(
    name: str,
    manifest: Manifest,
    device: torch.device | str | None = None,
    precision: Precision | None = None,
) -> Runtime:
    """Open a runtime for an export, on a device."""
    import torch

    runtime = find_runtime(name)
    if manifest.kind != runtime.kind:
        candidates = (name for name, other in RUNTIMES.items() if other.kind == manifest.kind)
        raise ExportError(
            f"runtime {name!r} runs {runtime.kind} and this export holds {manifest.kind}; load it with "
            f"runtime={next(candidates, 'auto')!r}, or export again with xfm-fast export --to {runtime.kind}"
        )
    if precision is not None and precision not in runtime.precisions:
        raise UnavailableError(
            f"precision={precision!r} is not offered by {name}; choose from "
            f"{', '.join(runtime.precisions) or 'none'}, or leave it out"
        )
    options: dict[str, Any] = {} if precision is None else {"precision": precision}
    return runtime(manifest, None if device is None else torch.device(device), **options)


def failed_run(
    description: str, graph: str, inputs: Mapping[str, Tensor], reason: str
) -> ExportError:
    """Return the error of a graph that loaded but does not run."""
    shapes = ", ".join(f"{name} {[*value.shape]}" for name, value in inputs.items())
    return ExportError(
        f"{description} failed in graph {graph!r} on {shapes} ({reason}); try smaller batches"
    )


def first_line(error: Exception) -> str:
    """Return the first line of a library's error message, or the name of its class."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
