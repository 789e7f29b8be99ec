"""The schema of stored results, and their files.

A document holds the results of one command; a `Result` is one backend at one case in one dtype, and the result of
xfm-fast also holds its comparisons with the other backends of the same rounds. Numbers are in SI units (seconds, bytes,
FLOP/s). What only some cases measure is in `Result.extra`:

- rates: `rate_low`, `rate_high` (95% interval of items per second); `max_qps`, `bound_s`, `bound_origin`,
  `largest_batch`, `trials` of a server; `p50_s`, `p90_s`, `p99_s` of its requests; `clients`, `requests`,
  `clients_p50_s`, `clients_p99_s`, `cpu_s` of a service under load;
- arithmetic of a run: `flops` of the backend's own procedure, `needed_flops` of the result by any procedure, `bytes`
  that have to move at least (weights of the parts that run, inputs and outputs, once); `mfu` and `utilisation` are
  their rates over the GEMM rate probed meanwhile, `mfu_data_sheet` and `share_of_floor` over the GPU's data sheet;
- `tokens` of the texts and `padded_tokens` computed for them;
- memory: `peak_bytes` of the process (on a GPU: of PyTorch's allocator), `grown_bytes` beyond what was held before,
  `memory_method`; of a training step `before_bytes`, `parameter_bytes`, `gradient_bytes`, `checkpointed_bytes`;
- cold start: `build_s`, `load_s`, `first_call_s`, `artifact_bytes`;
- `ran`: what ran each operation of this project, such as `relpos_attention: triton`; where one fell back to PyTorch the
  result is `absent`;
- `stages` and `operations`: seconds of one run by part; `host_s` and `timed_by` of a GPU kernel; `recall`; `replaced`,
  the report of `accelerate`; `bounds` where a backend computes less than the work; `note` about the machine;
- embeddings of trained weights against fp32: `cosine_least`, `cosine_mean`, `nearest_kept` of `texts_compared`.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from types import UnionType
from typing import (
    TYPE_CHECKING,
    Any,
    Final,
    Literal,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from xfm_fast.errors import DataError

if TYPE_CHECKING:
    from xfm_fast.testing import Collection
    from xfm_fast.tokenizer import CaptionTokenizer

SCHEMA_VERSION = 4
OURS: Final = "xfm-fast"
OFFICIAL: Final = "official-algorithm"
OFFICIAL_CODE = "official-code"
# Labels of our rows of other people's models: `accelerate`, and another function that computes the same.
ACCELERATED: Final = "accelerated"
RERANKER: Final = "Reranker"
UNTOUCHED, ONE_AT_A_TIME = "untouched", "one-at-a-time"

Mode = Literal["single-stream", "offline", "server"]
MODES: tuple[Mode, ...] = get_args(Mode)
Direction = Literal["forward", "backward", "forward and backward"]
Status = Literal["measured", "partial", "failed", "absent", "parity failed", "not offered"]
"""`partial`: interrupted. `failed`: the backend raised an error. `absent`: it is not installed or cannot run here.
`not offered`: it or the processor lacks the dtype."""

Extra = dict[str, int | float | str | list[str] | dict[str, float] | None]


@dataclass(kw_only=True)
class Parity:
    """Largest difference from the reference, relative to the largest value, and what rounding in the dtype explains.

    Attributes:
        error: null if not finite.
        against: the reference.
        cosine: between the outputs, of results in int8.
    """

    error: float | None
    band: float | None
    passed: bool
    against: str
    note: str = ""
    cosine: float | None = None


@dataclass(kw_only=True)
class Comparison:
    """How many times as fast a result is as another backend at the same case, from interleaved samples.

    Attributes:
        like_for_like: whether both have the same dtype.
        low, high: bootstrap interval of 95%; null with fewer than three samples.
    """

    backend: str
    dtype: str
    like_for_like: bool
    ratio: float
    low: float | None = None
    high: float | None = None


@dataclass(kw_only=True)
class Result:
    """One backend at one case in one dtype.

    Attributes:
        work: kind of work; `name` is the call or the amount of work, `conditions` its inputs, for readers.
        mode: how requests come, or the direction of an operation; everything that runs back to back is `offline`.
        backend: stable name; `label` is for readers.
        unit: what `items` of a run counts.
        seconds: of every run, or of every request of `single-stream`.
        against: of xfm-fast: the other backends.
        contended: something else ran on the machine meanwhile.
        extra: see the module.
    """

    work: str
    name: str
    conditions: str = ""
    mode: Mode | Direction = "offline"
    backend: str
    label: str
    dtype: str
    status: Status
    reason: str | None = None
    unit: str
    items: int
    seconds: list[float] = field(default_factory=list)
    parity: Parity | None = None
    against: list[Comparison] = field(default_factory=list)
    contended: bool = False
    extra: Extra = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        """True for xfm-fast."""
        return is_ours(self.backend)

    @property
    def title(self) -> str:
        """The backend with its dtype."""
        return f"{self.label}, {self.dtype}"

    @property
    def place(self) -> tuple[str, ...]:
        """Equal for all backends at the same case."""
        return self.work, self.mode, self.name

    @property
    def key(self) -> tuple[str, ...]:
        """Equal for the same backend in the same dtype at the same case in two documents."""
        return *self.place, self.backend, self.dtype

    @property
    def measured(self) -> bool:
        """True if it has numbers, complete or interrupted."""
        has_numbers = bool(self.seconds) or self.number("max_qps") is not None
        return has_numbers and self.status in ("measured", "partial")

    @property
    def median_s(self) -> float | None:
        """Median time of a run or request."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def rate(self) -> float | None:
        """Items per second."""
        return self.items / self.median_s if self.median_s else None

    def number(self, name: str) -> float | None:
        """Return a number of `extra`."""
        value = self.extra.get(name)
        return value if isinstance(value, int | float) else None

    def numbers(self, name: str) -> dict[str, float]:
        """Return numbers by name of `extra`."""
        value = self.extra.get(name)
        return value if isinstance(value, dict) else {}

    def text(self, name: str) -> str:
        """Return a text of `extra`."""
        value = self.extra.get(name)
        return value if isinstance(value, str) else ""

    def per_second(self, name: str) -> float | None:
        """Return an amount of `extra` divided by the median time."""
        amount = self.number(name)
        return amount / self.median_s if amount and self.median_s else None


