"""Budgets of requests (memory, pixels, time), and dynamic batching of their work within a budget of tokens."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Generic, TypeVar

from xfm_fast.serve.options import ServiceOptions
from xfm_fast.serve.schema import Problem

T = TypeVar("T")
W = TypeVar("W")
A = TypeVar("A")

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


class Budget:
    """Memory, pixels and time of one request, whose `task` `end` cancels; `body` is empty once it is parsed."""

    def __init__(self, memory: Memory, options: ServiceOptions, task: asyncio.Task[Any] | None = None) -> None:
        self.options, self.deadline = options, time.monotonic() + options.timeout
        self.body = b""
        self.ending: Exception | None = None
        self._memory, self._task = memory, task
        self._held = self._bytes = self._pixels = 0
        self._job: Future[Any] | None = None
        self._lock = threading.Lock()

    def take(self, count: int, copies: int = COPIES) -> None:
        """Charge more bytes that came for the request, in this many copies."""
        with self._lock:
            self.check()
            self._memory.take(copies * count)
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
        with self._lock:
            self.check()
            self._pixels += pixels
        size = max(self._bytes, _SMALL_BODY)
        if peak > _PEAK_PER_BYTE * size or self._pixels > _PIXELS_PER_BYTE * size:
            raise Problem(
                413, f"{name} takes {peak:,} bytes to decode, and images so far hold {self._pixels:,} pixels, over "
                f"{_PEAK_PER_BYTE} and {_PIXELS_PER_BYTE} per byte of the request; shrink them",
            )  # fmt: skip

    def keep(self, count: int) -> None:
        """Hold exactly this many bytes from now on."""
        with self._lock:
            self._memory.take(count - self._held)
            self._held = count

    def check(self) -> None:
        """Raise if the request has ended."""
        if self.ending is not None:
            raise self.ending

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
        self._job = threads.submit(function, *arguments)
        return await asyncio.wrap_future(self._job)

    def close(self) -> None:
        """Release the memory as soon as no thread works on it."""
        self._task, self.body = None, b""
        if self._job is None:
            self._release()
        else:
            self._job.add_done_callback(lambda _: self._release())

    def _release(self) -> None:
        with self._lock:
            # Downloads may go on, and take no more.
            self.ending = self.ending or Problem(503, "the request has ended; ask again")
            self._memory.take(-self._held)
            self._held = 0


@dataclass
class _Piece(Generic[W, A]):
    work: W
    cost: int
    answer: asyncio.Future[A]
    since: float = field(default_factory=time.monotonic)


class Batcher(Generic[W, A]):
    """Runs work in batches of at most `budget` cost, in order and in one thread; a single piece may cost more.

    `run` returns results in order; an exception among them is raised for its piece, and after one that `run` raises
    each piece runs by itself. The first piece of a batch waits `wait` seconds for others while `coming()` counts some.
    """

    def __init__(
        self,
        run: Callable[[Sequence[W]], Sequence[A | Exception]],
        budget: int,
        wait: float = 0.0,
        *,
        coming: Callable[[], int] = lambda: 0,
        seen: Callable[[int, int], None] = lambda pieces, cost: None,
    ) -> None:
        self.run, self.budget, self.wait = run, budget, wait
        self._coming, self._seen = coming, seen
        self._queue: deque[_Piece[W, A]] = deque()
        self._arrived = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")

    def __len__(self) -> int:
        """Length of the queue."""
        return len(self._queue)

    async def submit(self, work: W, cost: int) -> A:
        """Result of a piece of work; cancelling this drops work that has not begun."""
        piece = _Piece[W, A](work, cost, asyncio.get_running_loop().create_future())
        self._queue.append(piece)
        self._arrived.set()
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._run_batches())
        return await piece.answer

    def close(self) -> None:
        """End the thread after the batch that it runs."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run_batches(self) -> None:
        while self._queue:
            latest = self._queue[0].since + self.wait
            while (
                self._coming() > 0
                and sum(each.cost for each in self._queue) < self.budget
                and (left := latest - time.monotonic()) > 0
            ):
                self._arrived.clear()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._arrived.wait(), left)
            batch, cost = list[_Piece[W, A]](), 0
            while self._queue and (not batch or cost + self._queue[0].cost <= self.budget):
                piece = self._queue.popleft()
                if not piece.answer.done():
                    batch.append(piece)
                    cost += piece.cost
            if batch:
                self._seen(len(batch), cost)
                await self._answer(batch)

    async def _answer(self, batch: Sequence[_Piece[W, A]]) -> None:
        works, loop = [piece.work for piece in batch], asyncio.get_running_loop()
        try:
            answers = await loop.run_in_executor(self._thread, self.run, works)
        except Exception as error:  # the service survives any request
            if len(batch) > 1:
                # Only the piece that fails by itself gets the error.
                for piece in batch:
                    await self._answer([piece])
                return
            answers = [error]
        for piece, answer in zip(batch, answers, strict=True):
            if piece.answer.done():
                continue
            if isinstance(answer, Exception):
                piece.answer.set_exception(answer)
            else:
                piece.answer.set_result(answer)
