"""The suite: embedding, re-ranking, a whole retrieval and tasks in one run, against the official algorithm."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import machine
from ..measure import Progress
from ..options import Preset, SuiteOptions
from ..record import OFFICIAL, OFFICIAL_CODE, OURS, Document, Parity
from .entrants import Entrant, blank
from .requests import EmbedImage, EmbedText, Rerank, Retrieval, Workload
from .setting import Scale, Setting, opened
from .task_requests import made

_TASKS = ("vqa", "nlvr2", "grounding", "captioning")


@dataclass(frozen=True)
class SuiteScale:
    """How much work the rows do, and how long.

    Attributes:
        rounds: samples of each contender, at least.
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
        small, large = (32, 48) if preset == "tiny" else (224, 384)
        if quick:
            budget = 0.2 if preset == "tiny" else 1.0
            return cls(small, large, 2, 1, 8, 16, 2, 2, 2, rounds=2, budget_s=budget, deadline_s=42)
        return cls(small, large, 8, 4, 32, 64, 6, 2, 3, rounds=3, budget_s=10.0, deadline_s=185)


def run(options: SuiteOptions, progress: Progress | None = None, command: Sequence[str] = ()) -> Document:
    """Measure this machine's CPU. An interruption (Ctrl-C) ends the run early and keeps the rows measured so far.

    Raises:
        XFMError: the checkpoint, the data or an option cannot be used.
    """
    started, sizes = time.perf_counter(), SuiteScale.of(options.preset, quick=options.quick)
    progress = progress or Progress()
    tasks = () if options.quick else _TASKS
    progress.begin(8 + len(tasks))
    with opened(options, "suite", torch.device("cpu"), progress, command) as setting:
        setting.prepare(sizes.small_image)
        entrants = {
            sizes.small_image: _entrants(setting, "embed-image", sizes.small_image, None),
            sizes.large_image: _entrants(setting, "rerank", sizes.large_image, options.official),
        }
        progress.stage("checking that xfm-fast gives the official results")
        parities = _check(setting, entrants, sizes)
        if setting.document.ok:
            _measure(setting, entrants, parities, sizes, started + sizes.deadline_s)
            # Models of tasks are large.
            entrants.clear()
            for task in tasks:
                _measure_task(setting, task, sizes, started + sizes.deadline_s + sizes.tasks_s)
    document = setting.finish()
    # The other contenders were not asked.
    document.baselines = []
    return document


def _entrants(setting: Setting, work: str, image_size: int, official: Path | None) -> list[Entrant]:
    """xfm-fast in every type, the official algorithm in fp32 and, where there is time for it, in bf16 too."""
    quick = setting.options.quick or not machine.has_native_bf16()
    found = setting.entrants(work, image_size, (OURS,), official)
    return [e for e in found if e.ours or e.dtype == "fp32" or (e.contender.name == OFFICIAL and e.runs and not quick)]


def _check(setting: Setting, entrants: dict[int, list[Entrant]], sizes: SuiteScale) -> list[dict[str, Parity]]:
    """Compare results on little work, and add a row for what differs; returns parity by contender for every work."""
    material, parities = setting.material, list[dict[str, Parity]]()
    for workload in (
        EmbedImage(material, sizes.small_image, 1),
        EmbedImage(material, sizes.large_image, 1),
        EmbedText(material, 4),
        Rerank(material, sizes.large_image, 4, 1),
    ):
        group = entrants[workload.point.image_size or sizes.large_image]
        ran = [entrant for entrant in group if entrant.runs]
        setting.check(group, workload)
        setting.document.rows += [blank(entrant, workload, "offline", 1) for entrant in ran if not entrant.runs]
        parities.append({entrant.key: entrant.parity for entrant in ran if entrant.parity is not None})
    # The scores of a whole retrieval pass through all the others.
    parts = parities[1:]
    whole = {
        key: parity.model_copy(update={"band": 2 * sum(part[key].band or 0.0 for part in parts if key in part)})
        for key, parity in parities[-1].items()
    }
    return [*parities, whole]


def _measure(
    setting: Setting, entrants: dict[int, list[Entrant]], parities: list[dict[str, Parity]], sizes: SuiteScale,
    deadline: float,
) -> None:  # fmt: skip
    material, small, large = setting.material, sizes.small_image, sizes.large_image
    works: list[Callable[[], Workload]] = [
        lambda: EmbedImage(material, small, sizes.small_batch),
        lambda: EmbedImage(material, large, sizes.large_batch),
        lambda: EmbedText(material, sizes.texts),
        lambda: Rerank(material, large, sizes.captions, 1),
        lambda: Retrieval(
            material, large, sizes.photos, sizes.captions_per_photo, sizes.candidates, sizes.large_batch
        ),
    ]  # fmt: skip
    for make, parity in zip(works, parities, strict=True):
        workload = make()
        batch = workload.requests if workload.work.startswith("embed") else 1
        setting.progress.stage(workload.name(batch))
        group = [
            entrant
            for entrant in entrants[workload.point.image_size or large]
            if workload.work in entrant.contender.works
        ]
        for entrant in group:
            entrant.parity = parity.get(entrant.key)
        # The check has run all code once; what is left to warm up are this work's own shapes, which a long run repeats
        # many times within itself.
        long = {"rerank": (OFFICIAL, OFFICIAL_CODE), "retrieval": (OFFICIAL, OURS)}.get(workload.work, ())
        warmups = {entrant.key: int(entrant.contender.name not in long) for entrant in group}
        setting.measure(
            workload, group, batch=batch, rounds=sizes.rounds, budget_s=sizes.budget_s, most_rounds=15,
            deadline=deadline, warmups=warmups,
        )  # fmt: skip


def _measure_task(setting: Setting, task: str, sizes: SuiteScale, deadline: float) -> None:
    setting.progress.stage(task)
    scale = Scale.of(task, setting.options, setting.device)
    several = task in ("vqa", "grounding")
    texts, batch = (sizes.task_items, 1) if several else (1, sizes.task_items)
    entrants = _entrants(setting, task, scale.image_size, None)
    workload = made(task, setting.material, scale.image_size, texts, scale.k, batch, "captions")
    setting.check(entrants, workload)
    setting.measure(
        workload, entrants, batch=batch, rounds=sizes.rounds, budget_s=sizes.budget_s, most_rounds=15,
        deadline=deadline, warmups={entrant.key: int(entrant.ours) for entrant in entrants},
    )  # fmt: skip
