"""All contenders: what each is, which scenarios and types it takes, why it may be absent, and how to get it."""

from __future__ import annotations

import importlib.util
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

import xfm_fast
from xfm_fast.benchmarks.contenders.engine import Built, Engine
from xfm_fast.benchmarks.contenders.official_algorithm import OfficialEngine
from xfm_fast.benchmarks.contenders.ours import MemoryEngine, OurEngine
from xfm_fast.benchmarks.contenders.public_modules import TimmEngine, TransformersEngine
from xfm_fast.benchmarks.subjects import Subjects
from xfm_fast.errors import UnavailableError
from xfm_fast.export.consumers import Consumer, DType

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SCENARIOS = ("embed-image", "embed-text", "rerank", "retrieve")
OURS, OFFICIAL, OFFICIAL_CODE = "xfm-fast", "official-algorithm", "official-code"
Schedule = Literal["ours", "kept memories", "official", "padded", "own"]
"""Whose procedure a contender follows, for counting its operations; `own`: only it knows."""


@dataclass(frozen=True)
class Setup:
    """What a contender is built from.

    Attributes:
        scratch: folder for files of this run.
        official: clone of the official repository.
    """

    subjects: Subjects
    scenario: str
    image_size: int
    dtype: str
    device: torch.device
    scratch: Path
    official: Path | None = None

    @property
    def model(self) -> Any:
        return self.subjects.model(self.image_size, DTYPES[self.dtype])


@dataclass(frozen=True)
class Contender:
    """One way to do the work.

    Attributes:
        name: stable; `label` is for readers.
        scenarios: that it takes part in; dtypes: in which it can.
        build: makes an engine; may raise whatever the library raises.
        why_absent: on a device; None where it can run.
        package: whose version is reported.
        heavy: takes a minute or more to build, so that quick runs leave it out.
        schedule: for counting its operations.
    """

    name: str
    label: str
    build: Callable[[Setup], Built]
    scenarios: tuple[str, ...] = SCENARIOS
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    why_absent: Callable[[torch.device], str | None] = lambda device: None
    package: str = "torch"
    heavy: bool = False
    schedule: Schedule = "official"

    @property
    def version(self) -> str | None:
        if self.package == "xfm_fast":
            return xfm_fast.__version__
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None


def _loaded(make: Callable[[Setup], Any], setup: Setup) -> Built:
    model = setup.model  # weights are converted once and shared by all contenders
    del model
    begun = time.perf_counter()
    # Any: an engine has the methods of its contender's scenarios alone.
    engine: Engine = make(setup)
    return Built(engine, load_s=time.perf_counter() - begun)


def _plain(make: Callable[[Setup], Any]) -> Callable[[Setup], Built]:
    return partial(_loaded, make)


def _transformers(setup: Setup) -> Engine:
    parts = {"embed-image": ("vision",), "embed-text": ("text",), "rerank": ("fusion",), "retrieve": ("text", "fusion")}
    return TransformersEngine(setup.model, frozenset(parts[setup.scenario]))


def _official_code(setup: Setup) -> Built:
    from xfm_fast.benchmarks.contenders import official_code

    if setup.official is None:
        raise UnavailableError("--official names no clone of the official repository")
    return official_code.build(setup.model, setup.official, setup.scratch)


def _compiled(setup: Setup) -> Engine:
    return OfficialEngine(setup.model, lambda function: torch.compile(function))


def _exported(consumer: Consumer) -> Callable[[Setup], Built]:
    def build(setup: Setup) -> Built:
        from xfm_fast.benchmarks.contenders import exported

        model = setup.subjects.model(setup.image_size, torch.float32) if consumer == "openvino" else setup.model
        dtype: DType = "bf16" if setup.dtype == "bf16" else "fp32"
        return exported.build(model, consumer, dtype, setup.scenario, setup.scratch, setup.device)

    return build


def _needs(*packages: str, gpu: bool = False) -> Callable[[torch.device], str | None]:
    def why_absent(device: torch.device) -> str | None:
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        if missing:
            return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed"
        return f"needs an NVIDIA GPU, and this run is on {device.type}" if gpu and device.type != "cuda" else None

    return why_absent


def _openvino_absent(device: torch.device) -> str | None:
    return _needs("openvino", "onnx")(device) or ("runs on the CPU here" if device.type != "cpu" else None)


