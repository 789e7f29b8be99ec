"""Cases of the model under test: its weights and inputs, the engines of all backends, and the suite of its work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode

from xfm_fast.kernels.cpu.selection import selections
from xfm_fast.testing import SharedWeights, bundled, from_files, make_tokenizer

from .. import machine
from ..backends import Engine, Schedule, wait_for
from ..backends.official_finetuning import official_engine
from ..backends.ours import our_engine
from ..backends.registry import BACKENDS, ModelBackend, Setup, choose
from ..measure import MODEL_ROUNDING, Backend, Call, Case, Run, benchmark
from ..options import ModelOptions
from ..record import OFFICIAL, OURS, Baseline, Data, Extra, Mode, Model, Status
from ..rounds import Block
from ..tasks import BUILDERS, OFFICIAL_TASKS
from ..timing import DTYPES
from .requests import (
    TASK_WORK,
    Material,
    Workload,
    embed_image,
    embed_text,
    rerank,
    retrieval,
    retrieve,
    task_workload,
)

# Seconds after which the remaining rows get one sample; of tasks so much later.
_DEADLINE_S, _QUICK_S, _TASKS_S = 185, 42, 100
# Questions to an image, and expressions in it; statements and captions together.
_TASK_ITEMS = 3
_REFERENCE_DTYPES = DTYPES | {"fp64": torch.float64}


@dataclass(frozen=True)
class Scale:
    """How much work, and how long.

    Attributes:
        batch: requests of an offline run, of `requests` distinct ones, and the most that a server answers together.
        block: single-stream requests of each backend in a round.
        budget_s: for all rounds of a mode.
        trial_requests: requests of a trial of the server, or as many as take `trial_s`, more if the bound needs it.
        trials: to search for a rate.
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
        """Resolve the options: what they leave open follows from preset, device and `quick`."""
        tiny, quick, gpu = options.preset == "tiny", options.quick, device.type == "cuda"
        settings = {name: value for name, value in vars(options).items() if value is not None}
        batches = {"embed-image": 64 if gpu else 8, "embed-text": 256 if gpu else 32}
        batch = 2 if quick and not tiny else batches.get(work, 8 if gpu else 2)
        batch = settings.get("batch", batch)
        image_size = 480 if work.startswith("vqa") else 384
        texts, index, k = (8, 8, 4) if quick else (64, 18, 8)
        if work in TASK_WORK:
            texts, k = 2 if quick else 5, 128
        budget_s, trial_s = (6.0, 3.0) if quick else (120.0, 20.0)
        if tiny:
            budget_s, trial_s = (1.0, 0.3) if quick else (10.0, 2.0)
        return cls(
            image_size=settings.get("image_size", 48 if tiny else image_size),
            batch=batch,
            requests=max(16, batch),
            texts=texts,
            index=index,
            k=k,
            rounds=3 if quick else 10,
            block=4 if quick else 10,
            budget_s=budget_s,
            trial_requests=30 if quick else 200,
            trial_s=trial_s,
            trials=6 if quick else 9,
            resolution=1.3 if quick else 1.1,
        )

    def workload(self, work: str, material: Material) -> Workload:
        """Return the requests of a kind of work at this size."""
        requests = max(self.requests, self.batch)
        if work in TASK_WORK:
            return task_workload(work, material, self.image_size, self.texts, self.k, requests)
        if work == "embed-image":
            return embed_image(material, self.image_size, requests)
        if work == "embed-text":
            return embed_text(material, requests)
        if work == "rerank":
            return rerank(material, self.image_size, self.texts, self.batch)
        return retrieve(material, self.image_size, self.index, self.k, requests)


def prepare(run: Run, image_size: int, work: str = "") -> Material:
    """Read photographs and captions, load the weights, prepare the probes; raises `XFMError` for unusable ones.

    The first model has an `image_size` and a kind of work.
    """
    options, folder, document = run.options, run.options.data, run.document
    document.cold_start["imports"] = time.time() - psutil.Process().create_time()
    run.progress.stage("photographs and captions")
    collection = bundled() if folder is None else from_files(folder)
    run.progress.stage("model")
    start = time.perf_counter()
    weights = SharedWeights.open(options.source, BUILDERS)
    weights.device = run.device
    model = weights.model(image_size, DTYPES[run.dtypes[0]], work)
    document.cold_start["weights"] = time.perf_counter() - start
    tokenizer = weights.tokenizer or make_tokenizer(weights.config, options.tokenizer, collection)
    tokenizer.check(weights.config)
    document.data = Data.of(collection, tokenizer)
    document.model = Model(
        preset=options.preset,
        origin=weights.origin,
        trained=weights.trained,
        meaningful_recall=weights.tokenizer is not None,
        config=weights.config.model_dump(),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )
    run.probe()
    return Material(weights, collection, tokenizer, options.seed)


