"""Endless batches of pretraining: batch n of a rank is a function of (seed, world size, rank, n) and of nothing else.

So a run resumes exactly by remembering one number, and gives the same batches with any number of workers. A global
batch is the same rows for any number of ranks that divides it.

The official reader deals whole files out to ranks and workers and reads their lines in order; its order is not
reproduced here, nor could it be: it depends on the number of workers and on the state of Python's random module.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from itertools import count
from types import FrameType
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from xfm_fast.batches import Batch, ImageBatch, PairBatch, RegionBatch, TextBatch
from xfm_fast.config import XFMConfig
from xfm_fast.data.items import REGIONS, BatchT, ImageField, ImageItems, Items, PairItems, RegionItems, TextItems
from xfm_fast.data.order import item_generator, replacement, shuffled
from xfm_fast.data.quarantine import Quarantine
from xfm_fast.data.records import Data, RecordSet, open_records
from xfm_fast.data.regions import RegionOptions
from xfm_fast.data.texts import CAPTIONS, TEXTS, TextOptions
from xfm_fast.errors import ConfigError, DataError, XFMError
from xfm_fast.tokenizer import CaptionTokenizer

B = TypeVar("B", bound=Batch)
B_co = TypeVar("B_co", bound=Batch, covariant=True)

# Streams with one seed draw different numbers.
_PAIRS, _REGIONS, _IMAGES, _TEXTS = range(4)
_OF_BATCH = 1 << 16


class BatchSource(Protocol[B_co]):
    """Batches by their number."""

    def __len__(self) -> int:
        """Batches in an epoch of this rank."""
        ...

    def batch(self, number: int) -> B_co:
        """Batch `number` >= 0; epochs follow each other."""
        ...


class Stream(Generic[BatchT]):
    """Shuffled batches of the rows of some files.

    An epoch visits every row once, in an order of its own, up to the last whole global batch; fewer rows than a global
    batch make one batch with repeated rows. Where a row is broken, the row at the same place of the next global batch
    takes its place.

    Args:
        records: the rows.
        items: how they become items and batches.
        rows: of a batch of one rank.
        seed: of the order and of all random numbers.
        kind: distinguishes streams with the same seed.
        rank: which part of every global batch.
        world_size: parts of a global batch.
        shuffle: an order of its own for each epoch; else every epoch takes the rows as they come.
        window: see `xfm_fast.data.order.shuffled`.
        quarantine: counts and lists broken rows.
    """

    def __init__(
        self,
        records: RecordSet,
        items: Items[Any, BatchT],
        *,
        rows: int,
        seed: int,
        kind: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        window: int | None = None,
        quarantine: Quarantine | str | os.PathLike[str] | None = None,
    ) -> None:
        if rows < 1 or not 0 <= rank < world_size or seed < 0 or (window is not None and window < 1):
            raise ConfigError(
                f"rows={rows}, rank={rank} of world_size={world_size}, seed={seed}, window={window} describe no "
                "batches; rows and window must be at least 1, seed at least 0 and rank below world_size"
            )
        self.records = records
        self.items = items
        self.quarantine = quarantine if isinstance(quarantine, Quarantine) else Quarantine(quarantine)
        self._rows, self._rank, self._stride = rows, rank, rows * world_size
        self._seed, self._kind = seed, kind
        self._shuffle, self._window = shuffle, window

    def __len__(self) -> int:
        return max(1, len(self.records) // self._stride)

    def batch(self, number: int) -> BatchT:
        """Batch `number` of this rank.

        Raises:
            DataError: more rows of a file are broken than are tolerated.
        """
        epoch, inside = divmod(number, len(self))
        first = inside * self._stride + self._rank * self._rows
        items = [self._item(epoch, first + offset) for offset in range(self._rows)]
        return self.items.collate(items, item_generator(self._seed, self._kind + _OF_BATCH, epoch, first))

    def _item(self, epoch: int, position: int) -> Any:
        of = len(self.records)
        last: DataError | None = None
        for attempt in range(of):
            place = replacement(position % of, attempt, of, self._stride)
            if self._shuffle:
                place = shuffled(place, of, self._seed, epoch, self._window)
            rows, row = self.records.locate(place)
            try:
                return self.items.item(rows.read(row), item_generator(self._seed, self._kind, epoch, position))
            except DataError as error:
                last = error
                self.quarantine.add(rows, row, error)
        raise DataError(f"none of {of} rows can be used; the last was refused because {last}")


def pair_source(
    data: Data,
    *,
    tokenizer: CaptionTokenizer,
    config: XFMConfig,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    image_key: str = "binary",
    caption_key: str = "desc",
    image_root: str | os.PathLike[str] | None = None,
    text: TextOptions = CAPTIONS,
    augment: bool = True,
    shuffle: bool = True,
    window: int | None = None,
    quarantine: Quarantine | str | os.PathLike[str] | None = None,
    stream: int = 0,
) -> Stream[PairBatch]:
    """Image-text pairs.

    Args:
        data: files of line JSON, WebDataset shards (see `find_files`), or a list of records.
        batch_size: pairs of one rank.
        image_key: field of the image: base64, or a list, of which one is drawn.
        caption_key: field of the caption: a string, or a list or mapping, of which one is drawn.
        image_root: folder of the images if `image_key` holds paths.
        augment: random crop, flip and RandAugment; else images are only resized.
        shuffle: an order of its own for each epoch; else every epoch takes the rows as they come.
        window: rows to shuffle among, for disks that seek slowly; None shuffles all (`xfm_fast.data.order.shuffled`).
        quarantine: where broken rows are listed, or a `Quarantine` with another tolerance.
        stream: a number that distinguishes streams of the same kind and seed.

    Raises:
        DataError: files cannot be read, or the vocabulary is not the model's.
    """
    _check_text(tokenizer, config, text)
    items = PairItems(tokenizer, config, ImageField(image_key, image_root), caption_key, text, augment)
    return Stream(
        open_records(data, image_key=image_key, caption_key=caption_key), items,
        rows=batch_size, seed=seed, kind=_kind(_PAIRS, stream), rank=rank, world_size=world_size, shuffle=shuffle,
        window=window, quarantine=quarantine,
    )  # fmt: skip


def region_source(
    data: Data,
    *,
    tokenizer: CaptionTokenizer,
    config: XFMConfig,
    batch_size: int,
    max_images: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    image_key: str = "binary",
    image_root: str | os.PathLike[str] | None = None,
    regions: RegionOptions = REGIONS,
    shuffle: bool = True,
    window: int | None = None,
    quarantine: Quarantine | str | os.PathLike[str] | None = None,
    stream: int = 0,
) -> Stream[RegionBatch]:
    """Texts about regions of images.

    Args:
        batch_size: texts of one rank: a random selection of those of its images, repeated if there are too few.
        max_images: images that are read for a batch of one rank; those without a selected text are left out of it.

    The others are as in `pair_source`.
    """
    _check_text(tokenizer, config, regions.text)
    items = RegionItems(tokenizer, config, batch_size, ImageField(image_key, image_root), regions)
    return Stream(
        open_records(data, image_key=image_key), items,
        rows=max_images, seed=seed, kind=_kind(_REGIONS, stream), rank=rank, world_size=world_size, shuffle=shuffle,
        window=window, quarantine=quarantine,
    )  # fmt: skip


def image_source(
    data: Data,
    *,
    config: XFMConfig,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    image_key: str = "binary",
    image_root: str | os.PathLike[str] | None = None,
    augment: bool = True,
    shuffle: bool = True,
    window: int | None = None,
    quarantine: Quarantine | str | os.PathLike[str] | None = None,
    stream: int = 0,
) -> Stream[ImageBatch]:
    """Images alone; arguments as in `pair_source`."""
    return Stream(
        open_records(data, image_key=image_key), ImageItems(config, ImageField(image_key, image_root), augment),
        rows=batch_size, seed=seed, kind=_kind(_IMAGES, stream), rank=rank, world_size=world_size, shuffle=shuffle,
        window=window, quarantine=quarantine,
    )  # fmt: skip


def text_source(
    data: Data,
    *,
    tokenizer: CaptionTokenizer,
    config: XFMConfig,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    text_key: str = "desc",
    text: TextOptions = TEXTS,
    shuffle: bool = True,
    window: int | None = None,
    quarantine: Quarantine | str | os.PathLike[str] | None = None,
    stream: int = 0,
) -> Stream[TextBatch]:
    """Text alone; arguments as in `pair_source`."""
    _check_text(tokenizer, config, text)
    return Stream(
        open_records(data, caption_key=text_key), TextItems(tokenizer, text_key, text),
        rows=batch_size, seed=seed, kind=_kind(_TEXTS, stream), rank=rank, world_size=world_size, shuffle=shuffle,
        window=window, quarantine=quarantine,
    )  # fmt: skip


def load_batches(source: BatchSource[B], *, start: int = 0, workers: int = 0, pin_memory: bool = False) -> Iterator[B]:
    """Batches `start`, `start + 1`, ... without end, prepared (see `xfm_fast.batches`), the same for any `workers`.

    Close the iterator, or drop it, to stop the workers.

    Args:
        workers: processes that prepare batches ahead, two each; 0 prepares each when it is asked for.
        pin_memory: batches in page-locked memory, where there is a GPU to copy to.

    Raises:
        XFMError: whatever the source raises, from a worker as from this process.
    """
    pin_memory = pin_memory and torch.cuda.is_available()
    if workers == 0:
        for number in count(start):
            batch = source.batch(number).prepare()
            yield batch.pin_memory() if pin_memory else batch
    loader = DataLoader(
        _Numbered(source), sampler=_From(start), batch_size=None, collate_fn=_unchanged, num_workers=workers,
        pin_memory=pin_memory, prefetch_factor=2, worker_init_fn=_begin_worker,
    )  # fmt: skip
    for batch in loader:
        if isinstance(batch, _Failure):
            raise batch.error
        yield batch


class _Failure:
    """An error on its way out of a worker; the loader itself would bury it in a traceback."""

    def __init__(self, error: XFMError) -> None:
        self.error = error


class _Numbered(Dataset[Any]):
    def __init__(self, source: BatchSource[Any]) -> None:
        self._source = source

    def __getitem__(self, number: int) -> Any:
        try:
            return self._source.batch(number).prepare()
        except XFMError as error:
            return _Failure(error)


class _From(Sampler[int]):
    def __init__(self, start: int) -> None:
        self._start = start

    def __iter__(self) -> Iterator[int]:
        return count(self._start)


def _unchanged(batch: Any) -> Any:
    return batch


def _begin_worker(_: int) -> None:
    # One core a worker: the tokenizer would otherwise start threads, and warn of the fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    # Schedulers send a signal to all processes of a run. What it means is for the main one to say, which still needs
    # batches for the step that it is in.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _pass_over_once)


def _pass_over_once(number: int, _: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)


def _kind(kind: int, stream: int) -> int:
    return kind + 4 * stream


def _check_text(tokenizer: CaptionTokenizer, config: XFMConfig, text: TextOptions) -> None:
    tokenizer.check(config)
    if text.max_tokens > config.max_text_length:
        raise ConfigError(
            f"max_tokens={text.max_tokens} is more than the {config.max_text_length} positions of the model; use fewer"
        )
