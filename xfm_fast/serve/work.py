"""One ledger of the bytes that requests hold, and dynamic batching of their work within a budget of tokens."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from xfm_fast.serve.options import ServiceOptions
from xfm_fast.serve.schema import Problem

T = TypeVar("T")

MAX_PIXELS = 1 << 24
"""Pixels of an image."""
# A smaller request may cost as much as one of this size.
_SMALL_REQUEST = 1 << 20
# Limits of images per byte of the request: bytes to decode one of them, and pixels of all of them.
_PEAK_PER_BYTE = 56
_PIXELS_PER_BYTE = 16
# Copies of a body while it arrives; then its bytes, its text, its values, and the files of its images.
_ARRIVING_COPIES, _COPIES = 2, 4
# What a value of JSON takes at most, by the characters that begin values or come before them: a dict of one key has 184
# bytes, a key 64 and as many in the parser's table of keys. Within strings they count, too.
_VALUE_MARKS, _VALUE_BYTES = (b",", b":", b"[", b"{"), 256
_MOST_VALUES = 1 << 18
# UTF-8 and escapes of characters beyond the basic plane, which make all others of their string take 4 bytes.
_ASTRAL = (b"\xf0", b"\xf1", b"\xf2", b"\xf3", b"\xf4", b"\\ud", b"\\uD")
_SOON = {"retry-after": "1"}
# Seconds for which a body may stop on its way before it may have to give way.
_GRACE = 1.0


class Ledger:
    """Bytes that all requests hold together, and the accounts of bodies that still arrive, the oldest first."""

    def __init__(self, most: int) -> None:
        self.most, self.used = most, 0
        self.arriving: dict[Account, None] = {}
        self.lock = threading.RLock()


class Account:
    """What one request has received, holds and may still take; its bytes count until `close` and all leases end."""

    def __init__(self, ledger: Ledger, options: ServiceOptions) -> None:
        self.options = options
        # Of a body that still arrives.
        self.body = bytearray()
        # The work of the request is in the queue of the batcher, or done.
        self.submitted = False
        self.ended = False
        self._ledger = ledger
        # Arguments of the `Problem` that `check` raises.
        self._refusal = 503, "the request has ended; ask again", dict[str, str]()
        self.received = self._held = self._pixels = 0
        self._expire: Callable[[], object] = lambda: None
        self._due = math.inf
        self._leases = 1

    async def read(self, pieces: AsyncIterator[bytes], expire: Callable[[], object]) -> bytes:
        """Return the body, charged with what it becomes when it is parsed; raises `Problem` 400, 413, 422 and 429.

        Where others lack memory, a body that arrives too slowly gives way: its bytes are dropped and `expire` is
        called, after which `check` has the reason.
        """
        self._expire, self._due = expire, time.monotonic() + _GRACE
        # At this pace, the largest body arrives just in time.
        pace = self.options.max_body_bytes / self.options.timeout
        self._ledger.arriving[self] = None
        try:
            async for piece in pieces:
                self.receive(len(piece), _ARRIVING_COPIES)
                self.body += piece
                self._due = min(self._due + len(piece) / pace, time.monotonic() + _GRACE)
        finally:
            self._ledger.arriving.pop(self, None)
        if b"\0" in self.body:
            # The parser would take UTF-16 and UTF-32, too, whose size as text is another.
            raise Problem(400, "the body is not JSON in UTF-8: it holds a NUL byte")
        values = sum(map(self.body.count, _VALUE_MARKS))
        if values > _MOST_VALUES:
            raise Problem(422, f"the body holds more than {_MOST_VALUES:,} values; send fewer")
        narrow = self.body.isascii() and b"\\u" not in self.body
        width = 1 if narrow else 4 if any(mark in self.body for mark in _ASTRAL) else 2
        copies = _COPIES - _ARRIVING_COPIES + 2 * (width - 1)
        self.hold(copies * len(self.body) + values * _VALUE_BYTES)
        body = bytes(self.body)
        self.body.clear()
        return body

    def receive(self, count: int, copies: int) -> None:
        """Hold bytes of the body or of a download, in this many copies; raises `Problem` 413 and 429."""
        self.received += count
        most = self.options.max_body_bytes
        if self.received > most:
            raise Problem(
                413, f"the request has more than {most:,} bytes; shrink the images, or send fewer"
            )
        self.hold(copies * count)

    def hold(self, count: int) -> None:
        """Hold bytes; raises `Problem` 429 where there is no room for them, and once the request has ended."""
        ledger = self._ledger
        with ledger.lock:
            self.check()
            now = time.monotonic()
            slow = (each for each in [*ledger.arriving] if each is not self and each._due < now)
            while ledger.used + count > ledger.most and (other := next(slow, None)) is not None:
                other._give_way()
            if ledger.used + count > ledger.most:
                message = (
                    f"requests hold {ledger.used:,} of {ledger.most:,} bytes; ask again in a second"
                )
                raise Problem(429, message, _SOON)
            ledger.used += count
            self._held += count

    def _give_way(self) -> None:
        message = "the body arrives slowly, and others need the memory that it holds; ask again in a second"
        self._refusal, self.ended = (429, message, _SOON), True
        self.body.clear()
        self._ledger.arriving.pop(self)
        self._release()
        self._expire()

    def take_image(self, name: str, pixels: int, peak: int) -> None:
        """Count an image that takes `peak` bytes to decode; raises `Problem` 413 where it is too large."""
        if pixels > MAX_PIXELS:
            raise Problem(
                413, f"{name} has {pixels:,} pixels, over the limit of {MAX_PIXELS:,}; shrink it"
            )
        self._pixels += pixels
        size = max(self.received, _SMALL_REQUEST)
        if peak > _PEAK_PER_BYTE * size or self._pixels > _PIXELS_PER_BYTE * size:
            raise Problem(
                413, f"{name} takes {peak:,} bytes to decode, and images so far hold {self._pixels:,} pixels, over "
                f"{_PEAK_PER_BYTE} and {_PIXELS_PER_BYTE} per byte of the request; shrink them",
            )  # fmt: skip

    def check(self) -> None:
        """Raise `Problem` once the request has ended."""
        if self.ended:
            raise Problem(*self._refusal)

    def lease(self) -> Callable[..., None]:
        """Hold what the request holds until the function that is returned is called, once, from any thread."""
        with self._ledger.lock:
            self._leases += 1
        return self._give_back

    def _give_back(self, *_: object) -> None:
        with self._ledger.lock:
            self._leases -= 1
            if self._leases == 0:
                self._release()

    def _release(self) -> None:
        self._ledger.used -= self._held
        self._held = 0

    async def run(
        self, threads: ThreadPoolExecutor, function: Callable[..., T], *arguments: Any
    ) -> T:
        """Run a function in another thread; the memory is held until it returns, also where nobody waits."""
        job = threads.submit(function, *arguments)
        job.add_done_callback(self.lease())
        result = asyncio.wrap_future(job)
        # Nobody may be left to ask for its exception.
        result.add_done_callback(lambda each: each.cancelled() or each.exception())
        # Unlike `await`, this does not cancel the job, which would keep its arguments in the queue of the threads.
        await asyncio.wait([result])
        return result.result()

    def close(self) -> None:
        """End the request: it takes no more."""
        self.ended = True
        self._give_back()


@dataclass(eq=False)
class _Piece:
    work: Any
    cost: int
    release: Callable[[], object]
    answer: asyncio.Future[Any]
    since: float


class Batcher:
    """Runs work in batches of at most `budget` cost, in order and in one thread; a single piece may cost more.

    `run` returns results in order; an exception among them is raised for its piece, and after one that `run` raises
    each piece runs by itself. The first piece of a batch waits `wait` seconds for others while `coming()` counts some;
    `observe` gets the pieces and the cost of a batch.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Any]], Sequence[Any]],
        budget: int,
        wait: float = 0.005,
        *,
        coming: Callable[[], int] = lambda: 0,
        observe: Callable[[int, int], None] = lambda pieces, cost: None,
    ) -> None:
        self.run, self.budget, self.wait = run, budget, wait
        self._coming, self._observe = coming, observe
        self._queue: deque[_Piece] = deque()
        self._arrived = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")

    def __len__(self) -> int:
        """Length of the queue."""
        return len(self._queue)

    async def submit(
        self, work: Any, cost: int, release: Callable[[], object] = lambda: None
    ) -> Any:
        """Result of a piece of work; cancelling this drops work that has not begun.

        `release` is called once, when nothing here refers to the work any more: after its batch, or when it is dropped.
        """
        piece = _Piece(
            work, cost, release, asyncio.get_running_loop().create_future(), time.monotonic()
        )
        self._queue.append(piece)
        self._arrived.set()
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._run_batches())
        try:
            return await piece.answer
        finally:
            if piece in self._queue:
                self._queue.remove(piece)
                release()

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
            # In a frame of its own, which ends with all references to the work.
            for release in await self._run_batch():
                release()

    async def _run_batch(self) -> list[Callable[[], object]]:
        """Run the first pieces of the queue; returns the functions that release them."""
        batch, cost = list[_Piece](), 0
        while self._queue and (not batch or cost + self._queue[0].cost <= self.budget):
            batch.append(self._queue.popleft())
            cost += batch[-1].cost
        # All that waited may have been given up.
        if batch:
            self._observe(len(batch), cost)
            for piece, answer in zip(
                batch, await self._answers([piece.work for piece in batch]), strict=True
            ):
                if piece.answer.done():
                    continue
                if isinstance(answer, Exception):
                    piece.answer.set_exception(answer)
                else:
                    piece.answer.set_result(answer)
        return [piece.release for piece in batch]

    async def _answers(self, works: Sequence[Any]) -> Sequence[Any]:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self.run, works)
        except Exception as error:  # the service survives any request
            if len(works) == 1:
                return [error]
            # Only the piece that fails by itself gets the error.
            return [answer for work in works for answer in await self._answers([work])]
