"""Cache of values computed from parameters, invalidated when a parameter changes.

An entry dies with any of its sources; it is recomputed when one was written to, moved or converted. On a GPU, a caller
on another stream waits for the value; a CUDA graph computes it inside the capture, or else the graph would read freed
memory after a source changes. `graphs_read_cache` skips that for a caller that keeps the cached tensors.

Every copy of a weight is watched by `Sources`. What reads parameters in place needs neither.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import repeat
from operator import attrgetter, call, is_not
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from .backend import readable, transformed

if TYPE_CHECKING:
    from .cpu.llvm.words import Words

T = TypeVar("T")

# Elements up to which a tensor of floats is compared whole; of larger ones, with a last dimension, see `_elements`.
_COMPARED_WHOLE = 1 << 12
_GOLDEN = (5**0.5 - 1) / 2
_FACTS = (
    Tensor.data_ptr,
    Tensor.stride,
    attrgetter("_version"),
    attrgetter("dtype"),
    attrgetter("shape"),
)
# Bytes that compiled code compares at once.
_WORD = 4


class Sources:
    """The tensors that a value was computed from, as they were then: their memory, versions and contents.

    Writes through `.data` and NumPy escape PyTorch's version counter, so on a CPU contents are compared too: integers
    and small tensors entirely, of a large matrix an element of every row and of every column, spread so that every
    block of a few times as many elements as its longer side has one. Only other elements, written past the counter, go
    unseen. On an accelerator a comparison would wait for the device, and versions decide.
    """

    def __init__(
        self, tensors: Sequence[Tensor], dropped: Callable[[Any], None] | None = None
    ) -> None:
        self._storages = [weakref.ref(tensor.untyped_storage(), dropped) for tensor in tensors]
        self._facts = _facts(tensors)
        self._values: list[tuple[int, Tensor]] = []
        by_address: list[Tensor] = []
        for index, tensor in enumerate(tensors):
            if tensor.device.type == "cpu" and _has_words(tensor):
                by_address.append(tensor)
            elif tensor.device.type == "cpu":
                self._values.append((index, _sample(tensor).clone()))
        self._words = _words(by_address) if by_address else None

    def unchanged(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether these are the same tensors, and no write to them was seen."""
        if len(tensors) != len(self._storages):
            return False
        # While a storage lives, no other one has its address.
        alive = all(map(is_not, map(call, self._storages), repeat(None)))
        if not alive or self._facts != _facts(tensors):
            return False
        # Only now is the memory known to be the same, so that it may be read by address.
        if self._words is not None and not self._words.unchanged():
            return False
        return all(torch.equal(_sample(tensors[i]), values) for i, values in self._values)


def _facts(tensors: Sequence[Tensor]) -> list[list[Any]]:
    return [[*map(fact, tensors)] for fact in _FACTS]


def _has_words(tensor: Tensor) -> bool:
    """Return whether compiled code can compare a tensor: floats of at least a word."""
    from .cpu import llvm

    words = tensor.is_floating_point() and tensor.untyped_storage().nbytes() >= _WORD
    return words and llvm.why_not() is None


def _words(tensors: Sequence[Tensor]) -> Words:
    # Its compiler takes long to load.
    from .cpu.llvm.words import Words

    addresses = []
    for tensor in tensors:
        size = tensor.element_size()
        offsets = _offsets(tensor.shape, tensor.stride()) * size
        # Every word of wider elements; for narrower ones, a word that lies within the storage.
        offsets = np.concatenate([offsets + word for word in range(0, size, _WORD)])
        last = tensor.untyped_storage().nbytes() - int(tensor.storage_offset()) * size - _WORD
        addresses.append(np.minimum(offsets, last) + tensor.data_ptr())
    return Words(np.concatenate(addresses))


def _sample(tensor: Tensor) -> Tensor:
    """Return the compared values of a tensor, as bits."""
    flat = tensor.detach().reshape(-1)
    if not flat.is_floating_point():
        return flat
    return flat.index_select(0, torch.from_numpy(_elements(tensor.shape))).view(torch.uint8)


@lru_cache(maxsize=256)
def _elements(shape: torch.Size) -> np.ndarray:
    """Return the flat indices of the compared elements of a tensor of floats."""
    count = math.prod(shape)
    if count <= _COMPARED_WHOLE:
        return np.arange(count)
    columns = shape[-1]
    rows = count // columns
    longer = np.arange(max(rows, columns))
    if rows >= columns:
        return longer * columns + longer * _spread(columns) % columns
    return longer * _spread(rows) % rows * columns + longer


def _spread(count: int) -> int:
    """Return a step of about the golden section, coprime to `count`."""
    step = max(1, round(count * _GOLDEN))
    while math.gcd(step, count) > 1:
        step += 1
    return step


