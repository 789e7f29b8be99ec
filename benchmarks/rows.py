"""What a document of scenarios holds: one row for a contender at a kind of work, a way of asking and a size.

The document is JSON; `SCHEMA_VERSION` counts its changes. Every number is in SI units (seconds, bytes, FLOP/s, joules).
A field that says nothing about a row is null, and `reason` tells why a row was not measured.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from xfm_fast.errors import DataError

SCHEMA_VERSION = 2

Benchmark = Literal["scenario", "sweep", "coco"]
Mode = Literal["single-stream", "offline", "server"]
MODES: tuple[Mode, ...] = get_args(Mode)
Status = Literal["measured", "partial", "failed", "absent", "parity failed", "not offered"]
"""`partial`: interrupted, with the samples until then. `failed`: the contender raised an error. `absent`: it is not
installed or cannot run here. `not offered`: it or the processor lacks the type."""


class Record(BaseModel):
    """Plain values; unknown fields are refused, so that a document is read as what it is."""

    model_config = ConfigDict(extra="forbid")


class Parity(Record):
    """Largest difference from the reference, relative to the largest value, and what the type's rounding allows.

    Attributes:
        error: null where it is not finite.
        against: the contender and type that results are compared with.
    """

    error: float | None
    band: float
    passed: bool
    against: str
    note: str = ""


class Interval(Record):
    """A value with its bootstrap interval of 95%; a single sample has none."""

    value: float
    low: float | None = None
    high: float | None = None


class Latency(Record):
    """Of one request: from when it is asked (server: from its arrival) until its results are there."""

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
        needed_flops: that the result needs, whoever computes it.
        mfu: `needed_flops` a second, over the rate of the GEMM probe.
        mfu_data_sheet: over the data sheet's rate, on a GPU that is known.
        utilisation: `flops` a second, over the rate of the GEMM probe: how busy it kept the machine.
        bytes: that have to move at least: the weights of the parts that run, inputs and outputs, once.
        intensity: `needed_flops` for each of these bytes.
        roof: FLOP/s, the lower of the GEMM rate and of `intensity` times the copy rate.
        roof_bound: by what.
        share_of_roof: `needed_flops` a second, over `roof`. More than 1 where weights stay in the cache.
    """

    flops: int | None
    needed_flops: int
    mfu: float
    mfu_data_sheet: float | None = None
    utilisation: float | None
    bytes: int
    intensity: float
    roof: float
    roof_bound: Literal["compute", "memory"]
    share_of_roof: float


class Memory(Record):
    """Peak of the process (on a GPU: of PyTorch's allocator) during a run, and the growth over what was held before."""

    peak_bytes: int
    grown_bytes: int
    method: str


class Cost(Record):
    """What it takes until a contender answers.

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
    """Of the whole package or board, idle power included, while the row's runs were timed."""

    joules_per_item: float
    watts: float
    source: str


class Conditions(Record):
    """What else the machine did meanwhile.

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
    """How many times as fast this row is as another contender of the same work, from interleaved samples."""

    contender: str
    dtype: str
    ratio: float
    low: float | None = None
    high: float | None = None


class Point(Record):
    """The size of the work of a row.

    Attributes:
        batch: requests that run together (offline), or 1.
        image_size: pixels along a side.
        texts: in a request; captions of a `rerank` request, 1 for `retrieve`.
        lengths: distribution of the texts' lengths, by name.
        mean_length: tokens.
        padded_length: tokens that a padding contender computes for each text.
        index: images searched by `retrieve`; `k`: re-ranked of them.
    """

    batch: int = 1
    image_size: int | None = None
    texts: int | None = None
    lengths: str | None = None
    mean_length: float | None = None
    padded_length: int | None = None
    index: int | None = None
    k: int | None = None


class Row(Record):
    """One contender at one scenario, mode, type and size.

    Attributes:
        scenario: `embed-image`, `embed-text`, `rerank`, `retrieve`.
        contender: stable name; `label` is for readers.
        name: says the amount of work.
        x: value of the swept axis, in a sweep.
        unit: what `items` of a run counts; a run is a request or, offline, a batch.
        throughput: items a second.
        stages: parts of the procedure, such as image memory and fusion, timed apart from the row's samples.
        operations: the same run by kind of operation, for contenders that PyTorch can profile.
        against: of rows of xfm-fast, every other contender that was measured beside it.
        energy_note: why `energy` is null.
    """

    scenario: str
    mode: Mode
    contender: str
    label: str
    dtype: str
    name: str
    point: Point
    x: float | None = None
    status: Status
    reason: str | None = None
    unit: str
    items: int
    parity: Parity | None = None
    latency: Latency | None = None
    throughput: Interval | None = None
    seconds: list[float] = []
    server: Server | None = None
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


class Fit(Record):
    """Cost as work grows: seconds of a run ∝ x^exponent, by least squares through the logarithms.

    Attributes:
        over: `batch`, `resolution`, `texts` or `lengths`; `x_label` says what x counts.
        low, high: interval of 95% of the exponent (Student's t); null with two points.
        r2: share of the variance of log seconds that the line explains.
    """

    scenario: str
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
    scenarios: list[str]
    present: bool
    version: str | None = None
    reason: str | None = None


class Probe(Record):
    """What the machine does in a type: matrix products (with the library that is best at them) and copies."""

    library: str
    shape: list[int]
    gemm_flops_per_s: float
    copy_bytes_per_s: float
    copy_buffer_bytes: int


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


class Document(Record):
    """Everything that one command measured.

    `machine`, `model`, `data`, `options` and `cold_start` have the form of the suite's own documents.
    """

    schema_version: Literal[2] = SCHEMA_VERSION
    benchmark: Benchmark
    date: str
    command: list[str]
    options: dict[str, Any]
    interrupted: bool = False
    device: str
    machine: dict[str, Any]
    model: dict[str, Any] = {}
    data: dict[str, Any] = {}
    cold_start: dict[str, float] = {}
    probes: dict[str, Probe] = {}
    baselines: list[Baseline] = []
    rows: list[Row] = []
    fits: list[Fit] = []
    coco: Coco | None = None
    duration_s: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether nothing differed that should be equal; a failed baseline is no fault of ours."""
        ours = [row for row in self.rows if row.contender == "xfm-fast"]
        equal = self.coco is None or self.coco.parity is None or self.coco.parity.passed
        return equal and not any(row.status in ("failed", "parity failed") for row in ours)

    def as_content(self) -> dict[str, Any]:
        """For `results.save`."""
        return self.model_dump(mode="json")


def finite(value: float) -> float | None:
    """JSON has neither infinity nor NaN: null stands for them."""
    return value if math.isfinite(value) else None


def read_json(path: str | Path) -> tuple[Any, Any]:
    """What a results file holds, and the schema version that it names (None where it names none).

    Raises:
        DataError: the file cannot be read or is not JSON.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); name a results file that exists") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} is not JSON ({error}); name a file that xfm-fast bench wrote") from None
    return content, content.get("schema_version") if isinstance(content, dict) else None


def read_document(path: str | Path) -> Document:
    """A document of scenarios.

    Raises:
        DataError: the file cannot be read, is not JSON, or is of another schema; names the version found.
    """
    content, version = read_json(path)
    if version != SCHEMA_VERSION:
        raise DataError(
            f"{path} has schema version {version!r}, and this xfm-fast reads documents of scenarios of version "
            f"{SCHEMA_VERSION}; measure again with xfm-fast bench scenario"
        )
    try:
        return Document.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(
            f"{path} is damaged: {where}: {first['msg']} ({error.error_count()} faults); measure again"
        ) from None
