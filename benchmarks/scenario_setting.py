"""What every benchmark of scenarios begins with: options, models, requests, contenders, probes and a document."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch

from xfm_fast.benchmarks import machine
from xfm_fast.benchmarks.contenders.registry import ALL, DTYPES, choose
from xfm_fast.benchmarks.entrants import Entrant, EntryList
from xfm_fast.benchmarks.material import photographs
from xfm_fast.benchmarks.probes import MachineProbes
from xfm_fast.benchmarks.rows import Baseline, Benchmark, Document
from xfm_fast.benchmarks.suite import (
    Progress,
    choose_dtypes,
    describe_data,
    make_subjects,
    make_tokenizer,
    plain_options,
)
from xfm_fast.benchmarks.telemetry import EnergyMeter
from xfm_fast.benchmarks.training_step import choose_device
from xfm_fast.benchmarks.workloads import Material, Workload, embed_image, embed_text, rerank, retrieve
from xfm_fast.config import PresetName
from xfm_fast.errors import InputError


@dataclass(frozen=True)
class ScenarioOptions:
    """What to measure. None stands for what preset, device and `quick` suggest (`Scale.of`).

    Attributes:
        baselines: names of contenders; by default all that are installed.
        most_photos: of a folder of the user's.
    """

    scenario: str
    preset: PresetName = "base"
    quick: bool = False
    checkpoint: Path | None = None
    data: Path | None = None
    tokenizer: Path | None = None
    official: Path | None = None
    dtypes: tuple[str, ...] | None = None
    baselines: tuple[str, ...] | None = None
    threads: int | None = None
    device: str | None = None
    image_size: int | None = None
    batch: int | None = None
    texts: int | None = None
    lengths: str = "captions"
    index: int | None = None
    k: int | None = None
    most_photos: int = photographs.MOST_PHOTOS
    seed: int = 0


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
    def of(cls, options: ScenarioOptions, device: torch.device) -> Scale:
        """The options with everything decided.

        Raises:
            InputError: a number below one.
        """
        tiny, quick, gpu = options.preset == "tiny", options.quick, device.type == "cuda"
        batches = {"embed-image": 64 if gpu else 8, "embed-text": 256 if gpu else 32}
        batch = options.batch or (2 if quick and not tiny else batches.get(options.scenario, 8 if gpu else 2))
        texts, index, k = (8, 8, 4) if quick else (64, 18, 8)
        asked = {"batch": options.batch, "texts": options.texts, "index": options.index, "k": options.k}
        for name, value in asked.items():
            if value is not None and value < 1:
                raise InputError(f"--{name} {value} is no amount of work; give 1 or more")
        budget = (1.0 if tiny else 6.0) if quick else (10.0 if tiny else 120.0)
        return cls(
            image_size=options.image_size or (48 if tiny else 384),
            batch=batch,
            requests=max(16, batch),
            texts=options.texts or texts,
            index=options.index or index,
            k=options.k or k,
            rounds=3 if quick else 10,
            block=4 if quick else 10,
            budget_s=budget,
            trial_requests=30 if quick else 200,
            trial_s=(0.3 if tiny else 3.0) if quick else (2.0 if tiny else 20.0),
            trials=6 if quick else 9,
            resolution=1.3 if quick else 1.1,
        )


class Setting:
    """A run that has begun: see `opened`.

    Attributes:
        document: grows while measuring.
        process_s, load_s: of a cold start: from the start of the process until here, and for the weights.
    """

    def __init__(
        self, options: ScenarioOptions, benchmark: Benchmark, progress: Progress, command: Sequence[str], scratch: Path
    ) -> None:
        self._begun = time.perf_counter()
        self.process_s = time.time() - psutil.Process().create_time()
        self.options, self.progress = options, progress
        self.device = choose_device(options.device)
        self.scale = Scale.of(options, self.device)
        self.dtypes, absent_dtypes = choose_dtypes(options.dtypes)
        if self.device.type == "cuda":
            absent_dtypes = {}
            self.dtypes = list(DTYPES) if options.dtypes is None else self.dtypes
        contenders, absent = choose(
            options.baselines, options.scenario, self.device, quick=options.quick, official=options.official
        )
        torch.set_num_threads(options.threads or machine.default_threads())
        torch.manual_seed(options.seed)
        self.document = Document(
            benchmark=benchmark,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            command=list(command),
            options=plain_options(vars(options)),
            device=self.device.type,
            machine=machine.describe(),
            baselines=[
                Baseline(
                    contender=contender.name,
                    label=contender.label,
                    scenarios=list(contender.scenarios),
                    present=contender.name not in absent,
                    version=contender.version,
                    reason=absent.get(contender.name),
                )
                for contender in ALL
            ],
        )
        progress.stage("photographs and captions")
        most = options.most_photos
        collection = photographs.bundled() if options.data is None else photographs.from_folder(options.data, most)
        tokenizer = make_tokenizer(options.preset, options.tokenizer, collection)
        self.document.data = describe_data(collection, tokenizer)
        progress.stage("model")
        loading = time.perf_counter()
        subjects = make_subjects(options.preset, options.checkpoint, options.seed)
        subjects.device = self.device
        tokenizer.check(subjects.config)
        model = subjects.model(self.scale.image_size, DTYPES[self.dtypes[0]])
        self.load_s = time.perf_counter() - loading
        self.document.model = {
            "preset": options.preset,
            "origin": subjects.origin,
            "trained": subjects.trained,
            "meaningful_recall": subjects.trained and options.tokenizer is not None,
            "config": subjects.config.model_dump(),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }
        self.material = Material(subjects, collection, tokenizer, options.seed)
        self.entries = EntryList(subjects, contenders, self.dtypes, absent_dtypes, scratch, options.official)
        self.meter = EnergyMeter(self.device)
        self.probes = MachineProbes(self.dtypes, self.device, DTYPES)
        self.document.probes = self.probes.describe()

    def workload(self, **changes: int | str) -> Workload:
        """The requests of the scenario, at the sizes of the options or of a sweep's point."""
        scale, lengths = self.scale, str(changes.get("lengths", self.options.lengths))
        image_size = int(changes.get("image_size", scale.image_size))
        requests = max(scale.requests, int(changes.get("batch", 0)))
        texts = int(changes.get("texts", scale.texts))
        if self.options.scenario == "embed-image":
            return embed_image(self.material, image_size, requests)
        if self.options.scenario == "embed-text":
            return embed_text(self.material, requests, lengths)
        if self.options.scenario == "rerank":
            return rerank(self.material, image_size, texts, max(scale.batch, int(changes.get("batch", 0))), lengths)
        return retrieve(self.material, image_size, scale.index, scale.k, requests)

    def checked(self, workload: Workload, image_size: int, entrants: list[Entrant] | None = None) -> list[Entrant]:
        """Entrants for a workload, built if they are not given, and compared with the official algorithm."""
        step: Callable[[str], None] = self.progress.step
        if entrants is None:
            entrants = self.entries.build(workload.scenario, image_size, step)
        self.entries.check(entrants, workload, image_size, step)
        return entrants

    def finish(self) -> Document:
        """The document with its duration."""
        self.document.duration_s = time.perf_counter() - self._begun
        return self.document


@contextmanager
def opened(
    options: ScenarioOptions, benchmark: Benchmark, progress: Progress | None, command: Sequence[str]
) -> Iterator[Setting]:
    """Begin a run. Ctrl-C inside the block ends the block, and the document says so.

    Raises:
        XFMError: an option, the checkpoint or the data cannot be used.
    """
    with tempfile.TemporaryDirectory(prefix="xfm-bench-", ignore_cleanup_errors=True) as scratch:
        setting = Setting(options, benchmark, progress or Progress(), command, Path(scratch))
        try:
            yield setting
        except KeyboardInterrupt:
            setting.document.interrupted = True