def _compiler_absent(device: torch.device) -> str | None:
    if device.type == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        return "torch.compile needs a C++ compiler (g++ or clang++), and none is on the PATH"
    return None


ALL: tuple[Contender, ...] = (
    Contender(OURS, "xfm-fast", _plain(lambda s: OurEngine(s.model)), package="xfm_fast", schedule="ours"),
    Contender(
        "xfm-fast-memories", "xfm-fast, image memories kept", _plain(lambda s: MemoryEngine(s.model)), ("retrieve",),
        package="xfm_fast", schedule="kept memories",
    ),
    Contender(OFFICIAL, "official algorithm, eager", _plain(lambda s: OfficialEngine(s.model))),
    Contender(
        OFFICIAL_CODE, "official code, a process of its own", _official_code, SCENARIOS, ("fp32",),
        lambda device: "runs on the CPU here" if device.type != "cpu" else None, "transformers",
    ),
    Contender(
        "torch-eager", "xfm-fast's schedule, plain PyTorch operations",
        _plain(lambda s: OurEngine(s.model, "reference")), schedule="ours",
    ),
    Contender(
        "torch-compile", "official algorithm, torch.compile", _plain(_compiled), why_absent=_compiler_absent, heavy=True
    ),
    Contender(
        "huggingface", "Hugging Face transformers", _plain(_transformers), why_absent=_needs("transformers"),
        package="transformers", schedule="padded",
    ),
    Contender(
        "timm", "timm", _plain(lambda s: TimmEngine(s.model)), ("embed-image",), why_absent=_needs("timm"),
        package="timm", schedule="padded",
    ),
    Contender(
        "flash-attn", "xfm-fast with flash-attn", _plain(lambda s: OurEngine(s.model, "flash_attn")),
        ("embed-text", "rerank", "retrieve"), ("bf16",), _needs("flash_attn", gpu=True), "flash-attn", schedule="ours",
    ),
    Contender(
        "onnxruntime", "ONNX Runtime", _exported("onnxruntime"), SCENARIOS, ("fp32",),
        _needs("onnxruntime", "onnx", "onnxscript"), "onnxruntime", heavy=True, schedule="own",
    ),
    Contender(
        "openvino", "OpenVINO", _exported("openvino"), SCENARIOS, why_absent=_openvino_absent, package="openvino",
        heavy=True, schedule="own",
    ),
    Contender(
        "tensorrt", "TensorRT", _exported("tensorrt"), SCENARIOS, ("fp32", "bf16"),
        _needs("tensorrt", "onnx", gpu=True), "tensorrt", heavy=True, schedule="own",
    ),
    Contender(
        "tensorrt-rtx", "TensorRT for RTX", _exported("tensorrt-rtx"), SCENARIOS, ("fp32", "bf16"),
        _needs("tensorrt_rtx", "onnx", gpu=True), "tensorrt-rtx", heavy=True, schedule="own",
    ),
)  # fmt: skip


def choose(
    asked: Sequence[str] | None, scenario: str, device: torch.device, *, quick: bool, official: Path | None = None
) -> tuple[list[Contender], dict[str, str]]:
    """Who takes part in a scenario, and who does not with the reason.

    xfm-fast and the official algorithm, to which everything is compared, always do.

    Args:
        asked: names; by default all that are installed, without the heavy ones in a quick run.
        official: clone of the official repository.

    Raises:
        UnavailableError: a name is unknown.
    """
    known = {contender.name: contender for contender in ALL}
    unknown = [name for name in asked or () if name not in known]
    if unknown:
        raise UnavailableError(f"baseline {unknown[0]!r} is unknown; choose from {', '.join(known)}")
    present, absent = [], {}
    for contender in ALL:
        why = contender.why_absent(device)
        if scenario not in contender.scenarios:
            why = f"has no {scenario}"
        elif contender.name in (OURS, OFFICIAL):
            why = None
        elif contender.name == OFFICIAL_CODE and official is None:
            why = "--official names no clone of the official repository"
        elif asked is not None and contender.name not in asked and contender.name != OFFICIAL_CODE:
            why = "was not asked for"
        elif why is None and asked is None and quick and contender.heavy:
            why = f"is left out of quick runs; --baselines {contender.name} takes it in"
        if why is None:
            present.append(contender)
        else:
            absent[contender.name] = why
    return present, absent