def note_paths(run: Run) -> None:
    """Write the implementations that operations chose on this CPU into the document."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    for selection in selections():
        dtype = names.get(selection.dtype, selection.dtype)
        run.document.paths[f"{selection.operation} {dtype}"] = selection.chosen


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
        self._engine: Engine | Exception | None = None
        self.cold_start: Extra = {}

    def answer(self, workload: Workload) -> Callable[[Sequence[int]], Any]:
        """Return a function that answers requests by their indices and waits for the results.

        It may raise any error of the library.
        """
        if self._engine is None:
            try:
                self._engine, self.cold_start = self.backend.load(self._setup)
            except Exception as error:
                self._engine = error
        if isinstance(self._engine, Exception):
            raise self._engine
        with torch.inference_mode():
            run = workload.prepare(self._engine, DTYPES[self.dtype])

        def answer(indices: Sequence[int]) -> Any:
            with torch.inference_mode():
                result = run([index % workload.requests for index in indices])
                wait_for(self._setup.device)
            return result

        if "first_call_s" not in self.cold_start:
            start = time.perf_counter()
            answer([0])
            self.cold_start["first_call_s"] = time.perf_counter() - start
        return answer


def make_engines(
    run: Run,
    material: Material,
    work: str,
    image_size: int,
    baselines: Sequence[str],
    official: Path | None = None,
) -> list[LazyEngine]:
    """Return every backend at a kind of work in every dtype; see `choose`."""
    present, absent = choose(
        baselines, work, run.device, quick=run.options.quick, official=official
    )
    run.document.baselines = [
        Baseline(
            backend=backend.name,
            label=backend.label,
            version=backend.version,
            reason=absent.get(backend.name),
        )
        for backend in BACKENDS
    ]
    setup = partial(
        Setup,
        material.weights,
        work,
        image_size,
        device=run.device,
        scratch=run.scratch,
        official=official,
    )
    return [
        LazyEngine(backend, dtype, setup(dtype=dtype), run.absent)
        for backend in present
        for dtype in (*run.dtypes, *run.absent)
    ]


def case(
    run: Run,
    workload: Workload,
    engines: Sequence[LazyEngine],
    *,
    batch: int,
    mode: Mode = "offline",
    block: int = 1,
    **limits: Any,
) -> Case:
    """Return the case of `batch` requests at a time, answered by some engines, judged by the official algorithm.

    `block` are the requests of a single-stream round; `limits` are fields of `Case`.
    """
    indices, by_key = workload.first(batch), {engine.key: engine for engine in engines}
    weights = workload.material.weights

    def build(engine: LazyEngine) -> Call:
        answer = engine.answer(workload)
        if engine.ours:
            first_call = engine.cold_start.get("first_call_s")
            seconds = float(first_call) if isinstance(first_call, float) else 0.0
            run.document.cold_start.setdefault("first call", seconds)
        if mode != "offline":
            # Libraries prepare for shapes when they first see them.
            for index in workload.distinct():
                answer([index])
        return lambda requests=indices: answer(requests)

    def reference(dtype: str) -> Any:
        model = weights.model(workload.image_size, _REFERENCE_DTYPES[dtype], workload.work)
        with torch.inference_mode():
            return workload.prepare(official_engine(model), _REFERENCE_DTYPES[dtype])(indices)

    @cache
    def flops(schedule: Schedule) -> int:
        model = weights.model(workload.image_size, torch.float32, workload.work)
        engine = our_engine(model, "reference") if schedule == "ours" else official_engine(model)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            workload.prepare(engine, torch.float32)(indices)
        return counter.get_total_flops()

    def count(backend: Backend, result: Any) -> Extra:
        """Count cold start, arithmetic, tokens and quality."""
        engine = by_key[backend.key]
        schedule = engine.backend.schedule
        extra: Extra = engine.cold_start | {"needed_flops": flops("ours")}
        if schedule is not None:
            extra["flops"] = flops(schedule)
        if (tokens := workload.tokens(indices, schedule)) is not None:
            extra["tokens"], extra["padded_tokens"] = tokens
        if (recall := workload.recall(result)) is not None:
            extra["recall"] = recall
        return extra

    backends = [
        Backend(
            engine.backend.name,
            engine.dtype,
            partial(build, engine),
            engine.backend.label,
            lacking=engine.lacking,
            band=engine.backend.band,
        )
        for engine in engines
    ]
    return Case(
        workload.work,
        workload.title(batch),
        backends,
        workload.unit,
        workload.items * batch,
        mode,
        judge=OFFICIAL,
        reference=reference,
        wide=True,
        compare=partial(workload.compare, indices),
        rounding=MODEL_ROUNDING,
        count=count,
        block=partial(single_requests, count=block) if mode == "single-stream" else None,
        **limits,
    )


def single_requests(answer: Call, count: int) -> Block:
    """Return a block of requests one after the other, going on from block to block."""
    index = 0

    def block() -> list[float]:
        nonlocal index
        # The first request finds the caches as another backend left them.
        answer([index])
        seconds = []
        for _ in range(count):
            index += 1
            start = time.perf_counter()
            answer([index])
            seconds.append(time.perf_counter() - start)
        return seconds

    return block


@benchmark(
    "suite",
    title="Fast against official",
    reference=OFFICIAL,
    about="image and text embedding, re-ranking, retrieval and the fine-tuned tasks: xfm-fast bench",
)
def suite(run: Run) -> Iterator[Case]:
    """Yield the cases of the suite on the CPU; quick runs have no tasks."""
    start, options, quick = time.perf_counter(), run.options, run.options.quick
    tiny = options.preset == "tiny"
    small, large = (32, options.image_size or 48) if tiny else (224, options.image_size or 384)
    deadline = start + (_QUICK_S if quick else _DEADLINE_S)
    budget_s = 1.0 if quick else 10.0
    limits: dict[str, Any] = {
        "warmups": 0,  # the comparison has warmed up already
        "rounds": 2 if quick else 3,
        "budget_s": 0.2 if tiny else budget_s,
    }
    tasks = [] if quick else [work for work in TASK_WORK if work in OFFICIAL_TASKS]
    run.progress.begin(7 + len(tasks))
    material = prepare(run, small)
    small_engines = suite_engines(run, material, "embed-image", small)
    large_engines = suite_engines(run, material, "rerank", large)
    # Photographs, captions of each, candidates and a batch.
    collection = (2, 2, 2, 1) if quick else (6, 2, 3, 4)
    workloads: list[tuple[list[LazyEngine], Callable[[], Workload]]] = [
        (small_engines, lambda: embed_image(material, small, 2 if quick else 8)),
        (large_engines, lambda: embed_image(material, large, 1 if quick else 4)),
        (large_engines, lambda: embed_text(material, 8 if quick else 32)),
        (large_engines, lambda: rerank(material, large, 16 if quick else 64, 1)),
        (large_engines, lambda: retrieval(material, large, *collection)),
    ]
    for engines, make in workloads:
        workload = make()
        batch = workload.requests if workload.work.startswith("embed") else 1
        run.progress.stage(workload.title(batch))
        able = [
            engine
            for engine in engines
            if engine.backend.works is None or workload.work in engine.backend.works
        ]
        yield case(run, workload, able, batch=batch, deadline=deadline, **limits)
    small_engines.clear()
    large_engines.clear()
    for task in tasks:
        run.progress.stage(task)
        scale = Scale.of(task, options, run.device)
        texts, batch = (_TASK_ITEMS, 1) if task in ("vqa", "grounding") else (1, _TASK_ITEMS)
        workload = task_workload(task, material, scale.image_size, texts, scale.k, batch)
        engines = suite_engines(run, material, task, scale.image_size)
        yield case(run, workload, engines, batch=batch, deadline=deadline + _TASKS_S, **limits)
    note_paths(run)
    # The other backends do not take part.
    run.document.baselines = []


def suite_engines(run: Run, material: Material, work: str, image_size: int) -> list[LazyEngine]:
    """Return xfm-fast in every dtype, and the official algorithm in fp32 and, if there is time, in bf16."""
    fp32_alone = run.options.quick or not machine.has_native_bf16()
    return [
        engine
        for engine in make_engines(run, material, work, image_size, (OURS,))
        if engine.ours or engine.dtype == "fp32" or not (fp32_alone or engine.lacking)
    ]
