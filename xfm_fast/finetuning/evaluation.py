"""Distributed, resumable evaluation of a split.

Records are split into batches independently of the number of processes; each process predicts some of them and appends
the rows to its own journal. So rows and metrics are the same for any number of processes, and a killed evaluation
resumes. All processes need access to the journal folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from xfm_fast.checkpoint import write_bytes
from xfm_fast.checkpoint.files import hold
from xfm_fast.documents import parse_json
from xfm_fast.errors import DataError, StorageError
from xfm_fast.export.session import Session
from xfm_fast.models.processor import evaluating
from xfm_fast.models.xfm import XFM
from xfm_fast.tasks.reranking import checksum
from xfm_fast.training.distributed import Processes

METRICS_FILE = "metrics.json"

Row = dict[str, Any]
"""A result as a JSON object."""
Metrics = dict[str, float]


class EvaluationTask(Protocol):
    """Task interface of evaluation; see `xfm_fast.finetuning.task.Task`."""

    @property
    def options(self) -> Any: ...

    def groups(self, records: Sequence[Any]) -> list[list[int]]:
        """Indices of records to predict together."""
        ...

    def predict(self, model: Any, records: Sequence[Any]) -> list[Row]:
        """One result row per record."""
        ...

    def evaluate(self, model: Any, records: Sequence[Any], work: Evaluation) -> tuple[Metrics, dict[str, bytes]]:
        """Metrics and files of a split."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """Settings of an evaluation."""

    folder: Path  # output folder, which also holds the journals
    processes: Processes = field(default_factory=Processes)  # process group that shares the work
    batch_size: int = 64  # minimum records per batch; batches contain whole groups
    # autocast context of predictions
    autocast: Callable[[], AbstractContextManager[Any]] = lambda: torch.autocast("cpu", enabled=False)
    progress: Callable[[int, int], None] = lambda done, of: None  # called with (records done by this process, total)

    def run(self, task: EvaluationTask, model: XFM, records: Sequence[Any]) -> Metrics:
        """Evaluate a split, write metrics and task files to the folder, and return the metrics on every process.

        The model runs in evaluation mode, and its mode is restored.
        """
        if not records:
            raise DataError("the split holds no records; a metric needs at least one")
        with evaluating(model), self.autocast():
            metrics, files = task.evaluate(model, records, self)

        def save() -> Metrics:
            summary = {"metrics": metrics, "records": len(records), "task": task.options.kind}
            content = {**files, METRICS_FILE: (json.dumps(summary, indent=1) + "\n").encode()}
            self.make_folder()
            write_bytes({self.folder / name: data for name, data in content.items()})
            # A task may keep journals of another form under the same name.
            for journal in self.folder.glob("rows-*"):
                with suppress(OSError):
                    journal.unlink()
            return metrics

        return self.processes.from_first(save)

    def make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"folder {self.folder} cannot be made ({error.strerror or error}); choose another"
            ) from error

    def rows(self, task: EvaluationTask, model: XFM | Session, records: Sequence[Any]) -> list[Row]:
        """Rows of all records on the first process, empty on the others."""
        batches = _batches(task.groups(records), self.batch_size)
        identity = fingerprint(task, model, records, self.batch_size)
        with ExitStack() as alone:
            done = self.processes.from_first(lambda: self._begin(identity, alone))
            left = [number for number in range(len(batches)) if number not in done]
            path = self.folder / f"rows-{self.processes.rank:05d}.jsonl"

            def work() -> None:
                finished = 0
                with _Journal(path, identity) as journal:
                    for number in left[self.processes.rank :: self.processes.world_size]:
                        rows = task.predict(model, [records[place] for place in batches[number]])
                        journal.append(number, rows)
                        finished += len(rows)
                        self.progress(finished * self.processes.world_size, len(records))

            self.processes.together(work)
            if not self.processes.first:
                return []
            of_batch = self._read(identity)
        rows: list[Row] = [{} for _ in records]
        for number, places in enumerate(batches):
            for place, row in zip(places, of_batch[number], strict=True):
                rows[place] = row
        return rows

    def _begin(self, identity: str, alone: ExitStack) -> set[int]:
        """Batches completed in journals with the same fingerprint; other journals are deleted."""
        self.make_folder()
        alone.enter_context(hold(self.folder / ".lock", f"the evaluation in {self.folder}"))
        for path in self.folder.glob("rows-*.jsonl"):
            if not _lines(path, identity):
                delete(path)
        return {*self._read(identity)}

    def _read(self, identity: str) -> dict[int, list[Row]]:
        return {
            line["batch"]: line["rows"]
            for path in sorted(self.folder.glob("rows-*.jsonl"))
            for line in _lines(path, identity)[1:]
        }


def delete(path: Path) -> None:
    """Delete a file; failure raises `StorageError`."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{path} cannot be deleted ({error.strerror or error}); check its permissions") from error


def fingerprint(task: EvaluationTask, model: XFM | Session, records: Sequence[Any], batch_size: int) -> str:
    """Digest of everything that determines the rows."""
    kind = model.device.type
    precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype
    pictures = "official" if getattr(task, "official_pictures", False) else "upright"
    key = f"{task.options.model_dump_json()} {batch_size} {model.dtype} {precision} {pictures}"
    digest = hashlib.sha256(key.encode())
    if isinstance(model, Session):
        digest.update(model.fingerprint().encode())
    else:
        for name, tensor in model.state_dict().items():
            digest.update(f"{name} {checksum(tensor):08x}".encode())
    for record in records:
        digest.update(record.model_dump_json().encode())
    return digest.hexdigest()


def _batches(groups: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Concatenate whole groups to batches of at least `batch_size` records."""
    batches: list[list[int]] = []
    for group in groups:
        if not batches or len(batches[-1]) >= batch_size:
            batches.append([])
        batches[-1] += group
    return batches


class _Journal:
    """Rows of finished batches, one line each, after a header with the fingerprint."""

    def __init__(self, path: Path, identity: str) -> None:
        self.path, self.identity = path, identity

    def __enter__(self) -> _Journal:
        try:
            # Half a line that a killed process left would spoil the next one.
            kept = _lines(self.path, self.identity) or [{"of": self.identity}]
            write_bytes({self.path: "".join(json.dumps(line) + "\n" for line in kept).encode()})
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise self._failure(error) from error
        return self

    def append(self, batch: int, rows: list[Row]) -> None:
        """Append a batch and flush it."""
        try:
            self._file.write(json.dumps({"batch": batch, "rows": rows}) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._failure(error) from error

    def __exit__(self, *_: object) -> None:
        try:
            with self._file:
                os.fsync(self._file.fileno())
        except OSError as error:
            raise self._failure(error) from error

    def _failure(self, error: OSError) -> StorageError:
        return StorageError(f"{self.path} cannot be written ({error.strerror or error}); free space")


def _lines(path: Path, identity: str) -> list[dict[str, Any]]:
    """Complete lines of a journal, including the header; empty if the fingerprint differs."""
    lines: list[dict[str, Any]] = []
    try:
        # Not splitlines, which also splits within JSON strings. The part after the last line feed is empty.
        for text in path.read_text(encoding="utf-8").split("\n")[:-1]:
            lines.append(parse_json(text))
    except FileNotFoundError:
        return []
    except ValueError:
        # What a killed process or a power cut left; the lines before it count.
        pass
    return lines if lines and lines[0] == {"of": identity} else []
