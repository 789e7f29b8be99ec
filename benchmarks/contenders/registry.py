"""All contenders: what each is, which work and types it takes, why it may be absent, and how to get it."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

import xfm_fast
from xfm_fast.errors import UnavailableError
from xfm_fast.export.request import DType
from xfm_fast.export.runtimes import Runtime, runtimes
from xfm_fast.kernels.cpu import int8

from ..material.inputs import Subjects
from ..record import OFFICIAL, OFFICIAL_CODE, OURS
from ..timing import DTYPES, why_not_compiled
from .engine import Built, Engine, Schedule, TaskEngine
from .official_algorithm import OfficialEngine
from .official_finetuning import official_engine
from .ours import MemoryEngine, OurEngine, our_engine, served
from .public_modules import TimmEngine, TransformersEngine

CLONE_MARK = "models/xfm.py"
# Of the largest value: a few times what rounding to int8 costs the base model.
INT8_BAND = 0.1
MODEL_WORK = ("embed-image", "embed-text", "rerank", "retrieve")
TASK_WORK = ("vqa", "vqa-best", "vqa-all", "vqa-list", "nlvr2", "grounding", "captioning")
SCENARIOS = (*MODEL_WORK, *TASK_WORK)
_ALL_WORK = (*SCENARIOS, "retrieval")
# Encoders of Hugging Face that a kind of work passes through.
_PARTS = {
    "embed-image": frozenset({"vision"}), "embed-text": frozenset({"text"}), "rerank": frozenset({"fusion"}),
    "retrieve": frozenset({"text", "fusion"}),
}  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """The parts that a contender is built from.

    Attributes:
        scratch: folder for files of this run.
        official: clone of the official repository.
    """

    subjects: Subjects
    work: str
    image_size: int
    dtype: str
    device: torch.device
    scratch: Path
    official: Path | None = None

    @property
    def model(self) -> Any:
        return self.subjects.model(self.image_size, DTYPES[self.dtype], self.work)


@dataclass(frozen=True)
class Contender:
    """One way to do the work.

    Attributes:
        name: stable; `label` is for readers.
        works: that it takes part in; dtypes: in which it can.
        build: makes an engine; may raise whatever the library raises.
        why_absent: on a device; None where it can run.
        package: whose version is reported.
        heavy: takes a minute or more to build, so that quick runs leave it out.
        named: takes part only where it is asked for by its name.
        schedule: for counting its operations.
        band: of its error, where rounding in a type is not what explains it.
    """

    name: str
    label: str
    build: Callable[[Setup], Built]
    works: tuple[str, ...] = MODEL_WORK
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    why_absent: Callable[[torch.device], str | None] = lambda device: None
    package: str = "torch"
    heavy: bool = False
    named: bool = False
    schedule: Schedule = "official"
    band: float | None = None

    @property
    def version(self) -> str | None:
        if self.package == "xfm_fast":
            return xfm_fast.__version__
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None


def _plain(make: Callable[[Setup], Any]) -> Callable[[Setup], Built]:
    """Any: an engine has the methods of its contender's kinds of work alone."""

    def build(setup: Setup) -> Built:
        _ = setup.model  # weights are converted once and shared by all contenders
        begun = time.perf_counter()
        engine: Engine | TaskEngine = make(setup)
        return Built(engine, load_s=time.perf_counter() - begun)

    return build


def _official_code(setup: Setup) -> Built:
    from . import official_code

    if setup.official is None:
        raise UnavailableError("--official names no clone of the official repository")
    return official_code.build(setup.model, setup.official, setup.scratch)


def _exported(library: str, **form: bool) -> Callable[[Setup], Built]:
    def build(setup: Setup) -> Built:
        from . import exported

        dtype: DType = "bf16" if setup.dtype == "bf16" else "fp32"
        model = setup.subjects.model(setup.image_size, torch.float32)
        return exported.build(
            model, exported.Form(library, **form), dtype, setup.work, setup.scratch, setup.device
        )  # fmt: skip

    return build


def _needs(*packages: str, on: Literal["cpu", "cuda"] | None = None) -> Callable[[torch.device], str | None]:
    def why_absent(device: torch.device) -> str | None:
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        if missing:
            return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed"
        if on is None or device.type == on:
            return None
        return "runs on the CPU here" if on == "cpu" else f"needs an NVIDIA GPU, and this run is on {device.type}"

    return why_absent


def _torch_tensorrt(distribution: str, library: str) -> Callable[[torch.device], str | None]:
    """Both variants of Torch-TensorRT are one module, so the name of the distribution tells which one is here."""

    def why_absent(device: torch.device) -> str | None:
        try:
            version(distribution)
        except PackageNotFoundError:
            return f"{distribution} is not installed"
        return _needs("torch_tensorrt", library, on="cuda")(device)

    return why_absent


def _by_tensorrt(function: Callable[..., Any]) -> Callable[..., Any]:
    # Its import registers the backend; by default products of fp32 are rounded to TF32.
    importlib.import_module("torch_tensorrt")
    return torch.compile(function, backend="tensorrt", options={"disable_tf32": True})


def _int8_absent(device: torch.device) -> str | None:
    return int8.why_not() if device.type == "cpu" else "int8 is for CPUs"


