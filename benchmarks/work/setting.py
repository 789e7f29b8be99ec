"""The setting of a benchmark of the model: its options, weights, inputs, contenders, probes, and a growing document."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from xfm_fast.kernels.cpu.selection import selections

from .. import machine
from ..contenders.registry import ALL, TASK_WORK, Setup, choose
from ..machine import EnergyMeter
from ..material import photographs
from ..material.inputs import Material, Subjects, described, make_tokenizer
from ..measure import (
    DTYPES,
    Block,
    MachineProbes,
    Progress,
    Samples,
    Watched,
    agreeing,
    differing,
    filled,
    interleave,
    parity_band,
)
from ..options import ModelOptions
from ..record import OFFICIAL, Baseline, Benchmark, ColdStart, Document, Mode, Model, Row, Selection, finite
from .entrants import Entrant, blank, check, efficiency, operation_shares, stages, tokens
from .requests import EmbedImage, EmbedText, Rerank, Retrieve, Workload
from .task_requests import made


@dataclass(frozen=True)
class Scale:
    """How much work, and how long.

    Attributes:
        batch: requests of an offline run, and the most that a server answers together.
        requests: distinct ones.
        rounds, block: of single-stream: rounds, and requests of each contender in a round.
        budget_s: for all rounds of a mode.
        trial_requests, trial_s: of the server: requests of a trial, fewer if they would take longer, more if the bound
            needs it.
        trials: of the search for a rate.
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
        """The options with everything decided: what they leave open suggest preset, device and `quick`."""
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
            index=asked.get("index", index),
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
        if work in TASK_WORK:
            requests = max(self.requests, self.batch)
            return made(work, material, self.image_size, self.texts, self.k, requests, self.lengths)
        if work == "embed-image":
            return EmbedImage(material, self.image_size, max(self.requests, self.batch))
        if work == "embed-text":
            return EmbedText(material, max(self.requests, self.batch), self.lengths)
        if work == "rerank":
            return Rerank(material, self.image_size, self.texts, self.batch, self.lengths)
        return Retrieve(material, self.image_size, self.index, self.k, max(self.requests, self.batch))


