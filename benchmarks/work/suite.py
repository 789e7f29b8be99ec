"""The suite: embedding, re-ranking, a whole retrieval and tasks in one run, against the official algorithm."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .. import machine
from ..material.inputs import Material
from ..measure import Case, Run, benchmark
from ..options import Preset
from ..record import OFFICIAL, OURS
from .model import Engine, Scale, case, engines, note_paths, prepare
from .requests import EmbedImage, EmbedText, Rerank, Retrieval
from .task_requests import made

_TASKS = ("vqa", "nlvr2", "grounding", "captioning")


@dataclass(frozen=True)
class SuiteScale:
    """How much work the rows do, and how long.

    Attributes:
        rounds: samples of each backend, at least.
        budget_s: short rows get more samples within this time.
        deadline_s: once the suite has run this long, rows that are left get one sample; of tasks, once it has run for
            `tasks_s` more. Quick runs have no tasks.
        task_items: questions to an image, and expressions in it; statements and captions together.
    """

    small_image: int
    large_image: int
    small_batch: int
    large_batch: int
    texts: int
    captions: int
    photos: int
    captions_per_photo: int
    candidates: int
    rounds: int
    budget_s: float
    deadline_s: float
    tasks_s: float = 100.0
    task_items: int = 3

    @classmethod
    def of(cls, preset: Preset, *, quick: bool) -> SuiteScale:
        """The sizes for a model."""
        small, large = (32, 48) if preset == "tiny" else (224, 384)
        if quick:
            budget = 0.2 if preset == "tiny" else 1.0
            return cls(small, large, 2, 1, 8, 16, 2, 2, 2, rounds=2, budget_s=budget, deadline_s=42)
        return cls(small, large, 8, 4, 32, 64, 6, 2, 3, rounds=3, budget_s=10.0, deadline_s=185)


@benchmark("suite", title="Fast against official", reference=OFFICIAL)
def run(run: Run) -> Iterator[Case]:
    """Cases of the suite on the CPU."""
    started, options = time.perf_counter(), run.options
    sizes = SuiteScale.of(options.preset, quick=options.quick)
    tasks = () if options.quick else _TASKS
    run.progress.begin(7 + len(tasks))
    material = prepare(run, sizes.small_image)
    small, large = sizes.small_image, options.image_size or sizes.large_image
    of_small = _engines(run, material, "embed-image", small, None)
    of_large = _engines(run, material, "rerank", large, options.official)
    for make in (
        lambda: EmbedImage(material, small, sizes.small_batch),
        lambda: EmbedImage(material, large, sizes.large_batch),
        lambda: EmbedText(material, sizes.texts),
        lambda: Rerank(material, large, sizes.captions, 1),
        lambda: Retrieval(
            material, large, sizes.photos, sizes.captions_per_photo, sizes.candidates, sizes.large_batch
        ),
    ):  # fmt: skip
        workload = make()
        batch = workload.requests if workload.work.startswith("embed") else 1
        run.progress.stage(workload.name(batch))
        found = of_small if workload.work == "embed-image" and workload.image_size == small else of_large
        found = [engine for engine in found if workload.work in engine.contender.works]
        # The comparison has warmed up already.
        yield case(
            run, workload, found, batch=batch, warmups=0, rounds=sizes.rounds, budget_s=sizes.budget_s,
            deadline=started + sizes.deadline_s,
        )  # fmt: skip
    of_small.clear()
    of_large.clear()
    for task in tasks:
        run.progress.stage(task)
        scale = Scale.of(task, options, run.device)
        several = task in ("vqa", "grounding")
        texts, batch = (sizes.task_items, 1) if several else (1, sizes.task_items)
        workload = made(task, material, scale.image_size, texts, scale.k, batch, "captions")
        yield case(
            run, workload, _engines(run, material, task, scale.image_size, None), batch=batch, warmups=0,
            rounds=sizes.rounds, budget_s=sizes.budget_s, deadline=started + sizes.deadline_s + sizes.tasks_s,
        )  # fmt: skip
    note_paths(run)
    # The other backends do not take part.
    run.document.baselines = []


def _engines(run: Run, material: Material, work: str, image_size: int, official: Path | None) -> list[Engine]:
    """xfm-fast in every dtype, the official algorithm in fp32 and, where there is time for it, in bf16 too."""
    quick = run.options.quick or not machine.has_native_bf16()
    found = engines(run, material, work, image_size, (OURS,), official)
    wide = [engine for engine in found if engine.ours or engine.dtype == "fp32"]
    half = [one for one in found if one.contender.name == OFFICIAL and one.dtype != "fp32" and not one.lacking]
    return wide if quick else wide + half
