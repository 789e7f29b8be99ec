"""The one schema of all results documents: the suite, scenarios, sweeps, evaluations, training steps, drop-in, kernels.

A row is one contender at one kind of work, in one way of asking, one type and one size; the row of xfm-fast also says
how it compares with every other contender that took turns with it. The document is JSON; `SCHEMA_VERSION` counts its
changes. Every number is in SI units (seconds, bytes, FLOP/s, joules). A field that says nothing about a row is null,
and `reason` tells why a row has no numbers.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict

from . import machine

SCHEMA_VERSION = 3
OURS, OFFICIAL, OFFICIAL_CODE = "xfm-fast", "official-algorithm", "official-code"
UNTOUCHED, EAGER, ONE_AT_A_TIME, HUGGING_FACE = "untouched", "eager", "one-at-a-time", "huggingface"

Benchmark = Literal[
    "suite",
    "scenario",
    "sweep",
    "coco",
    "vqa",
    "train-step",
    "drop-in",
    "kernels",
    "serve",
    "device",
    "cold-start",
    "sessions",
]
Mode = Literal["single-stream", "offline", "server"]
MODES: tuple[Mode, ...] = get_args(Mode)
Direction = Literal["forward", "backward", "forward and backward"]
Status = Literal["measured", "partial", "failed", "absent", "parity failed", "not offered"]
"""`partial`: interrupted, with the samples until then. `failed`: the contender raised an error. `absent`: it is not
installed or cannot run here. `not offered`: it or the processor lacks the type."""


LEAST_POINTS = 4
"""Sizes from which an exponent is fitted: fewer lie on almost any line."""


class Record(BaseModel):
    """Plain values; unknown fields are refused, so that a document is read as what it is."""

    model_config = ConfigDict(extra="forbid")


class Parity(Record):
    """Largest difference from the reference, relative to the largest value, and what the type's rounding allows.

    Attributes:
        error: null where it is not finite.
        band: null where results of an earlier schema did not keep it.
        against: the contender and type that results are compared with.
        cosine: between the outputs, of rows in int8.
    """

    error: float | None
    band: float | None
    passed: bool
    against: str
    note: str = ""
    cosine: float | None = None


class Interval(Record):
    """A value with its bootstrap interval of 95%; fewer than three samples have none."""

    value: float
    low: float | None = None
    high: float | None = None


class Latency(Record):
    """Time of one request: from when it is asked (server: from its arrival) until its results are there."""

    samples: list[float]
    p50: Interval
    p90: Interval
    p99: Interval
    mean: float


class Trial(Record):
    """Requests at one rate. `held`: at most 1% took longer than the bound. `cut`: ended early, being lost already."""

    rate: float
    served_per_s: float
    requests: int
    late: int
    p50: float
    p90: float
    p99: float
    mean_batch: float
    held: bool
    cut: bool


class Server(Record):
    """The highest rate of Poisson arrivals at which the bound held.

    Attributes:
        max_qps: requests a second; zero where even the lowest rate that was tried broke the bound.
        bound_s: on the 99th percentile of latency.
        bound_origin: who decided it.
        largest_batch: that waiting requests were put into; 1 where the contender takes one at a time.
        trials: in the order of the search.
    """

    max_qps: float
    bound_s: float
    bound_origin: str
    largest_batch: int
    arrivals: Literal["poisson"] = "poisson"
    seed: int
    trials: list[Trial]


class Clients(Record):
    """Clients of a service, each of which asks again when it was answered.

    Attributes:
        clients: at a time.
        requests: of all windows.
        p50, p99: seconds from a request to its answer.
        failures: requests without the answer that was due.
        cpu_s: processor time of the service for a request; null where it was not looked at.
    """

    clients: int
    requests: int
    p50: Interval
    p99: Interval
    failures: int
    cpu_s: Interval | None = None


class Share(Record):
    """A part of one run: its median time and its share of all parts."""

    name: str
    seconds: float
    share: float


class Tokens(Record):
    """Text tokens of one run: those of the texts, and those that the contender computed with its padding."""

    useful: int
    padded: int
    useful_per_s: float
    padded_per_s: float


class Efficiency(Record):
    """Arithmetic of one run against what the machine was measured to do in the same type, meanwhile.

    Attributes:
        flops: that the contender's procedure needs (`xfm_fast.flops`); null where its own schedule is not known.
        needed_flops: that the result needs, by whatever procedure.
        mfu: `needed_flops` a second, over the rate of the matrix probe; null where no such probe was taken.
        mfu_data_sheet: over the data sheet's rate, on a GPU that is known.
        utilisation: `flops` a second, over the rate of the matrix probe: how busy it kept the machine.
        bytes: that have to move at least: the weights of the parts that run, inputs and outputs, once.
        intensity: `needed_flops` for each of these bytes.
        roof: FLOP/s, the lower of the matrix rate and of `intensity` times the copy rate; `roof_bound`: by what.
        share_of_roof: `needed_flops` a second, over `roof`. More than 1 where weights stay in the cache.
        share_of_floor: the shortest time that a GPU's data sheet allows, over the median time; of kernels.
    """

    flops: int | None = None
    needed_flops: int
    mfu: float | None = None
    mfu_data_sheet: float | None = None
    utilisation: float | None = None
    bytes: int | None = None
    intensity: float | None = None
    roof: float | None = None
    roof_bound: Literal["compute", "memory"] | None = None
    share_of_roof: float | None = None
    share_of_floor: float | None = None


class Memory(Record):
    """Peak memory of the process (on a GPU: of PyTorch's allocator) during a run, and the growth over what was held.

    Attributes:
        before_bytes, parameter_bytes, gradient_bytes: of a training step; `grown_bytes` then are what it takes beyond
            what was there before and beyond the gradients.
        checkpointed_bytes: `peak_bytes` of the same step with the recipes' `activation_checkpointing`, on a CPU.
    """

    peak_bytes: int
    grown_bytes: int
    method: str
    before_bytes: int | None = None
    parameter_bytes: int | None = None
    gradient_bytes: int | None = None
    checkpointed_bytes: int | None = None


class Cost(Record):
    """The price until a contender answers.

    Attributes:
        build_s: exporting, compiling or building, once for all processes; zero where there is nothing to build.
        load_s: from built files or weights in memory to a contender that is ready.
        first_call_s: of the first request.
        artifact_bytes: on disk; of contenders that are built.
    """

    build_s: float
    load_s: float
    first_call_s: float
    artifact_bytes: int | None = None


class Energy(Record):
    """Energy of the whole package or board, idle power included, while the row's runs were timed."""

    joules_per_item: float
    watts: float
    source: str


class Conditions(Record):
    """The machine meanwhile.

    Attributes:
        gemm_flops_per_s, copy_bytes_per_s: every probe, before, between and after the samples.
        contended: a probe moved by more than 10% from the median.
        drift: last probe over first; below 1 the machine slowed down.
        clocks_mhz, temperatures_c: of the GPU, at the same moments.
        note: in words, where something is remarkable.
    """

    gemm_flops_per_s: list[float]
    copy_bytes_per_s: list[float]
    contended: bool
    drift: float
    clocks_mhz: list[float] = []
    temperatures_c: list[float] = []
    note: str = ""


class Comparison(Record):
    """How many times as fast this row is as another contender of the same work, from interleaved samples.

    Attributes:
        like_for_like: whether the other one ran in the type of this row.
        low, high: bootstrap interval of 95%; null with fewer than three samples.
    """

    contender: str
    dtype: str
    like_for_like: bool
    ratio: float
    low: float | None = None
    high: float | None = None


class Point(Record):
    """The size of the work of a row.

    Attributes:
        batch: requests that run together (offline), or 1.
        image_size: pixels along a side.
        texts: in a request; captions of a `rerank` request, 1 for `retrieve`, all those of a `retrieval`, questions of
            `vqa`.
        lengths: distribution of the texts' lengths, by name.
        mean_length: tokens.
        padded_length: tokens that a padding contender computes for each text.
        index: images that are searched, or answers that are ranked; `k`: candidates among them.
        dropout: whether a training step has it.
        clients: that ask a service at a time.
    """

    batch: int = 1
    image_size: int | None = None
    texts: int | None = None
    lengths: str | None = None
    mean_length: float | None = None
    padded_length: int | None = None
    index: int | None = None
    k: int | None = None
    dropout: bool | None = None
    clients: int | None = None


class Row(Record):
    """One contender at one kind of work, in one mode, type and size.

    Attributes:
        work: `embed-image`, `embed-text`, `rerank`, `retrieve`, `retrieval` (of a whole collection), `cold-start`,
            `vqa` and `vqa-...`, `train-step`, `finetune-TASK` and both with `-dropout`; the key of a model of
            `drop-in`; an operation of `kernels`.
        mode: how requests come; everything that runs back to back is `offline`.
        direction: of an operation.
        contender: stable name; `label` is for readers.
        name: says the amount of work.
        x: value of the swept axis `over`, in a sweep.
        unit: what `items` of a run counts; a run is a request or, offline, a batch.
        throughput: items a second.
        seconds: of every run; of single requests see `latency`.
        stages: parts of the procedure, such as image memory and fusion, timed apart from the row's samples.
        operations: the same run by kind of operation, for contenders that PyTorch can profile.
        against: of rows of xfm-fast, every other contender that was measured beside it; in `sessions`, of a session
            its library by itself.
        energy_note: why `energy` is null.
        recall: of a `retrieval`.
        replaced: lines of the report of `accelerate`, in `drop-in`.
        bounds: computes less than the work and so bounds its time, in `kernels`; it has no parity.
        host_s: in which the host issues a run, where the GPU's time was taken apart from it.
        timed_by: what took `seconds`; of kernels on a GPU graph replay, or events where no graph can hold the work.
    """

    work: str
    mode: Mode = "offline"
    direction: Direction | None = None
    contender: str
    label: str
    dtype: str
    name: str
    point: Point = Point()
    x: float | None = None
    over: str | None = None
    status: Status
    reason: str | None = None
    unit: str
    items: int
    parity: Parity | None = None
    latency: Latency | None = None
    throughput: Interval | None = None
    seconds: list[float] = []
    server: Server | None = None
    clients: Clients | None = None
    against: list[Comparison] = []
    stages: list[Share] = []
    operations: list[Share] = []
    tokens: Tokens | None = None
    efficiency: Efficiency | None = None
    memory: Memory | None = None
    cost: Cost | None = None
    energy: Energy | None = None
    energy_note: str | None = None
    conditions: Conditions | None = None
    recall: dict[str, float] | None = None
    replaced: list[str] = []
    bounds: bool = False
    host_s: float | None = None
    timed_by: Literal["clock", "events", "graph replay"] | None = None

    @property
    def ours(self) -> bool:
        """True for xfm-fast, and no baseline."""
        return self.contender == OURS

    @property
    def title(self) -> str:
        """The contender with its type: nothing is compared without one."""
        return f"{self.label}, {self.dtype}"

    @property
    def place(self) -> tuple[str, ...]:
        """Equal for all contenders at the same work, in every type, in two documents too."""
        point = json.dumps(self.point.model_dump(exclude_none=True), sort_keys=True)
        return self.work, self.mode, self.direction or "", self.name, point, str(self.x), self.over or ""

    @property
    def key(self) -> tuple[str, ...]:
        """Equal for the same contender in the same type at the same work in two documents."""
        return *self.place, self.contender, self.dtype

    @property
    def measured(self) -> bool:
        """True where it has numbers, complete or interrupted."""
        return self.status in ("measured", "partial") and bool(self.samples or self.server)

    @property
    def samples(self) -> list[float]:
        """Seconds of every run, or of every single request; none of a server, whose result is a rate."""
        if self.seconds or self.mode != "single-stream" or self.latency is None:
            return self.seconds
        return self.latency.samples

    @property
    def median_s(self) -> float | None:
        """Median time of a run or of a single request."""
        return statistics.median(self.samples) if self.samples else None

    @property
    def contended(self) -> bool:
        """True where something else ran on the machine meanwhile."""
        return self.conditions is not None and self.conditions.contended

    @property
    def flops_per_s(self) -> float | None:
        """Arithmetic that the result needs, a second."""
        needed = None if self.efficiency is None else self.efficiency.needed_flops
        return needed / self.median_s if needed and self.median_s else None

    @property
    def bytes_per_s(self) -> float | None:
        """Bytes that have to move, a second."""
        moved = None if self.efficiency is None else self.efficiency.bytes
        return moved / self.median_s if moved and self.median_s else None


class Fit(Record):
    """Cost as work grows: seconds of a run ∝ x^exponent, by least squares through the logarithms.

    Attributes:
        over: the swept axis; `x_label` says what x counts.
        low, high: interval of 95% of the exponent (Student's t).
        r2: share of the variance of log seconds that the line explains.
    """

    work: str
    contender: str
    dtype: str
    over: str
    x_label: str
    exponent: float
    low: float | None
    high: float | None
    r2: float
    points: int


class Baseline(Record):
    """A contender that was considered: taking part, or not and why not."""

    contender: str
    label: str
    works: list[str]
    present: bool
    version: str | None = None
    reason: str | None = None


class Probe(Record):
    """The machine's rates in a type: matrix products (with the library that is best at them) and copies."""

    library: str
    shape: list[int]
    gemm_flops_per_s: float
    copy_bytes_per_s: float | None = None
    copy_buffer_bytes: int | None = None


class ReceiptStep(Record):
    """One reason why the procedure of xfm-fast costs less: FLOPs left after it, and the factor that it saves."""

    saving: str
    flops: float
    factor: float


class Evaluation(Record):
    """A whole retrieval evaluation, by one procedure.

    Attributes:
        pairs: image-text pairs that pass through the fusion encoder.
        seconds: of the stages by name; `total_s` with its interval is their sum.
        kind: `projected` from rates of this machine, `measured`, or `measured in part` (`measured_share` of the pairs).
    """

    procedure: Literal["xfm-fast", "official-algorithm"]
    dtype: str
    kind: Literal["projected", "measured", "measured in part"]
    pairs: int
    flops: float
    flops_per_s: float
    seconds: dict[str, float]
    total_s: Interval
    measured_share: float = 0.0


class Coco(Record):
    """The evaluation of a collection the size of COCO's 5k test split, or of the user's."""

    origin: str
    images: int
    texts: int
    k: int
    image_size: int
    mean_length: float
    padded_length: int
    evaluations: list[Evaluation]
    receipt: list[ReceiptStep]
    speed_up: Interval
    parity: Parity | None = None
    recall: dict[str, float] | None = None
    note: str = ""


class Skip(Record):
    """Something that could not be used, and why."""

    what: str
    reason: str


class Data(Record):
    """Photographs, captions and tokens that were used; `left_unread` photographs were not looked at."""

    origin: str
    photos: int
    captions: int
    skipped: list[Skip] = []
    left_unread: int = 0
    tokenizer: str
    vocabulary: int


class Model(Record):
    """The model that was measured.

    Attributes:
        origin: where the weights come from; `trained` says whether from a checkpoint.
        meaningful_recall: whether its retrieval quality means something.
        config: its sizes (`XFMConfig`).
    """

    preset: str
    origin: str
    trained: bool
    meaningful_recall: bool
    config: dict[str, Any]
    parameters: int


class ColdStart(Record):
    """Seconds from the start of the process to the first result: imports, weights, first call."""

    process_s: float
    load_s: float
    first_call_s: float

    @property
    def total_s(self) -> float:
        return self.process_s + self.load_s + self.first_call_s


class Selection(Record):
    """The path that an operation took on this CPU, with the times that decided, and why others were left out."""

    operation: str
    dtype: str
    chosen: str
    seconds: dict[str, float | None]
    rejected: dict[str, str]


class Document(Record):
    """Everything that one command measured.

    Attributes:
        options: those of the command.
        device: `cpu` or `cuda`.
        machine: the facts of `machine.describe`.
        probes: by type.
    """

    schema_version: Literal[3] = SCHEMA_VERSION
    benchmark: Benchmark
    date: str
    command: list[str]
    options: dict[str, Any]
    interrupted: bool = False
    device: str
    machine: dict[str, Any]
    model: Model | None = None
    data: Data | None = None
    cold_start: ColdStart | None = None
    probes: dict[str, Probe] = {}
    selections: list[Selection] = []
    baselines: list[Baseline] = []
    rows: list[Row] = []
    fits: list[Fit] = []
    coco: Coco | None = None
    duration_s: float = 0.0

    @classmethod
    def begun(cls, benchmark: Benchmark, options: Mapping[str, Any], command: Sequence[str], device: str) -> Self:
        """A document without results yet."""
        plain = {
            name: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
            for name, value in options.items()
        }
        date = datetime.now(UTC).isoformat(timespec="seconds")
        facts = machine.describe()
        return cls(benchmark=benchmark, date=date, command=list(command), options=plain, device=device, machine=facts)

    @property
    def ok(self) -> bool:
        """True where nothing differed that should be equal; a failed baseline is no fault of ours."""
        equal = self.coco is None or self.coco.parity is None or self.coco.parity.passed
        return equal and not any(row.ours and row.status in ("failed", "parity failed") for row in self.rows)

    @property
    def measured(self) -> list[Row]:
        """Rows with numbers."""
        return [row for row in self.rows if row.measured]

    @property
    def reference(self) -> str:
        """The contender that speed-ups are told against, such as the official algorithm or the untouched model."""
        others = {
            "drop-in": UNTOUCHED, "kernels": EAGER, "device": EAGER, "serve": ONE_AT_A_TIME,
            "cold-start": HUGGING_FACE,
        }  # fmt: skip
        return others.get(self.benchmark, OFFICIAL)

    def beside(self, row: Row, contender: str, dtype: str) -> Row | None:
        """The row of another contender at the same work."""
        return next((r for r in self.rows if (*row.place, contender, dtype) == r.key), None)

    def reference_row(self, row: Row) -> Row | None:
        """The reference at the same work: in fp32, as it was published, or where it has no fp32 in the row's type."""
        return self.beside(row, self.reference, "fp32") or self.beside(row, self.reference, row.dtype)

    def headline(self, row: Row) -> Comparison | None:
        """The comparison of a row of xfm-fast with the reference in fp32; where it has no fp32, in the same type."""
        found = [other for other in row.against if other.contender == self.reference]
        return next((c for c in found if c.dtype == "fp32"), None) or next((c for c in found if c.like_for_like), None)

    def like_for_like(self, row: Row) -> Comparison | None:
        """The comparison of a row of xfm-fast with the reference in the same type."""
        return next((c for c in row.against if c.contender == self.reference and c.like_for_like), None)

    def encoded(self) -> bytes:
        """The document as JSON, which has null for infinities."""
        return self.model_dump_json(indent=1).encode() + b"\n"


def finite(value: float) -> float | None:
    """JSON has neither infinity nor NaN: null stands for them."""
    return value if math.isfinite(value) else None


def groups(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows of the same work together, in the order in which each work comes first."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(row.place, []).append(row)
    return list(found.values())
