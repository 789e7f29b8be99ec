"""Infinite pretraining batches: batch n is a pure function of (seed, world size, rank, n).

A run resumes exactly from one number and reads the same batches with any number of workers. A
global batch has the same rows for any rank count that divides it. The order of the official reader
is not reproduced: it depends on the number of workers and on global random state. Broken rows are
replaced, logged and limited by a `Quarantine`.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.random import Generator, Philox, SeedSequence
from torch.utils.data import DataLoader, Dataset

from xfm_fast.batches import TensorBatch
from xfm_fast.config import XFMConfig
from xfm_fast.data.fingerprints import held_out
from xfm_fast.data.images import image_source, image_values, images_observed, read_image
from xfm_fast.data.items import ITEMS, BatchT, ItemMaker, Items
from xfm_fast.data.options import AnyStreamOptions, ImageOptions, RegionOptions, TextOptions
from xfm_fast.data.records import Data, RecordSet, Rows, open_records
from xfm_fast.errors import ConfigError, DataError, StorageError, XFMError
from xfm_fast.io import open_data, open_to_append, parse_json
from xfm_fast.tokenizer import CaptionTokenizer

B = TypeVar("B", bound=TensorBatch)

# Added to the stream of an item's generator, so that collation draws other random numbers.
_COLLATION = 1 << 16
# Sent by schedulers and closing terminals to all processes of a run.
_SIGNALS = [
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)
]
_mask = getattr(signal, "pthread_sigmask", None)


class BatchSource(Protocol[BatchT]):
    """Random access to batches."""

    def __len__(self) -> int:
        """Return the batches per epoch on this rank."""
        ...

    def batch(self, index: int) -> BatchT:
        """Make batch `index` >= 0, counted across epochs."""
        ...


def epoch_batches(rows: int, batch: int, *, drop_last: bool) -> int:
    """Return the batches per epoch, at least one."""
    return max(1, rows // batch if drop_last else -(-rows // batch))


class ShuffledBatches(Generic[BatchT]):
    """Shuffled batches of a record sequence, `rows` per rank.

    An epoch visits every row once, up to the last full global batch; fewer rows than a global batch
    are repeated to fill one. Without `drop_last` the remainder is filled with the first rows of the
    epoch, as in torch's DistributedSampler. A broken row is replaced by the row at the same place
    of the next global batch and added to `quarantine`. Sources with equal seeds and different
    `stream` draw different random numbers. `observer` receives the encoded bytes of every image.
    """

    def __init__(
        self,
        records: RecordSet,
        items: ItemMaker[BatchT],
        *,
        rows: int,
        seed: int,
        stream: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        window: int | None = None,
        drop_last: bool = True,
        quarantine: Quarantine,
        observer: Callable[[bytes], None] | None = None,
    ) -> None:
        if rows < 1 or not 0 <= rank < world_size or seed < 0:
            raise ConfigError(
                f"rows={rows}, rank={rank} of world_size={world_size}, seed={seed} describe no batches; rows must be "
                "at least 1, seed at least 0 and rank below world_size"
            )
        self.records, self.items = records, items
        self.quarantine, self.observer = quarantine, observer
        self._rows, self._rank, self._world_size = rows, rank, world_size
        self._stride = rows * world_size
        self._seed, self._stream = seed, stream
        self._shuffle, self._window, self._drop_last = shuffle, window, drop_last

    def __len__(self) -> int:
        return epoch_batches(len(self.records), self._stride, drop_last=self._drop_last)

    def batch(self, index: int) -> BatchT:
        """Make batch `index` of this rank; too many broken rows in a file raise `DataError`."""
        epoch, index = divmod(index, len(self))
        start, rows = index * self._stride, self._rows
        if not self._drop_last:
            # The last batch deals the remaining rows evenly.
            rows = min(rows, -(-(len(self.records) - start) // self._world_size))
        first = start + self._rank * rows
        items = [self._item(epoch, position) for position in range(first, first + rows)]
        rng = item_generator(self._seed, self._stream + _COLLATION, epoch, first)
        return self.items.collate(items, rng)

    def _item(self, epoch: int, position: int) -> Any:
        """Make the item at a position of an epoch, of the first usable row (see `replacement`)."""
        total = len(self.records)
        last_error: DataError | None = None
        for attempt in range(total):
            index = replacement(position % total, attempt, total, self._stride)
            if self._shuffle:
                index = shuffled(index, total, self._seed, epoch, self._window)
            rows, row = self.records.locate(index)
            rng = item_generator(self._seed, self._stream, epoch, position)
            try:
                with images_observed(self.observer):
                    return self.items.item(rows.read(row), rng)
            except DataError as error:
                last_error = error
                self.quarantine.add(rows, row, error)
        raise DataError(
            f"none of {total} rows can be used; the last was refused because {last_error}"
        )


class Stream(ShuffledBatches[BatchT]):
    """Shuffled pretraining batches; `index` separates streams of the same kind and seed.

    `batch_size` counts pairs, images or texts per rank. Region texts are a random subset of the
    texts of `max_images` images, repeated if there are too few.
    """

    def __init__(
        self,
        data: Data,
        options: AnyStreamOptions,
        *,
        config: XFMConfig,
        tokenizer: CaptionTokenizer | None = None,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        index: int = 0,
        quarantine: Quarantine | str | os.PathLike[str] | None = None,
        observer: Callable[[bytes], None] | None = None,
    ) -> None:
        if isinstance(options, TextOptions):
            if tokenizer is None:
                raise ConfigError(
                    f"a stream of {options.kind} needs a tokenizer; give that of the model"
                )
            tokenizer.check(config)
            if options.max_tokens > config.max_text_length:
                raise ConfigError(
                    f"max_tokens={options.max_tokens} is more than the {config.max_text_length} positions of the "
                    "model; use fewer"
                )
        items: Items[Any, BatchT] = ITEMS[options.kind](options, config, tokenizer, batch_size)
        if not isinstance(quarantine, Quarantine):
            quarantine = Quarantine(quarantine, tolerate_bad=options.bad_share)
        records = open_records(data, **options.record_keys)
        if options.hold_out:
            records = _without_held_out(records, options)
        super().__init__(
            records,
            items,
            rows=options.max_images if isinstance(options, RegionOptions) else batch_size,
            seed=seed,
            rank=rank,
            stream=list(ITEMS).index(options.kind) + len(ITEMS) * index,
            world_size=world_size,
            shuffle=options.shuffle,
            window=options.window,
            quarantine=quarantine,
            observer=observer,
        )


def _without_held_out(records: RecordSet, options: AnyStreamOptions) -> RecordSet:
    """Select the rows with none of the images that `hold_out` leaves out."""

    def contents(index: int) -> Iterator[bytes]:
        rows, row = records.locate(index)
        if isinstance(options, ImageOptions):
            for value in image_values(rows.read(row), options):
                yield read_image(image_source(value, options))[1]

    mask = held_out(len(records), contents, options.hold_out)
    return RecordSet(records.files, np.flatnonzero(~mask))


def load_batches(
    source: BatchSource[B], *, start: int = 0, workers: int = 0, pin_memory: bool = False
) -> Iterator[B]:
    """Yield batches `start`, `start + 1`, ... (see `xfm_fast.batches`), identical for any number of
    `workers`.

    Each worker process prepares two batches ahead. Closing the iterator stops the workers.
    """
    pin_memory = pin_memory and torch.cuda.is_available()
    if workers == 0:
        for index in count(start):
            batch = source.batch(index).prepare()
            yield batch.pin_memory() if pin_memory else batch
    loader = DataLoader(
        _BatchDataset(source),
        batch_size=None,
        sampler=range(start, sys.maxsize),
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_begin_worker,
        prefetch_factor=2,
    )
    # Block signals until a worker has installed its handlers: workers inherit the mask. Windows has
    # none.
    before = _mask(signal.SIG_BLOCK, _SIGNALS) if _mask is not None else ()
    try:
        batches = iter(loader)
    finally:
        if _mask is not None:
            _mask(signal.SIG_SETMASK, before)
    for batch in batches:
        if isinstance(batch, XFMError):
            raise batch
        yield batch


class _BatchDataset(Dataset[Any]):
    def __init__(self, source: BatchSource[Any]) -> None:
        self._source = source

    def __getitem__(self, index: int) -> Any:
        try:
            return self._source.batch(index).prepare()
        except XFMError as error:
            # Raised in a worker, it would be buried in the loader's traceback.
            return error


def _begin_worker(_: int) -> None:
    # One core per worker: the tokenizer would otherwise start threads, and warn of the fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    # The main process handles signals, and still needs batches for its current step: a worker
    # ignores the first signal, and dies of the second. Signals that are ignored already, as by
    # `nohup`, stay so.
    for code in _SIGNALS:
        if signal.getsignal(code) != signal.SIG_IGN:
            signal.signal(code, lambda code, _: signal.signal(code, signal.SIG_DFL))
    if _mask is not None:
        _mask(signal.SIG_UNBLOCK, _SIGNALS)


# With fewer rounds some orders of five elements are twice as likely as others.
_ROUNDS = 6
# Runs of consecutive rows in each window.
_RUNS = 32
_WORD = 0xFFFFFFFFFFFFFFFF


def permuted(position: int, count: int, *key: int) -> int:
    """Return the position after a keyed random permutation of `count` elements.

    The generalised Feistel cipher of Black and Rogaway (2002), with cycle walking for results
    beyond `count`. It uses no memory and gives random access, so resuming is exact.
    """
    width = math.isqrt(count - 1) + 1
    height = -(-count // width)
    words = _round_keys(key)
    while True:
        left, right = divmod(position, width)
        for even, odd in words:
            left = (left + _splitmix64(even, right)) % height
            right = (right + _splitmix64(odd, left)) % width
        position = left * width + right
        if position < count:
            return position


def shuffled(position: int, count: int, seed: int, epoch: int, window: int | None = None) -> int:
    """Return the row at a position of an epoch that visits each of `count` rows once.

    `window=None` shuffles all rows. A window limits seeks on slow disks: runs of `window` / 32
    consecutive rows come in random order, and rows are shuffled within windows.
    """
    if window is None or window >= count:
        return permuted(position, count, seed, epoch)
    block, offset = divmod(position, window)
    start = block * window
    position = start + permuted(offset, min(window, count - start), seed, epoch, block)
    length = max(1, window // _RUNS)
    runs = count // length
    # The rows of the last, incomplete run stay last.
    if position >= runs * length:
        return position
    run, offset = divmod(position, length)
    return permuted(run, runs, seed, epoch, -1) * length + offset


def replacement(position: int, attempt: int, count: int, stride: int) -> int:
    """Return the position of the row that replaces a broken one (`attempt` 0 is the row itself).

    Replacements come from the same place of the following batches (`stride` positions apart), so
    that no batch repeats a row, and `count` attempts try every position once.
    """
    cycle = count // math.gcd(count, stride)
    return (position + attempt * stride + attempt // cycle) % count


def item_generator(seed: int, stream: int, epoch: int, position: int) -> Generator:
    """Make the random generator of one item, independent of workers and restarts."""
    key = SeedSequence([seed, stream, epoch, position])
    return Generator(Philox(key))


@lru_cache(maxsize=1024)
def _round_keys(key: tuple[int, ...]) -> list[tuple[int, int]]:
    words = [_splitmix64(*key, index) for index in range(2 * _ROUNDS)]
    return list(zip(words[::2], words[1::2], strict=True))


def _splitmix64(*words: int) -> int:
    """Hash a sequence of integers by SplitMix64's finaliser (Steele et al., 2014)."""
    value = 0x9E3779B97F4A7C15
    for word in words:
        value = (value ^ word & _WORD) * 0xBF58476D1CE4E5B9 & _WORD
        value = (value ^ value >> 27) * 0x94D049BB133111EB & _WORD
        value ^= value >> 31
    return value


