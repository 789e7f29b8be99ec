"""Cache of tensors computed from parameters, invalidated when a parameter changes.

An entry belongs to its first source and dies with it; it is recomputed when any source was written to, moved or
converted. On a GPU, a caller on another stream waits for the value; a CUDA graph computes it inside the capture, or
else the graph would read freed memory after a source changes. `graphs_read_cache` skips that for a caller that keeps
the cached tensors.

Writes through `.data` escape PyTorch's version counter. On CPU, the values of the first source are therefore compared
as well: all of a small one, some of a large one, which every optimizer step or moving average changes.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from .backend import transformed

T = TypeVar("T")

_COMPARED_WHOLE = 1 << 15
_SAMPLES = 16

# By identity: hashing a tensor through a weak dictionary takes longer than the products of a small model.
_Entry = tuple[Any, Tensor, Any, "_Filled | None"]
_Entries = dict[int, tuple[weakref.ref[Tensor], dict[str, _Entry]]]
_entries: _Entries = {}


def cached(name: str, sources: tuple[Tensor, ...], compute: Callable[[], T]) -> T:
    """`compute()`, cached_tensors under `name` as long as `sources` keep their storage, version and values."""
    if (
        torch.compiler.is_compiling()
        or _mode.uncached
        or transformed()
        or any(s.is_inference() or isinstance(s, torch._subclasses.FakeTensor) or _captured(s) for s in sources)
    ):
        # Inference tensors carry no version, so a change could not be seen; traced values must stay in the graph.
        return compute()
    stamp = tuple((s.data_ptr(), s._version, s.dtype, s.shape) for s in sources)
    kept = _entries_of(sources[0])
    values = samples(sources[0])
    entry = kept.get(name)
    if entry is None or entry[0] != stamp or (values.numel() and not torch.equal(entry[1], values)):
        # The first caller may be in inference mode; what is kept must serve training too.
        with torch.inference_mode(False), torch.no_grad():
            found = compute()
            entry = kept[name] = (stamp, values.clone(), found, _Filled(sources[0].device) if values.is_cuda else None)
    if entry[3] is not None and not _capturing(sources[0]):
        entry[3].wait(entry[2])
    return entry[2]


class _Filled:
    """The stream that computed a value, and the moment when it was there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.current_stream(device)
        self.event = self.stream.record_event()

    def wait(self, value: Any) -> None:
        """Let the current stream read the value after it was filled, and keep its memory until that is done."""
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
    """Disable the cache within the block, for models that run once: packed weights double the memory of the model's."""
    outside, _mode.uncached = _mode.uncached, True
    try:
        yield
    finally:
        _mode.uncached = outside


@contextmanager
def graphs_read_cache() -> Iterator[None]:
    """Within the block, captured graphs read cached tensors instead of recomputing them at every replay.

    The caller keeps `cached_tensors` as long as the graph, and captures it again after a source has changed.
    """
    outside, _mode.graphs_read_cache = _mode.graphs_read_cache, True
    try:
        yield
    finally:
        _mode.graphs_read_cache = outside


def _captured(source: Tensor) -> bool:
    """True if a value is to be a part of the graph that is being captured."""
    return not _mode.graphs_read_cache and _capturing(source)


def _capturing(source: Tensor) -> bool:
    return source.is_cuda and torch.cuda.is_current_stream_capturing()


def _entries_of(owner: Tensor) -> dict[str, _Entry]:
    key = id(owner)
    found = _entries.get(key)
    if found is None or found[0]() is not owner:
        found = _entries[key] = (weakref.ref(owner, partial(_forget, _entries, key)), {})
    return found[1]


def _forget(entries: _Entries, key: int, dead: weakref.ref[Tensor]) -> None:
    # The entries are an argument: tensors that outlive this module find its globals cleared when the interpreter ends.
    # Another tensor may have taken the identity of the dead one meanwhile.
    if key in entries and entries[key][0] is dead:
        del entries[key]


def samples(source: Tensor) -> Tensor:
    """The values of a tensor that are compared: a view, empty on accelerators, where that would wait for the device."""
    flat = source.detach().view(-1) if source.is_contiguous() else source.detach().reshape(-1)
    if source.device.type != "cpu":
        return flat[:0]
    return flat if flat.numel() <= _COMPARED_WHOLE else flat[:: flat.numel() // _SAMPLES]


def forget(source: Tensor) -> None:
    """Forget everything that was computed from a tensor as its first source."""
    _entries.pop(id(source), None)


def clear() -> None:
    """Forget everything, for example to free memory before training."""
    _entries.clear()


def cached_tensors(sources: Iterable[Tensor]) -> list[Any]:
    """All cached tensors of these sources; a CUDA graph that reads them stores this list, in case of `clear`."""
    found = [_entries[id(source)] for source in sources if id(source) in _entries]
    return [entry[2] for _, kept in found for entry in kept.values()]