def export_contenders(runtime: type[Runtime]) -> Iterator[Contender]:
    """A runtime of exports; on a CPU with packed texts and int8 GEMMs too, which a run names with --baselines."""
    package, texts = runtime.package.replace("_", "-"), ("embed-text", "rerank")
    yield Contender(
        runtime.name, runtime.title, _exported(runtime.name), MODEL_WORK, runtime.dtypes, runtime.why_absent, package,
        heavy=True, named=not runtime.automatic, schedule="own",
    )  # fmt: skip

    def absent(device: torch.device) -> str | None:
        return "is measured on the CPU" if device.type != "cpu" else runtime.why_absent(device)

    for mark, words, works, band in (
        ("packed", "packed texts", texts, None),
        ("int8", "int8", ("embed-image", *texts), INT8_BAND),
    ):
        if runtime.kind == "onnx":
            yield Contender(
                f"{runtime.name}-{mark}", f"{runtime.title}, {words}", _exported(runtime.name, **{mark: True}), works,
                runtime.dtypes, absent, package, heavy=True, named=True, schedule="own", band=band,
            )  # fmt: skip


ALL: tuple[Contender, ...] = (
    Contender(
        OURS, "xfm-fast", _plain(lambda s: our_engine(served(s.model))), _ALL_WORK, package="xfm_fast", schedule="ours"
    ),
    Contender(
        "xfm-fast-memories", "xfm-fast, image memories kept", _plain(lambda s: MemoryEngine(served(s.model))),
        ("retrieve",), package="xfm_fast", schedule="kept memories",
    ),
    Contender(OFFICIAL, "official algorithm, eager", _plain(lambda s: official_engine(s.model)), _ALL_WORK),
    Contender(
        # The weights are shared by all contenders, and its marks are on them.
        "xfm-fast-int8", "xfm-fast, products in int8",
        _plain(lambda s: OurEngine(copy.deepcopy(s.model).quantise())), MODEL_WORK, ("bf16",), _int8_absent, "xfm_fast",
        schedule="ours", band=INT8_BAND,
    ),
    Contender(
        OFFICIAL_CODE, "official code, a process of its own", _official_code, MODEL_WORK, ("fp32",),
        _needs(on="cpu"), "transformers",
    ),
    Contender(
        "torch-eager", "xfm-fast's schedule, plain PyTorch operations",
        _plain(lambda s: our_engine(s.model, "reference")), SCENARIOS, schedule="ours",
    ),
    Contender(
        "torch-compile", "official algorithm, torch.compile",
        _plain(lambda s: OfficialEngine(s.model, lambda function: torch.compile(function))),
        why_absent=why_not_compiled, heavy=True,
    ),
    *(
        Contender(
            name, f"official algorithm, {label}", _plain(lambda s: OfficialEngine(s.model, _by_tensorrt)),
            why_absent=_torch_tensorrt(name, library), package=name, heavy=True,
        )
        for name, label, library in (
            ("torch-tensorrt", "Torch-TensorRT", "tensorrt"),
            ("torch-tensorrt-rtx", "Torch-TensorRT for RTX", "tensorrt_rtx"),
        )
    ),
    Contender(
        "huggingface", "Hugging Face transformers", _plain(lambda s: TransformersEngine(s.model, _PARTS[s.work])),
        why_absent=_needs("transformers"), package="transformers", schedule="padded",
    ),
    Contender(
        "timm", "timm", _plain(lambda s: TimmEngine(s.model)), ("embed-image",), why_absent=_needs("timm"),
        package="timm", schedule="padded",
    ),
    Contender(
        "flash-attn", "xfm-fast with flash-attn", _plain(lambda s: OurEngine(s.model, "flash_attn")),
        ("embed-text", "rerank", "retrieve"), ("bf16",), _needs("flash_attn", on="cuda"), "flash-attn", schedule="ours",
    ),
    *(contender for runtime in runtimes().values() for contender in export_contenders(runtime)),
)  # fmt: skip


def choose(
    asked: Sequence[str], work: str, device: torch.device, *, quick: bool, official: Path | None = None
) -> tuple[list[Contender], dict[str, str]]:
    """The contenders at a kind of work, and those that take no part with the reason.

    xfm-fast and the official algorithm, to which everything is compared, always do.

    Args:
        asked: names; none stand for all that are installed, without the heavy ones in a quick run.
        official: clone of the official repository.

    Raises:
        UnavailableError: a name is unknown, or `official` is no clone.
    """
    known = {contender.name: contender for contender in ALL}
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise UnavailableError(f"baseline {unknown[0]!r} is unknown; choose from {', '.join(known)}")
    # Asked for by name: a path without the code must not end in a table without its row.
    if official is not None and not (official / CLONE_MARK).is_file():
        raise UnavailableError(f"--official {official} has no {CLONE_MARK}; name a clone of the official repository")
    present, absent = [], {}
    for contender in ALL:
        why = contender.why_absent(device)
        if work not in contender.works:
            why = f"has no {work}"
        elif contender.name in (OURS, OFFICIAL):
            why = None
        elif contender.name == OFFICIAL_CODE and official is None:
            why = "--official names no clone of the official repository"
        elif asked and contender.name not in asked and contender.name != OFFICIAL_CODE:
            why = "was not asked for"
        elif why is None and not asked and contender.named:
            why = f"takes part by name; --baselines {contender.name} takes it in"
        elif why is None and not asked and quick and contender.heavy:
            why = f"is left out of quick runs; --baselines {contender.name} takes it in"
        if why is None:
            present.append(contender)
        else:
            absent[contender.name] = why
    return present, absent