@dataclass(kw_only=True)
class Baseline:
    """A backend that was considered; `reason` is why it is absent."""

    backend: str
    label: str
    version: str | None = None
    reason: str | None = None


@dataclass(kw_only=True)
class Probe:
    """Rates of the machine in a dtype: GEMMs (with the fastest library) and copies."""

    library: str
    gemm_flops_per_s: float
    copy_bytes_per_s: float | None = None


@dataclass(kw_only=True)
class Skip:
    """An input that could not be used, and why."""

    what: str
    reason: str


@dataclass(kw_only=True)
class Data:
    """Photographs, captions and tokens of the inputs."""

    origin: str
    photos: int
    captions: int
    skipped: list[Skip] = field(default_factory=list)
    left_unread: int = 0
    tokenizer: str
    vocabulary: int

    @classmethod
    def of(cls, collection: Collection, tokenizer: CaptionTokenizer) -> Data:
        """Describe photographs with captions and their tokenizer."""
        return cls(
            origin=collection.origin,
            photos=len(collection.names),
            captions=len(collection.captions),
            skipped=[Skip(what=name, reason=reason) for name, reason in collection.skipped],
            left_unread=collection.left_unread,
            tokenizer=tokenizer.origin,
            vocabulary=tokenizer.vocab_size,
        )


@dataclass(kw_only=True)
class Model:
    """The measured model; `config` are the fields of its `XFMConfig`."""

    preset: str
    origin: str
    trained: bool
    meaningful_recall: bool
    config: dict[str, Any]
    parameters: int


@dataclass(kw_only=True)
class Document:
    """The results of one command.

    Attributes:
        title: of the report.
        reference: the backend that speed-ups refer to.
        machine: the facts of `machine.describe`.
        cold_start: seconds of imports, weights and the first call.
        probes: by dtype.
        paths: the implementation that each operation chose on this CPU.
        energy_note: of earlier versions.
    """

    schema_version: Literal[4]
    benchmark: str
    title: str
    reference: str
    date: str
    command: list[str]
    options: dict[str, Any]
    interrupted: bool = False
    device: str
    machine: dict[str, Any]
    model: Model | None = None
    data: Data | None = None
    cold_start: dict[str, float] = field(default_factory=dict)
    probes: dict[str, Probe] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)
    baselines: list[Baseline] = field(default_factory=list)
    rows: list[Result] = field(default_factory=list)
    energy_note: str | None = None
    duration_s: float = 0.0

    @property
    def ok(self) -> bool:
        """False if a result of xfm-fast failed or differs from the reference."""
        return not any(row.ours and row.status in ("failed", "parity failed") for row in self.rows)

    @property
    def measured(self) -> list[Result]:
        """Results with numbers."""
        return [row for row in self.rows if row.measured]

    def at_same_case(self, row: Result, backend: str, dtype: str) -> Result | None:
        """Return the result of a backend at the same case."""
        key = (*row.place, backend, dtype)
        return next((result for result in self.rows if result.key == key), None)

    def reference_row(self, row: Result) -> Result | None:
        """Return the reference at the same case, in fp32 or else in the dtype of the row."""
        fp32 = self.at_same_case(row, self.reference, "fp32")
        return fp32 or self.at_same_case(row, self.reference, row.dtype)

    def headline(self, row: Result) -> Comparison | None:
        """Return the comparison with the reference in fp32, or else in the dtype of the row."""
        for comparison in row.against:
            if comparison.backend == self.reference and comparison.dtype == "fp32":
                return comparison
        return self.like_for_like(row)

    def like_for_like(self, row: Result) -> Comparison | None:
        """Return the comparison with the reference in the same dtype."""
        for comparison in row.against:
            if comparison.backend == self.reference and comparison.like_for_like:
                return comparison
        return None

    def encoded(self) -> bytes:
        """Return the document as JSON."""
        return (json.dumps(plain(self), ensure_ascii=False, indent=1) + "\n").encode()


