"""Cases of the model under test: its weights and inputs, the engines of all backends, and where their time goes."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile

from xfm_fast.errors import UnavailableError
from xfm_fast.kernels.cpu.selection import selections

from ..backends.engine import Clock, Engine, NoStages, Stages, wait_for
from ..backends.official_finetuning import OfficialEngine
from ..backends.registry import BACKENDS, MODEL_WORK, ModelBackend, Setup, choose
from ..inputs import Material, Subjects, bundled, described, from_files, make_tokenizer
from ..measure import MODEL_ROUNDING, Backend, Block, Call, Case, Run
from ..options import ModelOptions
from ..record import OFFICIAL, OURS, Baseline, Extra, Mode, Model, Status
from ..tasks import BUILDERS
from ..timing import DTYPES
from .requests import TASK_WORK, EmbedImage, EmbedText, Rerank, Retrieve, Workload, task_workload

SCENARIOS = (*MODEL_WORK, *TASK_WORK)
_STAGED_RUNS = 3
# A run of more than this is staged once.
_LONG_S = 1.0
_WIDE = DTYPES | {"fp64": torch.float64}
# The first kind with a fragment that a name holds takes it.
_KINDS = (
    ("attention", ("attention", "attn", "softmax", "exp2", "bmm", "baddbmm")),
    ("matrix products", ("linear", "addmm", "mm", "mlp", "conv", "gemm", "cutlass", "nvjet")),
    ("norms", ("norm",)),
    ("GELU", ("gelu",)),
    ("copies and lookups", ("copy", "cat", "index", "embedding", "gather", "contiguous", "pad", "fill", "clone")),
)


@dataclass(frozen=True)
class Scale:
    """How much work, and how long.

    `batch` requests of `requests` distinct ones are an offline run, and the most that a server answers together. A
    round of single-stream is `block` requests of each backend; `budget_s` is for all rounds of a mode. A trial of the
    server is `trial_requests` or as many as take `trial_s`, more if the bound needs it; `trials` search for a rate.
    """

    image_size: int
    batch: int
    requests: int
    texts: int
    lengths: str
    index: int
    k: int
    rounds: int
    block: int
    budget_s: float
    trial_requests: int
    trial_s: float
    trials: int
    resolution: float

    @classmethod
    def of(cls, work: str, options: ModelOptions, device: torch.device) -> Scale:
        """The options with everything decided: what they leave open follows from preset, device and `quick`."""
        tiny, quick, gpu = options.preset == "tiny", options.quick, device.type == "cuda"
        asked = {name: value for name, value in vars(options).items() if value is not None}
        batches = {"embed-image": 64 if gpu else 8, "embed-text": 256 if gpu else 32}
        batch = asked.get("batch", 2 if quick and not tiny else batches.get(work, 8 if gpu else 2))
        texts, index, k = (8, 8, 4) if quick else (64, 18, 8)
        if work in TASK_WORK:
            texts, k = 2 if quick else 5, 128
        return cls(
            image_size=asked.get("image_size", 48 if tiny else 480 if work.startswith("vqa") else 384),
            batch=batch,
            requests=max(16, batch),
            texts=asked.get("texts", texts),
            lengths=asked.get("lengths", "captions"),
            index=index,
            k=asked.get("k", k),
            rounds=3 if quick else 10,
            block=4 if quick else 10,
            budget_s=(1.0 if tiny else 6.0) if quick else (10.0 if tiny else 120.0),
            trial_requests=30 if quick else 200,
            trial_s=(0.3 if tiny else 3.0) if quick else (2.0 if tiny else 20.0),
            trials=6 if quick else 9,
            resolution=1.3 if quick else 1.1,
        )

    def workload(self, work: str, material: Material) -> Workload:
        """The requests of a kind of work at this size."""
        requests = max(self.requests, self.batch)
        if work in TASK_WORK:
            return task_workload(work, material, self.image_size, self.texts, self.k, requests, self.lengths)
        if work == "embed-image":
            return EmbedImage(material, self.image_size, requests)
        if work == "embed-text":
            return EmbedText(material, requests, self.lengths)
        if work == "rerank":
            return Rerank(material, self.image_size, self.texts, self.batch, self.lengths)
        return Retrieve(material, self.image_size, self.index, self.k, requests)


def prepare(run: Run, image_size: int, work: str = "") -> Material:
    """Read photographs and captions, load the weights, prepare the probes; raises XFMError for unusable ones.

    The first model has an `image_size` and a kind of work.
    """
    options, folder, document = run.options, run.options.data, run.document
    document.cold_start["imports"] = time.time() - psutil.Process().create_time()
    run.progress.stage("photographs and captions")
    collection = bundled() if folder is None else from_files(folder)
    run.progress.stage("model")
    loading = time.perf_counter()
    subjects = Subjects.open(options.source, BUILDERS)
    subjects.device = run.device
    model = subjects.model(image_size, DTYPES[run.dtypes[0]], work)
    document.cold_start["weights"] = time.perf_counter() - loading
    tokenizer = subjects.tokenizer or make_tokenizer(subjects.config, options.tokenizer, collection)
    tokenizer.check(subjects.config)
    document.data = described(collection, tokenizer)
    document.model = Model(
        preset=options.preset, origin=subjects.origin, trained=subjects.trained,
        meaningful_recall=subjects.tokenizer is not None, config=subjects.config.model_dump(),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )  # fmt: skip
    run.probe()
    return Material(subjects, collection, tokenizer, options.seed)


def note_paths(run: Run) -> None:
    """Write the implementations that operations chose on this CPU into the document."""
    names = {kind: name for name, kind in DTYPES.items()}
    run.document.paths = {
        f"{found.operation} {names.get(found.dtype, found.dtype)}": found.chosen for found in selections()
    }


class LazyEngine:
    """A backend of the model in a dtype, loaded when first needed and kept for all cases."""

    def __init__(self, backend: ModelBackend, dtype: str, setup: Setup, absent_dtypes: dict[str, str]) -> None:
        self.backend, self.dtype, self._setup = backend, dtype, setup
        self.key, self.ours = f"{backend.name} {dtype}", backend.name == OURS
        self.lacking: tuple[Status, str] | None = None
        if dtype in absent_dtypes:
            self.lacking = "not offered", absent_dtypes[dtype]
        elif dtype not in backend.dtypes:
            self.lacking = "not offered", f"{backend.label} does not run in {dtype} here"
        self._loaded: Engine | Exception | None = None
        self.cold_start: Extra = {}

    def answer(self, workload: Workload) -> Callable[..., Any]:
        """Answers requests: a function of their numbers, and of a clock for the stages, that waits for results.

        It may raise any error of the library.
        """
        if self._loaded is None:
            try:
                self._loaded, self.cold_start = self.backend.load(self._setup)
            except Exception as error:
                self._loaded = error
        if isinstance(self._loaded, Exception):
            raise self._loaded
        with torch.inference_mode():
            prepared = workload.prepare(self._loaded, DTYPES[self.dtype])

        def answer(numbers: Sequence[int], clock: Clock | None = None) -> Any:
            with torch.inference_mode():
                result = prepared([number % workload.requests for number in numbers], clock or NoStages())
                wait_for(self._setup.device)
            return result

        if "first_call_s" not in self.cold_start:
            begun = time.perf_counter()
            answer([0])
            self.cold_start["first_call_s"] = time.perf_counter() - begun
        return answer


def engines(
    run: Run, material: Material, work: str, image_size: int, baselines: Sequence[str], official: Path | None = None
) -> list[LazyEngine]:
    """Every backend at a kind of work in every dtype; see `choose`."""
    present, absent = choose(baselines, work, run.device, quick=run.options.quick, official=official)
    run.document.baselines = [
        Baseline(backend=one.name, label=one.label, version=one.version, reason=absent.get(one.name))
        for one in BACKENDS
    ]
    found = []
    for backend in present:
        for dtype in (*run.dtypes, *run.absent):
            setup = Setup(material.subjects, work, image_size, dtype, run.device, run.scratch, official)
            found.append(LazyEngine(backend, dtype, setup, run.absent))
    return found


def case(
    run: Run, workload: Workload, found: Sequence[LazyEngine], *, batch: int, mode: Mode = "offline", block: int = 1,
    split: bool = False, **limits: Any,
) -> Case:  # fmt: skip
    """A number of requests at a time, answered by some engines, judged by the official algorithm.

    `block` are the requests of a single-stream round; `split` times the parts in runs of their own; `limits` are fields
    of `Case`.
    """
    numbers, by_key = workload.batch(batch), {engine.key: engine for engine in found}
    subjects = workload.material.subjects

    def build(engine: LazyEngine) -> Call:
        answer = engine.answer(workload)
        if engine.ours:
            first = engine.cold_start.get("first_call_s")
            run.document.cold_start.setdefault("first call", float(first) if isinstance(first, float) else 0.0)
        if mode != "offline":
            # Libraries prepare for shapes when they first see them.
            for number in workload.distinct():
                answer([number])
        return lambda chosen=numbers, clock=None: answer(chosen, clock)

    def reference(dtype: str) -> Any:
        with torch.inference_mode():
            official = OfficialEngine(subjects.model(workload.image_size, _WIDE[dtype], workload.work))
            return workload.prepare(official, _WIDE[dtype])(numbers, NoStages())

    def count(backend: Backend, result: Any) -> Extra:
        engine = by_key[backend.key]
        return engine.cold_start | counts(workload, numbers, engine, result)

    def detail(engine: LazyEngine, median_s: float) -> Extra:
        answer = engine.answer(workload)
        extra: Extra = {"stages": stages(answer, numbers, run.device, median_s)}
        # Only PyTorch's own operations can be seen.
        if engine.backend.schedule != "own":
            extra["operations"] = operation_shares(partial(answer, numbers), run.device)
        return extra

    return Case(
        workload.work,
        workload.name(batch),
        [
            Backend(
                engine.backend.name, engine.dtype, partial(build, engine), engine.backend.label,
                lacking=engine.lacking, band=engine.backend.band,
                detail=partial(detail, engine) if split else lambda median_s: {},
            )
            for engine in found
        ],
        workload.unit, workload.items * batch, mode, OFFICIAL, reference, wide=True,
        compare=partial(workload.compare, numbers), rounding=MODEL_ROUNDING, count=count,
        block=partial(single_requests, count=block) if mode == "single-stream" else None, **limits,
    )  # fmt: skip


def single_requests(answer: Call, count: int) -> Block:
    """Requests one after the other, going on from block to block."""
    number = 0

    def block() -> list[float]:
        nonlocal number
        # The first request finds the caches as another backend left them.
        answer([number])
        seconds = []
        for _ in range(count):
            number += 1
            begun = time.perf_counter()
            answer([number])
            seconds.append(time.perf_counter() - begun)
        return seconds

    return block


def counts(workload: Workload, numbers: Sequence[int], engine: LazyEngine, result: Any) -> Extra:
    """Arithmetic, traffic and tokens of some requests; what depends on the course of the work is left out."""
    schedule = engine.backend.schedule
    extra: Extra = {}
    needed = workload.flops(numbers, "ours", result)
    if needed is not None:
        extra |= {"needed_flops": needed, "bytes": workload.traffic(numbers, DTYPES[engine.dtype].itemsize)}
        if (own := workload.flops(numbers, schedule, result)) is not None:
            extra["flops"] = own
    if (tokens := workload.tokens(numbers, schedule)) is not None:
        extra["tokens"], extra["padded_tokens"] = tokens
    if (recall := workload.recall(result)) is not None:
        extra["recall"] = recall
    return extra


def stages(
    answer: Callable[..., Any], numbers: Sequence[int], device: torch.device, seconds: float
) -> dict[str, float]:  # fmt: skip
    """Median times of the parts of a run, from runs of their own; empty where the backend names no parts."""
    found: dict[str, list[float]] = {}
    for _ in range(1 if seconds > _LONG_S else _STAGED_RUNS):
        clock = Stages(device)
        answer(numbers, clock)
        for name, value in clock.seconds.items():
            found.setdefault(name, []).append(value)
    return _longest_first({name: statistics.median(values) for name, values in found.items()})


def kind_of(operation: str) -> str:
    """The kind of an operator or kernel, by its name."""
    name = operation.lower()
    return next((kind for kind, fragments in _KINDS if any(f in name for f in fragments)), "everything else")


def operation_shares(run: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Seconds of one run by kind of operation, in all of its threads; empty for what PyTorch cannot see."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    # A batch may be computed in shares, a thread each.
    everywhere = _ExperimentalConfig(profile_all_threads=True)
    with _silence(), profile(activities=activities, experimental_config=everywhere) as profiler:
        run()
    seconds: dict[str, float] = {}
    for event in profiler.key_averages():
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if own > 0:
            kind = kind_of(event.key)
            seconds[kind] = seconds.get(kind, 0.0) + own / 1e6
    return _longest_first(seconds)


def _longest_first(seconds: dict[str, float]) -> dict[str, float]:
    return dict(sorted(seconds.items(), key=lambda item: -item[1])) if sum(seconds.values()) > 0 else {}


@contextmanager
def _silence() -> Iterator[None]:
    """Some builds of the profiler write a line to the process's own streams whenever it starts and stops."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(number) for number in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for number in (1, 2):
            os.dup2(nowhere, number)
        yield
    finally:
        for number, stream in zip((1, 2), kept, strict=True):
            os.dup2(stream, number)
            os.close(stream)
        os.close(nowhere)


def require(known: Sequence[str], name: str, what: str) -> None:
    """Raise `UnavailableError` for an unknown name."""
    if name not in known:
        raise UnavailableError(f"{what} {name!r} is unknown; choose from {', '.join(known)}")
