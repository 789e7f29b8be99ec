"""The two libraries that build engines, behind one adapter: TensorRT, and TensorRT for RTX.

Their Python modules are the same but for the name and what is written here:

| | `tensorrt` | `tensorrt-rtx` |
|---|---|---|
| builds | on the GPU that it builds for, timing kernels on it | anywhere, for a list of compute capabilities |
| kernels chosen | while building; there is a timing cache | while loading; there is a runtime cache |
| hardware compatibility | Ampere and later, or all GPUs of one capability | every target that is listed |
| version compatibility | with the lean runtime, `tensorrt_lean` | none: it has no lean runtime |
| strongly typed | since version 11 always, before by a flag | always |
"""

from __future__ import annotations

import importlib
import logging
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any, ClassVar, Literal, get_args

from xfm_fast.errors import ExportError, UnavailableError

from ..request import HardwareCompatibility, TensorRTRequest, joined

EngineConsumer = Literal["tensorrt", "tensorrt-rtx"]

LEAST_CAPABILITY = {"fp32": 75, "fp16": 75, "bf16": 80, "int8": 75, "fp8": 89}
"""The oldest compute capability with arithmetic in a type, as 10 · major + minor."""

# The first whose parser imports `Attention` and which has every attribute that is used here.
_OLDEST_TENSORRT = (10, 14)
# Called in every build, of the classes of both modules. Attributes of single options are not listed.
CALLED = (
    "Builder.build_serialized_network_to_stream",
    "Builder.create_builder_config",
    "Builder.create_network",
    "Builder.create_optimization_profile",
    "BuilderFlag.TF32",
    "IBuilderConfig.add_optimization_profile",
    "IBuilderConfig.clear_flag",
    "IBuilderConfig.progress_monitor",
    "ILogger",
    "INetworkDefinition.get_input",
    "INetworkDefinition.num_inputs",
    "IOptimizationProfile.set_shape",
    "IProgressMonitor",
    "IStreamWriter",
    "OnnxParser.parse_from_file",
)

_RTX_MAGIC = b"vtrt"
_RTX_HEADER = 24


