"""What one request may hold and use, and what all of them may hold together."""

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

# A small body may cost as much as one of this size.
_SMALL_BODY = 1 << 20
# What images may cost per byte of the body: bytes while one of them is decoded, and pixels of all of them.
_PEAK_PER_BYTE = 56
_PIXELS_PER_BYTE = 16
# Copies of a body while it is parsed: the body, its text, the values; a character beyond ASCII makes the text wider.
COPIES, _WIDE_COPIES = 3, 3
# JSON values per document, and of everything else.
_VALUES_PER_DOCUMENT = 32
_OTHER_VALUES = 4096
# A string of JSON, or what begins or separates values.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|([,\[{])', re.DOTALL)


class Memory:
    """Bytes that all requests hold together, in any thread."""

    def __init__(self, most: int) -> None:
        self.most, self.used = most, 0
        self._lock = threading.Lock()

    def take(self, count: int) -> None:
        """Add bytes; raises `Problem` 429 where they are more than the service has room for."""
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
    """Memory, decoded pixels and time of one request, checked before the work.

    Args:
        memory: of all requests.
        options: of the service.
        task: the request, which `end` cancels.

    Attributes:
        body: of the request, until it is parsed.
        ending: why the request has ended before its answer.
    """

    def __init__(self, memory: Memory, options: ServiceOptions, task: asyncio.Task[Any] | None = None) -> None:
        self.options, self.deadline = options, time.monotonic() + options.timeout
        self.body = b""
        self.ending: Exception | None = None
        self._memory, self._task = memory, task
        self._held, self._bytes, self._pixels, self._holders = 0, 0, 0, 1
        self._lock = threading.Lock()

    def take(self, count: int, copies: int = COPIES) -> None:
        """Hold so many more bytes that came for the request, in so many copies."""
        self._memory.take(copies * count)
        with self._lock:
            self._held += copies * count
            self._bytes += count

    def take_json(self) -> bytes:
        """The body, to be parsed; refused where it holds more values than documents need."""
        body, self.body = self.body, b""
        if not body.isascii():
            self._memory.take(_WIDE_COPIES * len(body))
            self._held += _WIDE_COPIES * len(body)
        most = _VALUES_PER_DOCUMENT * self.options.max_documents + _OTHER_VALUES
        if sum(map(body.count, (b",", b"[", b"{"))) > most:
            # They may stand in texts.
            beyond = islice((token for token in _TOKEN.finditer(body) if token[1]), most, None)
            if next(beyond, None) is not None:
                raise Problem(422, f"the body holds more than {most:,} values; send fewer documents")
        return body

    def take_image(self, name: str, pixels: int, peak: int) -> None:
        """Use an image of so many pixels, whose decoding takes so many bytes."""
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
        """Hold these bytes alone from now on."""
        self._memory.give(self._held - count)
        self._held = count

    def check(self) -> None:
        """Raise where the request has ended."""
        if self.ending is not None:
            raise self.ending
        if time.monotonic() > self.deadline:
            raise Problem.late(self.options.timeout)

    def live(self) -> bool:
        """False once the request has ended."""
        return self.ending is None

    def end(self, reason: Exception) -> None:
        """End the request before its answer; in the thread of its event loop."""
        if self.ending is None and self._task is not None:
            self.ending = reason
            self._task.cancel()

    async def run(self, threads: ThreadPoolExecutor, function: Callable[..., T], *arguments: Any) -> T:
        """Result of a function in another thread; until it returns, what the request holds is not given back."""
        with self._lock:
            self._holders += 1
        job = threads.submit(function, *arguments)
        job.add_done_callback(lambda _: self._release())
        return await asyncio.wrap_future(job)

    def close(self) -> None:
        """Give back what is held, as soon as no thread works on it."""
        self._task, self.body = None, b""
        self._release()

    def _release(self) -> None:
        with self._lock:
            self._holders -= 1
            if not self._holders:
                self._memory.give(self._held)
                self._held = 0
