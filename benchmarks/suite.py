"""The whole measurement: load, check that fast equals official, measure every scenario, collect one document."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import psutil
import torch

from xfm_fast.benchmarks import machine
from xfm_fast.benchmarks.contenders.clone_program import run_official
from xfm_fast.benchmarks.material import photographs
from xfm_fast.benchmarks.material.photographs import Collection
from xfm_fast.benchmarks.material.subjects import Subjects
from xfm_fast.benchmarks.measuring import (
    PROBE_SHAPE,
    GemmProbe,
    Measurement,
    Series,
    contended,
    interleave,
    ratio_interval,
    shares_of_peak,
)
from xfm_fast.benchmarks.scenarios import (
    Retrieval,
    Scenario,
    Sizes,
    all_scenarios,
    encode,
    images,
    reranking,
    texts,
)
from xfm_fast.config import PresetName, XFMConfig
from xfm_fast.errors import UnavailableError
from xfm_fast.kernels.cpu.selection import selections
from xfm_fast.tokenizer import CaptionTokenizer

SCHEMA_VERSION = 1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# fp32 results agree to this, relative to the largest value; weights that round worse may use three times the error
# that the official algorithm itself makes in fp32.
FP32_BAND = 1e-5


@dataclass(frozen=True)
class Options:
    """What to measure."""

    preset: PresetName = "base"
    quick: bool = False
    checkpoint: Path | None = None
    data: Path | None = None
    tokenizer: Path | None = None
    official: Path | None = None
    dtypes: tuple[str, ...] | None = None
    threads: int | None = None
    seed: int = 0


@dataclass
class Progress:
    """Where the suite tells what it does; the defaults are silent.

    Attributes:
        begin: called with the number of stages.
        stage: called with the name of a stage when it begins.
        step: called with what runs next within a stage.
    """

    begin: Callable[[int], None] = lambda stages: None
    stage: Callable[[str], None] = lambda name: None
    step: Callable[[str], None] = lambda what: None


@dataclass
class Document:
    """The results as plain values, ready for JSON; `ok` tells whether every comparison held."""

    content: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def begun(cls, options: object, command: Sequence[str], **what: str) -> Self:
        """A document without results yet; `what` says which benchmark it is of, if not the suite."""
        return cls(
            {
                "schema_version": SCHEMA_VERSION,
                **what,
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "command": list(command),
                "options": plain_options(vars(options)),
                "interrupted": False,
                "machine": machine.describe(),
                "parity": [],
                "rows": [],
                "official": None,
            }
        )

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.content["rows"]

    @property
    def interrupted(self) -> bool:
        return self.content["interrupted"]

    @property
    def ok(self) -> bool:
        checks = [check["passed"] for check in self.content["parity"]]
        return all(checks) and all(row["status"] != "parity failed" for row in self.rows)


def run(options: Options, progress: Progress | None = None, command: Sequence[str] = ()) -> Document:
    """Measure this machine. An interruption (Ctrl-C) ends the run early and keeps the rows measured so far.

    Raises:
        XFMError: the checkpoint, the data or an option cannot be used.
    """
    progress = progress or Progress()
    started = time.perf_counter()
    process_s = time.time() - psutil.Process().create_time()
    torch.set_num_threads(options.threads or machine.default_threads())
    torch.manual_seed(options.seed)
    document = Document.begun(options, command)
    try:
        _measure(options, progress, document, started, process_s)
    except KeyboardInterrupt:
        document.content["interrupted"] = True
    document.content["selections"] = [
        {
            "operation": s.operation,
            "dtype": _short(s.dtype),
            "chosen": s.chosen,
            "seconds": s.seconds,
            "rejected": s.rejected,
        }
        for s in selections()
    ]
    document.content["duration_s"] = time.perf_counter() - started
    return document


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as values of JSON."""
    return {
        name: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        for name, value in options.items()
    }


def _short(dtype: torch.dtype) -> str:
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype).removeprefix("torch."))