class Library:
    """TensorRT: the imported module and its version. `TensorRTForRTX` is the subclass for RTX."""

    consumer: ClassVar[EngineConsumer] = "tensorrt"
    module: ClassVar[str] = "tensorrt"
    label: ClassVar[str] = "TensorRT"
    newest: ClassVar[int] = 11
    """The last major version that was tried."""
    instead: ClassVar[str] = ", or export for a machine without it: xfm-fast export tensorrt-rtx"
    least: ClassVar[Mapping[str, int]] = LEAST_CAPABILITY

    def __init__(self) -> None:
        try:
            self.trt: Any = importlib.import_module(self.module)
        except (ImportError, OSError) as error:
            raise UnavailableError(
                f"{self.label} is not installed ({' '.join(str(error).split())}); "
                f"pip install 'xfm-fast[{self.consumer}]'{self.instead}"
            ) from None
        self.version: str = self.trt.__version__

    def _check_newest(self) -> None:
        """Warn about an untested major version; refuse one that lacks an attribute that every build calls."""
        major = int(self.version.split(".", 1)[0])
        if major <= self.newest:
            return
        older = f"pip install '{self.consumer}<{self.newest + 1}'"
        if lacking := [name for name in CALLED if not _has(self.trt, name)]:
            raise UnavailableError(
                f"{self.label} {self.version} lacks {', '.join(lacking)}, which version {self.newest} has and a build "
                f"calls; {older}"
            )
        # Python says it once, however often a request is checked.
        warnings.warn(
            f"{self.label} {self.version} is newer than any that was tried, the last being version {self.newest}; it "
            f"has what a build calls, and its engines are compared with the model as ever; should it fail, {older}",
            stacklevel=1,
        )

    def check(self, request: TensorRTRequest, dtype: str) -> tuple[int, ...]:
        """Validate a request and return its compute capabilities; `UnavailableError` for what the library lacks."""
        if tuple(map(int, re.findall(r"\d+", self.version)[:3])) < _OLDEST_TENSORRT:
            oldest = ".".join(map(str, _OLDEST_TENSORRT))
            raise UnavailableError(
                f"TensorRT {self.version} is too old, {oldest} being the first that reads attention; pip install "
                f"'tensorrt>={oldest}'"
            )
        self._check_newest()
        present = local_capability()
        if present is None:
            raise UnavailableError(
                "TensorRT times kernels on the GPU that it builds for, and PyTorch finds no NVIDIA GPU here; build on "
                "a machine with one, or use xfm-fast export tensorrt-rtx, which needs none"
            )
        targets = parse_targets(joined(request.sm))
        if targets and set(targets) != {present}:
            raise UnavailableError(
                f"TensorRT builds for the GPU of this machine, SM{present}, and not for {_names(targets)}; "
                "leave out --sm and use --hardware-compatible, or use xfm-fast export tensorrt-rtx"
            )
        level, known = request.hardware_compatible, get_args(HardwareCompatibility)
        if level and level not in known:
            raise UnavailableError(f"--hardware-compatible {level!r} is unknown; choose from {', '.join(known)}")
        if level == "ampere_plus" and present < 80:
            raise UnavailableError(
                f"engines for Ampere and later are built on such a GPU, and this one is SM{present}; leave out "
                "--hardware-compatible"
            )
        self._check_type((present,), dtype)
        return (present,)

    def _check_type(self, targets: Sequence[int], dtype: str) -> None:
        least = self.least[dtype]
        lacking = [target for target in targets if target < least]
        if lacking:
            instead = {"fp8": "use --quantize int8"}.get(dtype, "use --dtype fp16")
            if min(lacking) < LEAST_CAPABILITY["fp16"]:
                instead = "use a newer GPU"
            raise UnavailableError(
                f"{_names(lacking)} {'has' if len(lacking) == 1 else 'have'} no {dtype}"
                f"{'' if least == LEAST_CAPABILITY[dtype] else f' in {self.label}'} (SM{least} is the first that has); "
                f"{instead}, or leave out these targets"
            )

    def create_network(self, builder: Any) -> Any:
        """An empty, strongly typed network; later versions have no flag for it."""
        flag = getattr(self.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        return builder.create_network(0 if flag is None else 1 << int(flag))

    def configure(self, config: Any, request: TensorRTRequest, targets: Sequence[int]) -> None:
        """Set the options on an `IBuilderConfig`."""
        self._common(config, request)
        if request.version_compatible:
            config.set_flag(self.trt.BuilderFlag.VERSION_COMPATIBLE)
        if request.hardware_compatible:
            level = request.hardware_compatible.upper()
            config.hardware_compatibility_level = getattr(self.trt.HardwareCompatibilityLevel, level)
        if request.timing_cache is not None:
            stored = request.timing_cache.read_bytes() if request.timing_cache.is_file() else b""
            cache = config.create_timing_cache(stored)
            # TensorRT rejects timings of another GPU or version; the build then starts with an empty cache.
            if not config.set_timing_cache(cache, False):
                config.set_timing_cache(config.create_timing_cache(b""), False)

    def _common(self, config: Any, request: TensorRTRequest) -> None:
        # On by default, it rounds the operands of fp32 products to 10 bits: an error a hundred times that of fp32.
        config.clear_flag(self.trt.BuilderFlag.TF32)
        if request.level is not None:
            config.builder_optimization_level = request.level

    def timing_cache(self, config: Any) -> bytes | None:
        """The kernel timings of a build as bytes; None where the library has no timing cache."""
        cache = config.get_timing_cache()
        return None if cache is None else bytes(memoryview(cache.serialize()))

    def declared_size(self, head: bytes) -> int | None:
        """Bytes of an engine according to its header, or None; raises `ExportError` for another library's engine."""
        if head[:4] == _RTX_MAGIC:
            raise ExportError("it was built by TensorRT for RTX; build it with xfm-fast export tensorrt")
        return None


class TensorRTForRTX(Library):
    """TensorRT for RTX."""

    consumer = "tensorrt-rtx"
    module = "tensorrt_rtx"
    label = "TensorRT for RTX"
    newest = 1
    instead = ""
    # It has no products of fp32 for Turing.
    least = LEAST_CAPABILITY | {"fp32": 80}

    @property
    def capabilities(self) -> tuple[int, ...]:
        """The compute capabilities that it builds for."""
        names = (re.fullmatch(r"SM(\d+)", name) for name in dir(self.trt.ComputeCapability))
        return tuple(sorted(int(name[1]) for name in names if name))

    def check(self, request: TensorRTRequest, dtype: str) -> tuple[int, ...]:
        self._check_newest()
        known = self.capabilities
        present = local_capability()
        targets = tuple(sorted(set(parse_targets(joined(request.sm))))) or (() if present is None else (present,))
        if not targets:
            raise UnavailableError(
                "there is no NVIDIA GPU here to build for; name the targets with --sm, such as --sm 80,89,120"
            )
        unknown = [target for target in targets if target not in known]
        if unknown:
            raise UnavailableError(
                f"TensorRT for RTX {self.version} does not build for {_names(unknown)}; it builds for {_names(known)}. "
                "For other GPUs use xfm-fast export tensorrt on a machine with one"
            )
        if request.version_compatible:
            raise UnavailableError(
                "TensorRT for RTX has no lean runtime, so its engines run with the version that built them; leave out "
                "--version-compatible and build again after an upgrade"
            )
        if request.hardware_compatible:
            raise UnavailableError(
                "TensorRT for RTX builds for the targets that are listed; instead of --hardware-compatible name them "
                f"all: --sm {','.join(map(str, known))}"
            )
        if request.timing_cache is not None:
            raise UnavailableError(
                "TensorRT for RTX times no kernels while it builds, so it has no timing cache; leave out "
                "--timing-cache. What it compiles when an engine is loaded goes into the session's runtime cache"
            )
        self._check_type(targets, dtype)
        return targets

    def create_network(self, builder: Any) -> Any:
        return builder.create_network(0)

    def configure(self, config: Any, request: TensorRTRequest, targets: Sequence[int]) -> None:
        self._common(config, request)
        # An engine that allocates for itself while it runs cannot be captured as a CUDA graph.
        config.set_flag(self.trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        config.num_compute_capabilities = len(targets)
        for number, target in enumerate(targets):
            config.set_compute_capability(getattr(self.trt.ComputeCapability, f"SM{target}"), number)

    def timing_cache(self, config: Any) -> bytes | None:
        return None

    def declared_size(self, head: bytes) -> int | None:
        if len(head) < _RTX_HEADER or head[:4] != _RTX_MAGIC:
            raise ExportError("it is no engine of TensorRT for RTX; build it with xfm-fast export tensorrt-rtx")
        return int.from_bytes(head[16:24], "little")


_LIBRARIES: dict[EngineConsumer, type[Library]] = {"tensorrt": Library, "tensorrt-rtx": TensorRTForRTX}


def load_library(consumer: EngineConsumer) -> Library:
    """The library of a name; raises `UnavailableError` with the extra to install."""
    if consumer not in _LIBRARIES:
        raise UnavailableError(f"engine library {consumer!r} is unknown; choose from {', '.join(_LIBRARIES)}")
    return _LIBRARIES[consumer]()


def message_logger(trt: Any, errors: list[str], log: logging.Logger) -> Any:
    """An `ILogger` that forwards to a Python log and appends errors to a list."""
    serious = (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR)

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity in serious:
                errors.append(msg)
            log.log(logging.INFO if severity == trt.ILogger.WARNING else logging.DEBUG, "%s", msg)

    return Logger()


def start(library: Library, kind: Callable[[Any], Any], logger: Any, errors: Sequence[str]) -> Any:
    """A builder or runtime of a library; raises `UnavailableError` where the library cannot start."""
    try:
        made = kind(logger)
    except TypeError as error:
        made, errors = None, [*errors, str(error)]
    if not made:
        raise UnavailableError(
            f"{library.label} {library.version} could not start ({first_error(errors)}); see that its CUDA libraries "
            "and the driver fit each other"
        )
    return made


def first_error(errors: Sequence[str]) -> str:
    """The first error on one line."""
    return " ".join(errors[0].split()) if errors else "it gives no reason"


def _has(module: Any, name: str) -> bool:
    try:
        attrgetter(name)(module)
    except AttributeError:
        return False
    return True


def parse_targets(text: str) -> tuple[int, ...]:
    """Compute capabilities from a list such as `80,89,120` or `8.9,12.0`."""
    targets = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(?:sm_?)?(?:(\d{2,3})|(\d{1,2})\.(\d))", part, re.IGNORECASE)
        number = 0 if match is None else int(match[1]) if match[1] else 10 * int(match[2]) + int(match[3])
        if not 50 <= number < 200:
            raise UnavailableError(
                f"--sm {part!r} is no compute capability; write them as numbers with commas, such as 80,89,120"
            )
        targets.append(number)
    return tuple(dict.fromkeys(targets))


def local_capability() -> int | None:
    """The compute capability of this machine's NVIDIA GPU, such as 89; None without a GPU."""
    import torch

    if not torch.cuda.is_available() or torch.version.cuda is None:
        return None
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def _names(targets: Sequence[int]) -> str:
    return ", ".join(f"SM{target}" for target in targets)
