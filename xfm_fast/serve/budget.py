"""Limits of memory, pixels and time, of one request and of all of them together."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

from xfm_fast.serve.options import ServiceOptions
from xfm_fast.serve.problem import Problem

T = TypeVar("T")

# A smaller body may cost as much as one of this size.
_SMALL_BODY = 1 << 20
# Limits of images per byte of the body: bytes to decode one of them, and pixels of all of them.
_PEAK_PER_BYTE = 56
_PIXELS_PER_BYTE = 16
# Copies of a body while it is parsed: the body, its text, the values; a character beyond ASCII makes the text wider.
COPIES, _WIDE_COPIES = 3, 3
# JSON values per document, and in the rest of the body.
_VALUES_PER_DOCUMENT = 32
_OTHER_VALUES = 4096
# A string of JSON, or what begins or separates values.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|([,\[{])', re.DOTALL)


class Memory:
    """Bytes that all requests hold together; thread-safe."""

    def __init__(self, most: int) -> None:
        self.most, self.used = most, 0
        self._lock = threading.Lock()

    def take(self, count: int) -> None:
        """Add bytes, or raise `Problem` 429 where they exceed the limit."""
        with self._lock:
            if self.used + count > self.most:
                raise Problem(
                    429, f"requests hold {self.used:,} of {self.most:,} bytes; ask again in a second",
                    {"retry-after": "1"},
                )  # fmt: skip
            self.used += count

    def give(self, count: int) -> None:
        """Return bytes."""
        with self._lock:
            self.used -= count


class Budget:
    """Memory, pixels and time of one request, whose `task` `end` cancels; `body` is empty once it is parsed."""

    def __init__(self, memory: Memory, options: ServiceOptions, task: asyncio.Task[Any] | None = None) -> None:
        self.options, self.deadline = options, time.monotonic() + options.timeout
        self.body = b""
        self.ending: Exception | None = None
        self._memory, self._task = memory, task
        self._held, self._bytes, self._pixels, self._holders = 0, 0, 0, 1
        self._lock = threading.Lock()

    def take(self, count: int, copies: int = COPIES) -> None:
        """Charge more bytes that came for the request, in this many copies."""
        self._memory.take(copies * count)
        with self._lock:
            self._held += copies * count
            self._bytes += count

    def take_json(self) -> bytes:
        """The body, or `Problem` 422 where it holds more JSON values than documents need."""
        body, self.body = self.body, b""
        if not body.isascii():
            self._memory.take(_WIDE_COPIES * len(body))
            self._held += _WIDE_COPIES * len(body)
        most = _VALUES_PER_DOCUMENT * self.options.max_documents + _OTHER_VALUES
        if sum(map(body.count, (b",", b"[", b"{"))) > most:
            # Separators inside strings do not count.
            beyond = islice((token for token in _TOKEN.finditer(body) if token[1]), most, None)
            if next(beyond, None) is not None:
                raise Problem(422, f"the body holds more than {most:,} values; send fewer documents")
        return body

    def take_image(self, name: str, pixels: int, peak: int) -> None:
        """Charge an image whose decoding takes `peak` bytes."""
        self.check()
        with self._lock:
            self._pixels += pixels
        size = max(self._bytes, _SMALL_BODY)
        if peak > _PEAK_PER_BYTE * size or self._pixels > _PIXELS_PER_BYTE * size:
            raise Problem(
                413, f"{name} takes {peak:,} bytes to decode, and images so far hold {self._pixels:,} pixels, over "
                f"{_PEAK_PER_BYTE} and {_PIXELS_PER_BYTE} per byte of the request; shrink them",
            )  # fmt: skip

    def keep(self, count: int) -> None:
        """Hold exactly this many bytes from now on."""
        self._memory.give(self._held - count)
        self._held = count

    def check(self) -> None:
        """Raise if the request has ended."""
        if self.ending is not None:
            raise self.ending
        if time.monotonic() > self.deadline:
            raise Problem.late(self.options.timeout)

    def live(self) -> bool:
        """False once the request has ended."""
        return self.ending is None

    def end(self, reason: Exception) -> None:
        """End the request before its response; called in the thread of its event loop."""
        if self.ending is None and self._task is not None:
            self.ending = reason
            self._task.cancel()

    async def run(self, threads: ThreadPoolExecutor, function: Callable[..., T], *arguments: Any) -> T:
        """Result of a function in another thread; the request holds its memory until the function returns."""
        with self._lock:
            self._holders += 1
        job = threads.submit(function, *arguments)
        job.add_done_callback(lambda _: self._release())
        return await asyncio.wrap_future(job)

    def close(self) -> None:
        """Release the memory as soon as no thread works on it."""
        self._task, self.body = None, b""
        self._release()

    def _release(self) -> None:
        with self._lock:
            self._holders -= 1
            if not self._holders:
                self._memory.give(self._held)
                self._held = 0