# Bytes of a broken row and characters of the reason in an entry.
_EXCERPT, _REASON = 120, 400


class Quarantine:
    """Logs broken rows, and stops a run if a file has too many.

    Each row is logged once across workers, ranks, epochs and restarts: writers lock the file and
    first read new entries. A changed file starts at zero. `path=None` uses a temporary file shared
    by the workers of one loader. `tolerate_bad` is the maximum share of broken rows per file, but
    one broken row never stops a run. `setting` names the option in errors.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        tolerate_bad: float = 0.01,
        setting: str = "tolerate_bad",
    ) -> None:
        if not 0 <= tolerate_bad <= 1:
            raise DataError(f"tolerate_bad={tolerate_bad} is not a share of rows; use 0 to 1")
        self.tolerate_bad, self._setting = tolerate_bad, setting
        self._temporary = path is None
        if path is None:
            handle, path = tempfile.mkstemp(prefix="xfm-fast-quarantine-", suffix=".jsonl")
            os.close(handle)
            weakref.finalize(self, _remove, path, os.getpid())
        self.path = Path(path)
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: self.__dict__[name] for name in ("tolerate_bad", "path", "_setting", "_temporary")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def add(self, rows: Rows, row: int, error: Exception) -> None:
        """Log a broken row unless it is listed; too many of them raise `DataError`."""
        key = (rows.name, rows.label(row), rows.modified)
        if key in self._listed:
            return
        raw = b""
        with suppress(DataError):
            raw = rows.raw(row)
        excerpt = raw[:_EXCERPT].decode("utf-8", "replace")
        if len(raw) > _EXCERPT:
            excerpt += "..."
        entry = {
            "file": rows.name,
            "row": rows.label(row),
            "reason": str(error)[:_REASON],
            "excerpt": excerpt,
            "modified": rows.modified,
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open_to_append(self.path) as file:
                handle = file.fileno()
                with suppress(ImportError, OSError):
                    import fcntl

                    fcntl.flock(handle, fcntl.LOCK_EX)
                self._catch_up(handle)
                if key not in self._listed:
                    # A writer that was killed may have left half a line.
                    line = (b"\n" if self._tail else b"") + json.dumps(entry).encode() + b"\n"
                    if os.write(handle, line) != len(line):
                        raise OSError(28, "No space left on device")
                    self._catch_up(handle)
        except OSError as problem:
            raise StorageError(
                f"broken rows cannot be listed in {self.path} ({problem.strerror or problem}); choose another "
                "quarantine file"
            ) from problem
        bad, total = self.count(rows), len(rows)
        if bad > max(1, self.tolerate_bad * total):
            listed = "" if self._temporary else f"They are listed in {self.path}. "
            raise DataError(
                f"{rows.name}: {bad} of {total} rows are broken, more than the {self.tolerate_bad:.2%} that are "
                f"tolerated; the last: {error}. {listed}Mend the file (xfm-fast data check lists what is wrong) or "
                f"raise {self._setting}"
            )

    def count(self, rows: Rows) -> int:
        """Count the broken rows of a file that any process has listed."""
        with suppress(OSError), open_data(self.path) as file:
            self._catch_up(file.fileno())
        return self._counts[rows.name, rows.modified]

    def _forget(self) -> None:
        self._listed: set[tuple[str, int | str, int]] = set()
        self._counts: Counter[tuple[str, int]] = Counter()
        self._read = 0
        self._tail = b""

    def _catch_up(self, handle: int) -> None:
        """Read entries appended since the last read."""
        if os.fstat(handle).st_size < self._read:
            self._forget()
        while chunk := os.pread(handle, 1 << 20, self._read):
            self._read += len(chunk)
            *lines, self._tail = (self._tail + chunk).split(b"\n")
            for line in lines:
                with suppress(ValueError, KeyError, TypeError):
                    entry = parse_json(line)
                    key = (entry["file"], entry["row"], entry["modified"])
                    if key not in self._listed:
                        self._listed.add(key)
                        self._counts[key[0], key[2]] += 1


def _remove(path: str, process: int) -> None:
    # A forked worker inherits the finaliser, but not the file.
    if os.getpid() == process:
        with suppress(OSError):
            os.unlink(path)