class Setting:
    """A run that has begun: see `opened`. `prepare` comes first.

    Attributes:
        document: grows while measuring.
        scratch: folder for files of this run.
    """

    def __init__(
        self, options: ModelOptions, benchmark: Benchmark, device: torch.device, progress: Progress,
        command: Sequence[str], scratch: Path,
    ) -> None:  # fmt: skip
        self._begun, self.scratch = time.perf_counter(), scratch
        self._process_s = time.time() - psutil.Process().create_time()
        self.options, self.device, self.progress = options, device, progress
        self.dtypes, self.absent_dtypes = machine.choose_dtypes(options.dtype, device)
        torch.set_num_threads(options.threads or machine.default_threads())
        torch.manual_seed(options.seed)
        self.document = Document.begun(benchmark, vars(options), command, device.type)

    def prepare(self, image_size: int, most_photos: int = photographs.MOST_PHOTOS, work: str = "") -> None:
        """Read photographs and captions, load the weights, try the probes.

        Args:
            image_size: of the first model that is needed.
            most_photos: of a folder of the user's.
            work: for which the model is needed.

        Raises:
            XFMError: the checkpoint or the data cannot be used.
        """
        options, folder = self.options, self.options.data
        self.progress.stage("photographs and captions")
        collection = photographs.bundled() if folder is None else photographs.from_files(folder, most_photos)
        tokenizer = make_tokenizer(options.preset, options.tokenizer, collection)
        self.document.data = described(collection, tokenizer)
        self.progress.stage("model")
        loading = time.perf_counter()
        subjects = Subjects.chosen(options.preset, options.checkpoint, options.seed)
        subjects.device = self.device
        tokenizer.check(subjects.config)
        model = subjects.model(image_size, DTYPES[self.dtypes[0]], work)
        self._load_s = time.perf_counter() - loading
        self.document.model = Model(
            preset=options.preset, origin=subjects.origin, trained=subjects.trained,
            meaningful_recall=subjects.trained and options.tokenizer is not None, config=subjects.config.model_dump(),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
        )  # fmt: skip
        self.material = Material(subjects, collection, tokenizer, options.seed)
        self.meter = EnergyMeter(self.device)
        self.probes = MachineProbes(self.dtypes, self.device)
        self.document.probes = self.probes.describe()

    def entrants(
        self, work: str, image_size: int, baselines: Sequence[str], official: Path | None = None
    ) -> list[Entrant]:
        """Every contender at a kind of work in every type, built; those that cannot run say why.

        Args:
            baselines: names of contenders; none stand for all that are installed.
            official: clone of the official repository.
        """
        present, absent = choose(baselines, work, self.device, quick=self.options.quick, official=official)
        self.document.baselines = [
            Baseline(
                contender=contender.name, label=contender.label, works=list(contender.works),
                present=contender.name not in absent, version=contender.version, reason=absent.get(contender.name),
            )
            for contender in ALL
        ]  # fmt: skip
        entrants, subjects = [], self.material.subjects
        for contender in present:
            for dtype in (*self.dtypes, *self.absent_dtypes):
                entrants.append(Entrant(contender, dtype, self.device))
                self.progress.step(f"building {entrants[-1].key}")
                setup = Setup(subjects, work, image_size, dtype, self.device, self.scratch, official)
                entrants[-1].build(setup, self.absent_dtypes)
        return entrants

    def check(self, entrants: Sequence[Entrant], workload: Workload, count: int | None = None) -> None:
        """Compare entrants with the official algorithm on a request or two, or `count`; the first call ever ends the
        cold start.
        """
        check(entrants, workload, self.material.subjects, self.progress.step, count)
        if self.document.cold_start is None:
            first = next((e.cost.first_call_s for e in entrants if e.ours and e.cost), 0.0)
            self.document.cold_start = ColdStart(process_s=self._process_s, load_s=self._load_s, first_call_s=first)

    def measure(
        self, workload: Workload, entrants: Sequence[Entrant], mode: Mode = "offline", batch: int = 1, *, rounds: int,
        budget_s: float, most_rounds: int = 60, deadline: float = math.inf, warmups: dict[str, int] | int = 0,
        block: int = 1, x: float | None = None, split: bool = False,
    ) -> None:  # fmt: skip
        """Let the entrants take turns at a workload, and add a row for each.

        Args:
            block: requests of a single-stream round.
            x: value of the swept axis.
            split: find out where the time goes, by runs of their own.

        Raises:
            KeyboardInterrupt: the rounds were interrupted; the rows are there.
        """
        numbers, watched = workload.batch(batch), dict[str, Watched]()
        blocks: dict[str, Block] = {}
        for entrant in (entrant for entrant in entrants if entrant.runs):
            with entrant.trying():
                answer = entrant.answer(workload)
                watched[entrant.key] = run = Watched(partial(answer, numbers), self.device, waits=True)
                if mode == "single-stream":
                    self.progress.step(f"{entrant.key}, memory")
                    run()
                blocks[entrant.key] = _single_requests(answer, block) if mode == "single-stream" else run
        samples = interleave(
            blocks, self.probes, rounds=rounds, budget_s=budget_s, most_rounds=most_rounds, deadline=deadline,
            warmups=warmups, meter=self.meter, on_step=self.progress.step,
        )  # fmt: skip
        rows = []
        for entrant in entrants:
            if entrant.key in samples.failures:
                entrant.status, entrant.reason = "failed", samples.failures[entrant.key]
            row = blank(entrant, workload, mode, batch).model_copy(update={"x": x})
            if entrant.runs:
                row = self._row(row, entrant, workload, numbers, samples, watched)
            if split and row.status == "measured" and row.median_s is not None:
                self.progress.step(f"{entrant.key}, where the time goes")
                answer = entrant.answer(workload)
                row.stages = stages(answer, numbers, self.device, row.median_s)
                # Only PyTorch's own operations can be seen.
                if entrant.contender.schedule != "own":
                    row.operations = operation_shares(partial(answer, numbers), self.device)
            rows.append(row)
        self.document.rows += agreeing(rows)
        if samples.interrupted:
            raise KeyboardInterrupt

    def _row(
        self, row: Row, entrant: Entrant, workload: Workload, numbers: Sequence[int], samples: Samples,
        watched: dict[str, Watched],
    ) -> Row:  # fmt: skip
        empty, seen = row, watched[entrant.key]
        row = filled(row, entrant.key, samples, seen.memory)
        if row.median_s is None:
            return row
        expected, same = (
            watched[key].output if (key := f"{OFFICIAL} {dtype}") in watched else None
            for dtype in ("fp32", entrant.dtype)
        )
        if expected is not None and row.parity is not None:
            error, note = workload.compare(numbers, seen.output, expected)
            band = row.parity.band or 0.0
            if entrant.dtype != "fp32" and same is not None:
                # More requests have a larger largest error, the official algorithm's own too.
                own = workload.compare(numbers, same, expected).error
                band = max(band, parity_band(DTYPES[entrant.dtype], own))
            if not error <= band:
                return empty.model_copy(update=differing(empty, error, band))
            row.parity = row.parity.model_copy(update={"error": finite(error), "band": band, "note": note})
        energy = None if self.meter.source is None else samples.energy(entrant.key, row.items, self.meter.source)
        row.tokens = tokens(entrant, workload, numbers, row.median_s)
        row.efficiency = efficiency(entrant, workload, numbers, seen.output, row.median_s, samples)
        row.energy, row.energy_note = energy, self.meter.reason if energy is None else None
        row.recall = workload.recall(seen.output)
        return row

    def finish(self) -> Document:
        """The document with its duration, and the paths that operations took on this CPU."""
        self.document.duration_s = time.perf_counter() - self._begun
        self.document.selections = [
            Selection(
                operation=found.operation,
                dtype=next((name for name, known in DTYPES.items() if known == found.dtype), str(found.dtype)),
                chosen=found.chosen,
                seconds={name: finite(seconds) for name, seconds in found.seconds.items()},
                rejected=found.rejected,
            )
            for found in selections()
        ]
        return self.document


def _single_requests(answer: Callable[..., Any], count: int) -> Block:
    """Requests one after the other, going on from block to block."""
    number = 0

    def block() -> list[float]:
        nonlocal number
        # The first request finds the caches as another contender left them.
        answer([number])
        seconds = []
        for _ in range(count):
            number += 1
            begun = time.perf_counter()
            answer([number])
            seconds.append(time.perf_counter() - begun)
        return seconds

    return block


@contextmanager
def opened(
    options: ModelOptions, benchmark: Benchmark, device: torch.device, progress: Progress, command: Sequence[str]
) -> Iterator[Setting]:
    """Begin a run. Ctrl-C inside the block ends the block, and the document says so.

    Raises:
        XFMError: an option cannot be used.
    """
    with tempfile.TemporaryDirectory(prefix="xfm-bench-", ignore_cleanup_errors=True) as scratch:
        setting = Setting(options, benchmark, device, progress, command, Path(scratch))
        try:
            yield setting
        except KeyboardInterrupt:
            setting.document.interrupted = True
