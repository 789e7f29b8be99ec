"""Cases of the model under test: its weights and inputs, the engines of all backends, and the suite of its work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode

from xfm_fast.errors import UnavailableError
from xfm_fast.kernels.cpu.selection import selections

from .. import machine
from ..backends.engine import Engine, Schedule, wait_for
from ..backends.official_finetuning import OfficialEngine
from ..backends.ours import OurEngine
from ..backends.registry import BACKENDS, ModelBackend, Setup, choose
from ..inputs import Material, Subjects, bundled, described, from_files, make_tokenizer
from ..measure import MODEL_ROUNDING, Backend, Block, Call, Case, Run, benchmark
from ..options import ModelOptions
from ..record import OFFICIAL, OURS, Baseline, Extra, Mode, Model, Status
from ..tasks import BUILDERS, OFFICIAL_TASKS
from ..timing import DTYPES
from .requests import (
    TASK_WORK,
    EmbedImage,
    EmbedText,
    Rerank,
    Retrieval,
    Retrieve,
    Workload,
    task_workload,
)

# Seconds after which the rows that are left get one sample; of tasks so much later.
_DEADLINE_S, _QUICK_S, _TASKS_S = 185, 42, 100
# Questions to an image, and expressions in it; statements and captions together.
_TASK_ITEMS = 3
_WIDE = DTYPES | {"fp64": torch.float64}


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
            image_size=asked.get(
                "image_size", 48 if tiny else 480 if work.startswith("vqa") else 384
            ),
            batch=batch,
            requests=max(16, batch),
            texts=texts,
            index=index,
            k=k,
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
            return task_workload(work, material, self.image_size, self.texts, self.k, requests)
        if work == "embed-image":
            return EmbedImage(material, self.image_size, requests)
        if work == "embed-text":
            return EmbedText(material, requests)
        if work == "rerank":
            return Rerank(material, self.image_size, self.texts, self.batch)
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
        f"{found.operation} {names.get(found.dtype, found.dtype)}": found.chosen
        for found in selections()
    }


class LazyEngine:
    """A backend of the model in a dtype, loaded when first needed and kept for all cases."""

    def __init__(
        self, backend: ModelBackend, dtype: str, setup: Setup, absent_dtypes: dict[str, str]
    ) -> None:
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
        """Answers requests: a function of their numbers that waits for results.

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

        def answer(numbers: Sequence[int]) -> Any:
            with torch.inference_mode():
                result = prepared([number % workload.requests for number in numbers])
                wait_for(self._setup.device)
            return result

        if "first_call_s" not in self.cold_start:
            begun = time.perf_counter()
            answer([0])
            self.cold_start["first_call_s"] = time.perf_counter() - begun
        return answer


def engines(
    run: Run,
    material: Material,
    work: str,
    image_size: int,
    baselines: Sequence[str],
    official: Path | None = None,
) -> list[LazyEngine]:
    """Every backend at a kind of work in every dtype; see `choose`."""
    present, absent = choose(
        baselines, work, run.device, quick=run.options.quick, official=official
    )
    run.document.baselines = [
        Baseline(
            backend=one.name, label=one.label, version=one.version, reason=absent.get(one.name)
        )
        for one in BACKENDS
    ]
    found = []
    for backend in present:
        for dtype in (*run.dtypes, *run.absent):
            setup = Setup(
                material.subjects, work, image_size, dtype, run.device, run.scratch, official
            )
            found.append(LazyEngine(backend, dtype, setup, run.absent))
    return found