def _measure(options: Options, progress: Progress, document: Document, started: float, process_s: float) -> None:
    content = document.content
    sizes = Sizes.of(options.preset, quick=options.quick)
    names, absent = choose_dtypes(options.dtypes)
    progress.begin(7 + (options.official is not None))
    progress.stage("photographs and captions")
    collection = photographs.bundled() if options.data is None else photographs.from_folder(options.data)
    tokenizer = make_tokenizer(options.preset, options.tokenizer, collection)
    content["data"] = describe_data(collection, tokenizer)
    progress.stage("model")
    loading = time.perf_counter()
    subjects = make_subjects(options.preset, options.checkpoint, options.seed)
    tokenizer.check(subjects.config)
    first_model = subjects.model(sizes.small_image, DTYPES[names[0]])
    load_s = time.perf_counter() - loading
    content["model"] = {
        "preset": options.preset,
        "origin": subjects.origin,
        "trained": subjects.trained,
        "meaningful_recall": subjects.trained and options.tokenizer is not None,
        "config": subjects.config.model_dump(),
        "parameters": sum(p.numel() for p in first_model.parameters()),
    }
    progress.stage("fast = official?")
    bands, first_call_s = _check(subjects, collection, tokenizer, sizes, names, document, progress)
    content["cold_start"] = {
        "process_to_suite_s": process_s,
        "load_s": load_s,
        "first_image_s": first_call_s,
        "total_s": process_s + load_s + first_call_s,
    }
    if not document.ok:
        return
    probes = {name: GemmProbe(DTYPES[name]) for name in names}
    content["probe"] = {
        name: {"library": probe.library, "shape": list(PROBE_SHAPE), "flops_per_s": probe()}
        for name, probe in probes.items()
    }
    deadline = started + sizes.deadline_s
    for scenario in all_scenarios(subjects, collection, tokenizer, sizes):
        progress.stage(scenario.name)
        measured = _interleaved(scenario, names, probes, sizes, deadline, options, progress)
        document.rows.extend(_rows(scenario, names, measured, probes, bands))
        document.rows.extend(_absent(scenario, dtype, reason) for dtype, reason in absent.items())
        if measured.interrupted:
            raise KeyboardInterrupt
    if options.official is not None:
        progress.stage("official code")
        content["official"] = run_official(options.official, subjects, collection, tokenizer, sizes)


def choose_dtypes(asked: tuple[str, ...] | None) -> tuple[list[str], dict[str, str]]:
    """The dtypes to measure on this processor, and those that it does not offer with the reason.

    Raises:
        UnavailableError: one that was asked for is unknown.
    """
    if asked is not None:
        unknown = [name for name in asked if name not in DTYPES]
        if unknown or not asked:
            raise UnavailableError(
                f"dtype {', '.join(unknown) or 'none'!r} is unknown; choose from {', '.join(DTYPES)}"
            )
        return list(dict.fromkeys(asked)), {}
    if machine.has_native_bf16():
        return ["fp32", "bf16"], {}
    return ["fp32"], {"bf16": "not offered by this CPU (no AVX-512 BF16, AMX or ARM BF16); --dtype bf16 emulates it"}


def make_tokenizer(preset: PresetName, files: Path | None, collection: Collection) -> CaptionTokenizer:
    """RoBERTa's from its files, or one trained on the captions."""
    if files is not None:
        return CaptionTokenizer.from_files(files)
    return CaptionTokenizer.train_on_texts(collection.captions, preset_config(preset).vocab_size)


def describe_data(collection: Collection, tokenizer: CaptionTokenizer) -> dict[str, Any]:
    """Photographs, captions and tokens, for the head of a document."""
    return {
        "origin": collection.origin,
        "photos": len(collection.names),
        "captions": len(collection.captions),
        "skipped": [skipped._asdict() for skipped in collection.skipped],
        "left_unread": collection.left_unread,
        "tokenizer": tokenizer.origin,
        "vocabulary": tokenizer.vocab_size,
    }


def preset_config(preset: PresetName) -> XFMConfig:
    """A preset with a vocabulary that gives captions their usual length: tiny's own would cut words into letters."""
    return XFMConfig.preset(preset, **({"vocab_size": 2048} if preset == "tiny" else {}))


def make_subjects(preset: PresetName, checkpoint: Path | None, seed: int) -> Subjects:
    """Models with the weights of a checkpoint, or random ones."""
    if checkpoint is not None:
        return Subjects.load(checkpoint, preset)
    return Subjects.random(preset_config(preset), seed)


def _check(
    subjects: Subjects,
    collection: Collection,
    tokenizer: CaptionTokenizer,
    sizes: Sizes,
    names: list[str],
    document: Document,
    progress: Progress,
) -> tuple[dict[tuple[str, str], float], float]:
    """Compare fast and official results on little work; returns the allowed error by scenario and dtype.

    Also the seconds of the very first call of the fast path.
    """
    few = encode(collection, tokenizer, 4)
    scenarios = [
        images(subjects, collection, sizes.small_image, 1),
        images(subjects, collection, sizes.large_image, 1),
        texts(subjects, few, sizes.large_image),
        reranking(subjects, collection, few, sizes.large_image),
    ]
    bands: dict[tuple[str, str], float] = {}
    first_call_s: float | None = None
    with torch.no_grad():
        for scenario in scenarios:
            progress.step(scenario.name)
            expected = scenario.twin(torch.float32)()
            for name in names:
                begun = time.perf_counter()
                result = scenario.fast(DTYPES[name])()
                first_call_s = time.perf_counter() - begun if first_call_s is None else first_call_s
                error = scenario.compare(result, expected).error
                band = _band(scenario, name, expected, error)
                bands[scenario.key, name] = band
                document.content["parity"].append(
                    {
                        "key": scenario.key,
                        "name": scenario.name,
                        "dtype": name,
                        "error": error,
                        "band": band,
                        "passed": error <= band,
                    }
                )
    for name in names:
        # Its scores pass through all the others.
        parts = (f"image-{sizes.large_image}", "text", "rerank")
        bands["retrieval", name] = 2 * sum(bands[key, name] for key in parts)
    return bands, first_call_s or 0.0