@lru_cache(maxsize=256)
def _offsets(shape: torch.Size, strides: tuple[int, ...]) -> np.ndarray:
    """Return the memory offsets of the compared elements, in elements from the first."""
    flat = _elements(shape)
    offsets = np.zeros(len(flat), np.int64)
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        flat, index = np.divmod(flat, size)
        offsets += index * stride
    return offsets


class _Entry(NamedTuple):
    sources: Sources
    facts: tuple[Any, ...]
    value: Any
    filled: _Filled | None


# By id of the first source's storage, then by name and position within it.
_Entries = dict[int, tuple[weakref.ref[Any], dict[Any, _Entry]]]
_entries: _Entries = {}


def cached(name: str, sources: tuple[Tensor, ...], compute: Callable[[], T], *facts: Any) -> T:
    """Return `compute()`, cached under `name` until a source, or another of the `facts` it depends on, changes."""
    if (
        torch.compiler.is_compiling()
        or _mode.uncached
        or transformed()
        or not readable(*sources)
        # These carry no version, so a change could not be seen.
        or any(s.is_inference() or _captured(s) for s in sources)
    ):
        return compute()
    first = sources[0]
    key, entries = (name, first.storage_offset(), first.shape), _entries_of(first.untyped_storage())
    entry = entries.get(key)
    if entry is None or entry.facts != facts or not entry.sources.unchanged(sources):
        # The first caller may be in inference mode; the value must serve training too.
        with torch.inference_mode(False), torch.no_grad():
            # Before the value: after a write in between, the value is recomputed.
            before = Sources(sources, partial(_drop, entries, key))
            value = compute()
        filled = _Filled(first.device) if first.is_cuda else None
        entry = entries[key] = _Entry(before, facts, value, filled)
    if entry.filled is not None and not _capturing(first):
        entry.filled.wait(entry.value)
    return entry.value


class _Filled:
    """The stream that computed a value, and the event that it recorded afterwards."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.current_stream(device)
        self.event = self.stream.record_event()

    def wait(self, value: Any) -> None:
        """Let the current stream wait for the value, and keep its memory until the stream has read it."""
        current = torch.cuda.current_stream(self.device)
        if current != self.stream:
            current.wait_event(self.event)
            for tensor in value if isinstance(value, tuple | list) else (value,):
                if isinstance(tensor, Tensor):
                    tensor.record_stream(current)


class _Mode(threading.local):
    graphs_read_cache: bool = False
    uncached: bool = False


_mode = _Mode()


@contextmanager
def uncached() -> Iterator[None]:
    """Disable the cache within the block, for models that run once: packed weights double the memory of a model."""
    outside, _mode.uncached = _mode.uncached, True
    try:
        yield
    finally:
        _mode.uncached = outside


@contextmanager
def graphs_read_cache() -> Iterator[None]:
    """Let graphs captured in the block read cached tensors instead of recomputing them at every replay.

    The caller keeps `cached_tensors` as long as the graph, and captures it again after a source has changed.
    """
    outside, _mode.graphs_read_cache = _mode.graphs_read_cache, True
    try:
        yield
    finally:
        _mode.graphs_read_cache = outside


def _captured(source: Tensor) -> bool:
    """Return whether a value must be computed in the graph that is being captured."""
    return not _mode.graphs_read_cache and _capturing(source)


def _capturing(source: Tensor) -> bool:
    return source.is_cuda and torch.cuda.is_current_stream_capturing()


def _entries_of(storage: Any) -> dict[Any, _Entry]:
    key = id(storage)
    entries = _entries.get(key)
    if entries is None or entries[0]() is not storage:
        entries = _entries[key] = (weakref.ref(storage, partial(_forget, _entries, key)), {})
    return entries[1]


def _forget(entries: _Entries, key: int, dead: Any) -> None:
    # The entries are an argument: storages that outlive this module find its globals cleared when the interpreter ends.
    # Another storage may have taken the id of the dead one meanwhile.
    if key in entries and entries[key][0] is dead:
        del entries[key]


def _drop(entries: dict[Any, _Entry], key: Any, dead: Any) -> None:
    if key in entries and any(dead is storage for storage in entries[key].sources._storages):
        del entries[key]


def forget(source: Tensor) -> None:
    """Forget all values whose first source is this tensor."""
    if not source.is_mkldnn:
        _entries.pop(id(source.untyped_storage()), None)


def clear() -> None:
    """Forget all values, for example to free memory before training."""
    _entries.clear()


def cached_tensors(sources: Iterable[Tensor]) -> list[Any]:
    """Return the cached tensors of these sources; a CUDA graph that reads them stores this list, in case of `clear`."""
    values = []
    for key in {id(source.untyped_storage()) for source in sources}:
        if key in _entries:
            values += [entry.value for entry in _entries[key][1].values()]
    return values