def case(
    run: Run, workload: Workload, found: Sequence[LazyEngine], *, batch: int, mode: Mode = "offline", block: int = 1,
    **limits: Any,
) -> Case:  # fmt: skip
    """A number of requests at a time, answered by some engines, judged by the official algorithm.

    `block` are the requests of a single-stream round; `limits` are fields of `Case`.
    """
    numbers, by_key = workload.batch(batch), {engine.key: engine for engine in found}
    subjects = workload.material.subjects

    def build(engine: LazyEngine) -> Call:
        answer = engine.answer(workload)
        if engine.ours:
            first = engine.cold_start.get("first_call_s")
            run.document.cold_start.setdefault(
                "first call", float(first) if isinstance(first, float) else 0.0
            )
        if mode != "offline":
            # Libraries prepare for shapes when they first see them.
            for number in workload.distinct():
                answer([number])
        return lambda chosen=numbers: answer(chosen)

    def reference(dtype: str) -> Any:
        with torch.inference_mode():
            official = OfficialEngine(
                subjects.model(workload.image_size, _WIDE[dtype], workload.work)
            )
            return workload.prepare(official, _WIDE[dtype])(numbers)

    @cache
    def flops(schedule: Schedule) -> int:
        model = subjects.model(workload.image_size, torch.float32, workload.work)
        counted = OurEngine(model, "reference") if schedule == "ours" else OfficialEngine(model)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            workload.prepare(counted, torch.float32)(numbers)
        return counter.get_total_flops()

    def count(backend: Backend, result: Any) -> Extra:
        """Cold start, arithmetic, tokens and quality."""
        engine = by_key[backend.key]
        schedule = engine.backend.schedule
        extra: Extra = engine.cold_start | {"needed_flops": flops("ours")}
        if schedule is not None:
            extra["flops"] = flops(schedule)
        if (tokens := workload.tokens(numbers, schedule)) is not None:
            extra["tokens"], extra["padded_tokens"] = tokens
        if (recall := workload.recall(result)) is not None:
            extra["recall"] = recall
        return extra

    return Case(
        workload.work,
        workload.name(batch),
        [
            Backend(
                engine.backend.name, engine.dtype, partial(build, engine), engine.backend.label,
                lacking=engine.lacking, band=engine.backend.band,
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


def require(known: Iterable[str], name: str, what: str) -> None:
    """Raise `UnavailableError` for an unknown name."""
    if name not in known:
        raise UnavailableError(f"{what} {name!r} is unknown; choose from {', '.join(known)}")


@benchmark("suite", title="Fast against official", reference=OFFICIAL)
def suite(run: Run) -> Iterator[Case]:
    """Cases of the suite on the CPU; quick runs have no tasks."""
    started, options, quick = time.perf_counter(), run.options, run.options.quick
    tiny = options.preset == "tiny"
    small, large = (32, options.image_size or 48) if tiny else (224, options.image_size or 384)
    limits = {
        "warmups": 0, "rounds": 2 if quick else 3, "budget_s": 0.2 if tiny else 1.0 if quick else 10.0,
        "deadline": started + (_QUICK_S if quick else _DEADLINE_S),
    }  # fmt: skip
    tasks = [] if quick else [work for work in TASK_WORK if work in OFFICIAL_TASKS]
    run.progress.begin(7 + len(tasks))
    material = prepare(run, small)
    of_small = suite_engines(run, material, "embed-image", small)
    of_large = suite_engines(run, material, "rerank", large)
    for make in (
        lambda: EmbedImage(material, small, 2 if quick else 8),
        lambda: EmbedImage(material, large, 1 if quick else 4),
        lambda: EmbedText(material, 8 if quick else 32),
        lambda: Rerank(material, large, 16 if quick else 64, 1),
        lambda: Retrieval(
            material, large, 2 if quick else 6, 2, 2 if quick else 3, 1 if quick else 4
        ),
    ):
        workload = make()
        batch = workload.requests if workload.work.startswith("embed") else 1
        run.progress.stage(workload.name(batch))
        found = (
            of_small
            if workload.work == "embed-image" and workload.image_size == small
            else of_large
        )
        found = [
            engine
            for engine in found
            if engine.backend.works is None or workload.work in engine.backend.works
        ]
        # The comparison has warmed up already.
        yield case(run, workload, found, batch=batch, **limits)
    of_small.clear()
    of_large.clear()
    limits["deadline"] += _TASKS_S
    for task in tasks:
        run.progress.stage(task)
        scale = Scale.of(task, options, run.device)
        texts, batch = (_TASK_ITEMS, 1) if task in ("vqa", "grounding") else (1, _TASK_ITEMS)
        workload = task_workload(task, material, scale.image_size, texts, scale.k, batch)
        yield case(
            run,
            workload,
            suite_engines(run, material, task, scale.image_size),
            batch=batch,
            **limits,
        )
    note_paths(run)
    # The other backends do not take part.
    run.document.baselines = []


def suite_engines(run: Run, material: Material, work: str, image_size: int) -> list[LazyEngine]:
    """xfm-fast in every dtype, the official algorithm in fp32 and, where there is time for it, in bf16 too."""
    quick = run.options.quick or not machine.has_native_bf16()
    found = engines(run, material, work, image_size, (OURS,))
    wide = [engine for engine in found if engine.ours or engine.dtype == "fp32"]
    half = [
        one
        for one in found
        if one.backend.name == OFFICIAL and one.dtype != "fp32" and not one.lacking
    ]
    return wide if quick else wide + half