def is_ours(backend: str) -> bool:
    """Return whether a backend is xfm-fast or a call of `accelerate`."""
    return backend == OURS or backend.startswith("accelerate(")


def finite(value: float) -> float | None:
    """Return None instead of infinity and NaN, which JSON lacks."""
    return value if math.isfinite(value) else None


def plain(value: Any) -> Any:
    """Convert a record to values of JSON, without fields that have their defaults."""
    if is_dataclass(value):
        content = {}
        for field_ in fields(value):
            item = getattr(value, field_.name)
            if item != _default(field_):
                content[field_.name] = plain(item)
        return content
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return finite(value) if isinstance(value, float) else value


def parse(hint: Any, value: Any, path: str = "") -> Any:
    """Convert values of JSON to a record; raises `ValueError` with the path of the first fault."""
    origin, args = get_origin(hint), get_args(hint)
    if isinstance(hint, type) and is_dataclass(hint) and isinstance(value, dict):
        return _parse_record(hint, value, path)
    if origin in (Union, UnionType):
        for option in args:
            with suppress(ValueError):
                return parse(option, value, path)
    elif origin is list and isinstance(value, list):
        return [parse(args[0], item, f"{path}{index}.") for index, item in enumerate(value)]
    elif origin is dict and isinstance(value, dict):
        return {name: parse(args[1], item, f"{path}{name}.") for name, item in value.items()}
    elif origin is Literal:
        if any(type(value) is type(option) and value == option for option in args):
            return value
    elif hint is float and type(value) is int:
        return float(value)
    elif hint is Any or type(value) is hint:
        return value
    expected = str(hint).replace("typing.", "")
    raise ValueError(f"{path.removesuffix('.')} is {str(value)[:80]!r}; it must be {expected}")


def _parse_record(record: type, content: dict[str, Any], path: str) -> Any:
    hints = _hints(record)
    if unknown := sorted(content.keys() - hints.keys()):
        raise ValueError(f"{path}{unknown[0]} is unknown")
    required = {field_.name for field_ in fields(record) if _default(field_) is MISSING}
    if missing := sorted(required - content.keys()):
        raise ValueError(f"{path}{missing[0]} is missing")
    values = {name: parse(hints[name], item, f"{path}{name}.") for name, item in content.items()}
    return record(**values)


_hints = cache(get_type_hints)


def _default(field_: Field[Any]) -> Any:
    return field_.default if field_.default_factory is MISSING else field_.default_factory()


def format_seconds(seconds: float) -> str:
    """Format a time in the unit that suits it."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def groups(rows: Iterable[Result]) -> list[list[Result]]:
    """Return results of the same case together, in order of appearance."""
    cases: dict[tuple[str, ...], list[Result]] = {}
    for row in rows:
        cases.setdefault(row.place, []).append(row)
    return list(cases.values())


def load(path: str | Path) -> Document:
    """Read a results document; raises `DataError` for a file that is unreadable, damaged, or of another schema."""
    # Imported here, since its packages may be missing where operations are measured.
    from xfm_fast.io import read_json

    try:
        content = read_json(path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); name a results file that exists"
        ) from None
    except ValueError as error:
        raise DataError(
            f"{path} is not JSON ({error}); name a file that xfm-fast bench wrote"
        ) from None
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise DataError(
            f"{path} has schema version {version!r}, and this xfm-fast reads version {SCHEMA_VERSION}; measure again "
            "with xfm-fast bench, or use the xfm-fast that wrote it"
        )
    try:
        return parse(Document, content)
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}; measure again") from None


def save(document: Document, folder: str | Path, page: str) -> Path:
    """Write `<timestamp>.json` and `.html`, and the same as `latest.json` and `latest.html`.

    All four appear complete or not at all; results of earlier runs are never overwritten. `page` is the HTML of the
    document. Returns the path of the JSON file; raises `StorageError`.
    """
    from xfm_fast.io import storing, write_bytes

    folder = Path(folder)
    with storing(folder, "choose another folder with --out"):
        folder.mkdir(parents=True, exist_ok=True)
    stem = datetime.fromisoformat(document.date).strftime("%Y%m%dT%H%M%SZ")
    candidates = [stem, *(f"{stem}-{count}" for count in range(2, 1000))]
    stem = next((name for name in candidates if not (folder / f"{name}.json").exists()), stem)
    files = {}
    for name in (stem, "latest"):
        files[folder / f"{name}.json"] = document.encoded()
        files[folder / f"{name}.html"] = page.encode()
    write_bytes(files)
    return folder / f"{stem}.json"


def save_as(document: Document, path: Path) -> None:
    """Write a document under a name of the user's choice; raises `StorageError`."""
    from xfm_fast.io import write_bytes

    write_bytes({path: document.encoded()})
