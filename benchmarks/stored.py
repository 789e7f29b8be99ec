"""Results documents read back, of the suite and its like (schema 1) and of scenarios (schema 2), and their samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xfm_fast.benchmarks.rows import SCHEMA_VERSION, read_document, read_json
from xfm_fast.errors import DataError

_SUITE_SCHEMA = 1
_OFFICIAL = "official-algorithm"
_OURS = "xfm-fast"


@dataclass(frozen=True)
class Timed:
    """One contender at one kind of work, out of either schema.

    Attributes:
        key: equal for the same contender at the same work in two documents.
        control: key of the official algorithm at the same work, measured beside it.
        samples: seconds of every run, or of every request.
        qps: requests a second under a bound, where that is the result.
        status: as in the document.
    """

    key: tuple[str, ...]
    name: str
    contender: str
    dtype: str
    control: tuple[str, ...] | None
    samples: tuple[float, ...]
    qps: float | None
    status: str
    reason: str
    contended: bool

    @property
    def ours(self) -> bool:
        """Whether it is xfm-fast, and no baseline."""
        return self.contender == _OURS


def load(path: str | Path) -> dict[str, Any]:
    """The content of a results document.

    Raises:
        DataError: the file cannot be read, is not JSON, is of another schema, or is damaged.
    """
    content, version = read_json(path)
    if version == SCHEMA_VERSION:
        return read_document(path).as_content()
    if version != _SUITE_SCHEMA:
        raise DataError(
            f"{path} has schema version {version!r}, and this xfm-fast reads {_SUITE_SCHEMA} (bench, bench train-step, "
            f"drop-in, kernels) and {SCHEMA_VERSION} (bench scenario, sweep, coco); measure again, or use the xfm-fast "
            "that wrote it"
        )
    lacking = {"date", "command", "options", "interrupted", "machine", "parity", "rows"} - set(content)
    if lacking:
        raise DataError(f"{path} is damaged: it lacks {', '.join(sorted(lacking))}; measure again")
    return content


def benchmark(content: dict[str, Any]) -> str:
    """Which benchmark a document is of: `suite`, `train-step`, `drop-in`, `kernels`, `scenario`, `sweep`, `coco`."""
    return content.get("benchmark", "suite")


def timed(content: dict[str, Any]) -> list[Timed]:
    """Every row of a document, and in the suite's rows both sides.

    Raises:
        DataError: a row lacks what its schema promises.
    """
    try:
        if content["schema_version"] == SCHEMA_VERSION:
            return [_of_scenario(row) for row in content["rows"]]
        if benchmark(content) == "kernels":
            return [_of_kernel(row) for row in content["rows"]]
        rows = [one for row in content["rows"] for one in _of_suite(row)]
    except (KeyError, TypeError) as error:
        raise DataError(f"a row of {benchmark(content)} results is damaged ({error}); measure again") from None
    # Rows of several types share the official side, which is fp32 and comes with the first of them.
    return list({one.key: one for one in reversed(rows)}.values())[::-1]


def our_kernel(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row of `bench kernels` that this one is an alternative to."""
    work = ("case", "direction", "dtype")
    return next(r for r in rows if r["contender"] == _OURS and all(r[name] == row[name] for name in work))


def kernel_ratio(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> float | None:
    """How many times as fast as this row of `bench kernels` our operation is; None for itself, and without a time."""
    ours = our_kernel(row, rows)
    if row is ours or not row["seconds"] or not ours["seconds"]:
        return None
    return row["seconds"] / ours["seconds"]


def _of_kernel(row: dict[str, Any]) -> Timed:
    work, contender = (row["case"], row["direction"]), row["contender"]
    return Timed(
        (*work, contender, row["dtype"]),
        ", ".join(work),
        contender,
        row["dtype"],
        (*work, "eager", row["dtype"]) if contender != "eager" else None,
        tuple(row["samples"]),
        None,
        "measured" if row["seconds"] else "failed",
        row["note"],
        False,
    )


def _of_suite(row: dict[str, Any]) -> list[Timed]:
    there = row["status"] == "measured"
    twin_dtype = row.get("twin_dtype", "fp32")
    # What accelerate is compared with is the untouched model, not the official algorithm.
    other, baseline = ("original", "untouched") if "original" in row else ("twin", _OFFICIAL)
    control = (row["key"], row["name"], baseline, twin_dtype)
    reason, contended = row.get("reason", ""), there and row["probe"]["contended"]
    sides = [("fast", _OURS, row["dtype"], control), (other, baseline, twin_dtype, None)]
    return [
        Timed(
            (row["key"], row["name"], contender, dtype),
            row["name"],
            contender,
            dtype,
            beside,
            tuple(row[side]["seconds"]) if there else (),
            None,
            row["status"],
            reason,
            contended,
        )
        for side, contender, dtype, beside in sides
        if there or contender == _OURS
    ]


def _of_scenario(row: dict[str, Any]) -> Timed:
    work = (row["scenario"], row["mode"], row["name"], json.dumps(row["point"], sort_keys=True), str(row["x"]))
    latency = row["latency"]["samples"] if row["latency"] and row["mode"] == "single-stream" else []
    return Timed(
        (*work, row["contender"], row["dtype"]),
        f"{row['name']}, {row['mode']}",
        row["contender"],
        row["dtype"],
        (*work, _OFFICIAL, "fp32") if row["contender"] != _OFFICIAL else None,
        tuple(row["seconds"] or latency),
        row["server"]["max_qps"] if row["server"] else None,
        row["status"],
        row["reason"] or "",
        bool(row["conditions"] and row["conditions"]["contended"]),
    )