def _band(scenario: Scenario, name: str, expected: object, error: float) -> float:
    if name == "fp32":
        if error <= FP32_BAND:
            return FP32_BAND
        own = scenario.compare(expected, scenario.twin(torch.float64)()).error
        return max(FP32_BAND, 3 * own)
    own = scenario.compare(scenario.twin(DTYPES[name])(), expected).error
    return 2 * own + torch.finfo(DTYPES[name]).eps


def _interleaved(
    scenario: Scenario,
    names: list[str],
    probes: dict[str, GemmProbe],
    sizes: Sizes,
    deadline: float,
    options: Options,
    progress: Progress,
) -> Measurement:
    variants = {"twin fp32": scenario.twin(torch.float32)}
    variants |= {f"fast {name}": scenario.fast(DTYPES[name]) for name in names}
    if "bf16" in names and not options.quick and machine.has_native_bf16():
        variants["twin bf16"] = scenario.twin(torch.bfloat16)
    # The check has run all code once; what is left to warm up are this work's own shapes, which a long run repeats many
    # times within itself.
    long = {"rerank": ("twin",), "retrieval": ("twin", "fast")}.get(scenario.key, ())
    warmups = {name: 0 if name.startswith(tuple(long)) else 1 for name in variants}
    return interleave(
        variants,
        list(probes.values()),
        warmups=warmups,
        rounds=sizes.rounds,
        budget_s=sizes.budget_s,
        deadline=deadline,
        on_step=progress.step,
    )


def _rows(
    scenario: Scenario,
    names: list[str],
    measured: Measurement,
    probes: dict[str, GemmProbe],
    bands: dict[tuple[str, str], float],
) -> list[dict[str, Any]]:
    twin = measured.series["twin fp32"]
    rows = []
    for name in names:
        fast = measured.series[f"fast {name}"]
        if not fast.seconds or not twin.seconds:
            continue
        comparison = scenario.compare(fast.output, twin.output)
        band = bands[scenario.key, name]
        row = _row(scenario, name, "measured") | {
            "parity": {"error": comparison.error, "band": band, "note": comparison.note},
        }
        if comparison.error > band:
            rows.append(
                row
                | {
                    "status": "parity failed",
                    "reason": f"error {comparison.error:.1e} exceeds {band:.1e}; no speed is reported",
                }
            )
            continue
        rates = measured.probes[DTYPES[name]]
        flops = scenario.flops(fast.output)
        shares = shares_of_peak(flops, fast.seconds, rates)
        same_dtype = measured.series.get(f"twin {name}", Series())
        row |= {
            "fast": fast.summary(scenario.items),
            "twin": twin.summary(scenario.items),
            "twin_same_dtype": same_dtype.summary(scenario.items) if same_dtype.seconds and name != "fp32" else None,
            "ratio": twin.median / fast.median,
            "ratio_interval": list(ratio_interval(twin.seconds, fast.seconds)),
            "flops": flops,
            "share_of_peak": statistics.median(shares),
            "shares_of_peak": shares,
            "probe": {
                "library": probes[name].library,
                "flops_per_s": rates,
                "contended": contended(rates),
            },
            "memory_method": measured.memory_method,
        }
        if scenario.tokens is not None and scenario.padded_tokens is not None:
            row["tokens"] = {
                "useful": scenario.tokens,
                "padded": scenario.padded_tokens,
                "useful_per_s": scenario.tokens / fast.median,
                "twin_useful_per_s": scenario.tokens / twin.median,
                "twin_padded_per_s": scenario.padded_tokens / twin.median,
            }
        if isinstance(fast.output, Retrieval):
            row["recall"] = fast.output.recall
        rows.append(row)
    return rows


def _row(scenario: Scenario, dtype: str, status: str) -> dict[str, Any]:
    return {
        "key": scenario.key,
        "name": scenario.name,
        "dtype": dtype,
        "status": status,
        "unit": scenario.unit,
        "items": scenario.items,
        "official_flops": scenario.official_flops,
    }


def _absent(scenario: Scenario, dtype: str, reason: str) -> dict[str, Any]:
    return _row(scenario, dtype, "not offered") | {"reason": reason}
