"""Distributed, resumable evaluation of a split.

Records are split into batches independently of the number of processes; each process computes some
of them and appends the results to its own journal. So rows and metrics are the same for any number
of processes, and a killed evaluation resumes. All processes need access to the journal folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

from xfm_fast.errors import DataError
from xfm_fast.io import (
    MOST_JSON_BYTES,
    hold,
    make_folder,
    open_data,
    open_to_append,
    parse_json,
    storing,
    write_bytes,
)
from xfm_fast.models.processor import evaluating
from xfm_fast.models.xfm import XFM
from xfm_fast.training.distributed import Processes

METRICS_FILE = "metrics.json"

Row = dict[str, Any]
"""A result as a JSON object."""
Metrics = dict[str, float]


@dataclass(frozen=True)
class Evaluation:
    """Settings of an evaluation."""

    folder: Path  # output folder, which also holds the journals
    processes: Processes = field(default_factory=Processes)  # process group that shares the work
    batch_size: int = 64  # minimum records per batch; a batch holds all records of its images
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext  # context of predictions
    progress: Callable[[int, int], None] | None = None  # receives (records done, total)

    def run(self, task: Any, model: XFM, records: Sequence[Any]) -> Metrics:
        """Evaluate a split of a `Task`; write metrics and files to the folder.

        Every process returns the metrics. The model runs in evaluation mode, and its mode is
        restored.
        """
        if not records:
            raise DataError("the split holds no records; a metric needs at least one")
        with evaluating(model), self.autocast():
            metrics, files = task.evaluate(model, records, self)

        def save() -> Metrics:
            summary = {"metrics": metrics, "records": len(records), "task": task.options.kind}
            content = {**files, METRICS_FILE: (json.dumps(summary, indent=1) + "\n").encode()}
            make_folder(self.folder)
            write_bytes({self.folder / name: data for name, data in content.items()})
            for journal in self.folder.glob("rows-*"):
                with suppress(OSError):
                    journal.unlink()
            return metrics

        return self.processes.from_first(save)

    def rows(self, task: Any, model: Any, records: Sequence[Any]) -> list[Row]:
        """Predict all records; the first process returns the rows, the others an empty list."""
        batches = self.batches(records, by_image=task.groups_by_image)

        def predict(batch: int) -> list[Row]:
            return task.predict(model, [records[index] for index in batches[batch]])

        identity = fingerprint(task, model, records, self.batch_size)
        results = self.compute(identity, [len(batch) for batch in batches], predict)
        rows: list[Row] = [{} for _ in records] if results else []
        for batch, batch_rows in results.items():
            for index, row in zip(batches[batch], batch_rows, strict=True):
                rows[index] = row
        return rows

    def batches(self, records: Sequence[Any], *, by_image: bool) -> list[list[int]]:
        """Divide record indices into batches; `by_image` keeps all records of an image together."""
        groups: dict[str | int, list[int]] = {}
        for index, record in enumerate(records):
            groups.setdefault(record.image if by_image else index, []).append(index)
        batches: list[list[int]] = []
        for group in groups.values():
            if not batches or len(batches[-1]) >= self.batch_size:
                batches.append([])
            batches[-1] += group
        return batches

    def compute(
        self, identity: str, sizes: Sequence[int], results_of: Callable[[int], list[Any]]
    ) -> dict[int, list[Any]]:
        """Compute the results of every batch as JSON values; `sizes` are records per batch.
        Collective.

        The first process returns them by batch. Batches in journals with the same `identity` are
        not computed again.
        """
        with ExitStack() as stack:

            def begin() -> set[int]:
                """Return the batches in journals of this identity; delete other journals."""
                make_folder(self.folder)
                stack.enter_context(hold(self.folder / ".lock", f"the evaluation in {self.folder}"))
                for path in self.folder.glob("rows-*.jsonl"):
                    if read_journal(path)[0] != identity:
                        delete(path)
                return {*self._read(identity)}

            done = self.processes.from_first(begin)
            path = self.folder / f"rows-{self.processes.rank:05d}.jsonl"
            todo = [batch for batch in range(len(sizes)) if batch not in done]

            def work() -> None:
                finished = 0
                with Journal(path, identity) as journal:
                    for batch in todo[self.processes.rank :: self.processes.world_size]:
                        journal.append([batch, results_of(batch)])
                        finished += sizes[batch]
                        if self.progress is not None:
                            self.progress(finished * self.processes.world_size, sum(sizes))

            self.processes.together(work)
            return self._read(identity) if self.processes.first else {}

    def _read(self, identity: str) -> dict[int, list[Any]]:
        results: dict[int, list[Any]] = {}
        for path in sorted(self.folder.glob("rows-*.jsonl")):
            found_identity, entries = read_journal(path)
            if found_identity == identity:
                results.update(entries)
        return results


def delete(path: Path) -> None:
    """Delete a file, if it exists; failure raises `StorageError`."""
    with storing(path, "check its permissions", action="deleted"):
        path.unlink(missing_ok=True)


def fingerprint(task: Any, model: Any, records: Sequence[Any], batch_size: int) -> str:
    """Digest everything that determines the rows; `model` is an `XFM` or a `Session`."""
    device = model.device.type
    precision = model.dtype
    if torch.is_autocast_enabled(device):
        precision = torch.get_autocast_dtype(device)
    pictures = "official" if task.official_pictures else "upright"
    key = f"{task.options.model_dump_json()} {batch_size} {model.dtype} {precision} {pictures}"
    digest = hashlib.sha256(key.encode())
    if isinstance(model, XFM):
        for name, tensor in model.state_dict().items():
            digest.update(f"{name} {checksum(tensor):08x}".encode())
    else:
        digest.update(model.fingerprint().encode())
    for record in records:
        digest.update(record.model_dump_json().encode())
    return digest.hexdigest()


def checksum(tensor: Tensor, start: int = 0) -> int:
    """Compute the CRC-32 of a tensor's bytes, continuing from `start`."""
    data = tensor.detach().cpu().contiguous().flatten()
    return zlib.crc32(data.view(torch.uint8).numpy().data, start) if data.numel() else start


def read_journal(path: Path) -> tuple[str | None, list[Any]]:
    """Read the identity (None if there is no journal) and the entries up to a damaged one."""
    try:
        file = open_data(path)
    except FileNotFoundError:
        return None, []
    values: list[Any] = []
    # A line without its line feed was not completed.
    with file, suppress(ValueError):
        while (line := file.readline(MOST_JSON_BYTES)).endswith(b"\n"):
            crc, _, text = line[:-1].partition(b" ")
            if int(crc, 16) != zlib.crc32(text):
                break
            values.append(parse_json(text))
    if not values or not isinstance(values[0], str):
        return None, []
    return values[0], values[1:]


class Journal:
    """JSON values, one a line after its CRC-32; the first line is an `identity` of what determines
    them.

    Opening keeps the complete `entries` of the same identity, and drops those of another one.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self.path = path
        with self._storing():
            previous, entries = read_journal(path)
            self.entries = entries if previous == identity else []
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes({path: b"".join(map(_line, [identity, *self.entries]))})
            self._file: BinaryIO = open_to_append(path)

    def append(self, value: Any) -> None:
        """Append a value and flush it."""
        with self._storing():
            self._file.write(_line(value))
            self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._storing(), self._file:
            os.fsync(self._file.fileno())

    def _storing(self) -> AbstractContextManager[None]:
        return storing(self.path, "its complete entries stay: free space and resume")


def _line(value: Any) -> bytes:
    text = json.dumps(value).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)
