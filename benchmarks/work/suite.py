"""The suite: embedding, re-ranking, a whole retrieval and tasks in one run, against the official algorithm."""

from __future__ import annotations

import time
from collections.abc import Iterator

from .. import machine
from ..inputs import Material
from ..measure import Case, Run, benchmark
from ..record import OFFICIAL, OURS
from ..tasks import OFFICIAL_TASKS
from .model import LazyEngine, Scale, case, engines, note_paths, prepare
from .requests import TASK_WORK, EmbedImage, EmbedText, Rerank, Retrieval, task_workload

# Seconds after which the rows that are left get one sample; of tasks so much later.
_DEADLINE_S, _QUICK_S, _TASKS_S = 185, 42, 100
# Questions to an image, and expressions in it; statements and captions together.
_TASK_ITEMS = 3


@benchmark("suite", title="Fast against official", reference=OFFICIAL)
def run(run: Run) -> Iterator[Case]:
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
    of_small = _engines(run, material, "embed-image", small)
    of_large = _engines(run, material, "rerank", large)
    for make in (
        lambda: EmbedImage(material, small, 2 if quick else 8),
        lambda: EmbedImage(material, large, 1 if quick else 4),
        lambda: EmbedText(material, 8 if quick else 32),
        lambda: Rerank(material, large, 16 if quick else 64, 1),
        lambda: Retrieval(material, large, 2 if quick else 6, 2, 2 if quick else 3, 1 if quick else 4),
    ):
        workload = make()
        batch = workload.requests if workload.work.startswith("embed") else 1
        run.progress.stage(workload.name(batch))
        found = of_small if workload.work == "embed-image" and workload.image_size == small else of_large
        found = [engine for engine in found if engine.backend.works is None or workload.work in engine.backend.works]
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
        yield case(run, workload, _engines(run, material, task, scale.image_size), batch=batch, **limits)
    note_paths(run)
    # The other backends do not take part.
    run.document.baselines = []


def _engines(run: Run, material: Material, work: str, image_size: int) -> list[LazyEngine]:
    """xfm-fast in every dtype, the official algorithm in fp32 and, where there is time for it, in bf16 too."""
    quick = run.options.quick or not machine.has_native_bf16()
    found = engines(run, material, work, image_size, (OURS,))
    wide = [engine for engine in found if engine.ours or engine.dtype == "fp32"]
    half = [one for one in found if one.backend.name == OFFICIAL and one.dtype != "fp32" and not one.lacking]
    return wide if quick else wide + half
