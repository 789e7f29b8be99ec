"""A ledger of the bytes that requests hold, and dynamic batching of their work within a budget of tokens."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from xfm_fast.serve.schema import Problem

T = TypeVar("T")

MAX_PIXELS = 1 << 24
"""Pixels of an image."""
# Smaller requests have the image limits of this size.
_MIN_REQUEST_BYTES = 1 << 20
# Limits of images per byte of the request: bytes to decode one of them, and pixels of all of them.
_PEAK_PER_BYTE = 56
_PIXELS_PER_BYTE = 16
# Copies of a body while it arrives; then of its bytes, its text, its values, and the files of its
# images.
_ARRIVING_COPIES, _COPIES = 2, 4
# Upper bound of a JSON value's size, counted by the characters that begin or precede values, within
# strings too: a dict of one key has 184 bytes, a key 64 and as many in the parser's table of keys.
_VALUE_MARKS, _VALUE_BYTES = (b",", b":", b"[", b"{"), 256
_VALUE_LIMIT = 1 << 18
# Starts of characters beyond the basic plane, in UTF-8 and escaped; their strings take 4 bytes per
# character.
_ASTRAL = (b"\xf0", b"\xf1", b"\xf2", b"\xf3", b"\xf4", b"\\ud", b"\\uD")
_SOON = {"retry-after": "1"}
# Seconds without an arrival after which a batch begins.
_PAUSE = 0.001
# Seconds that a body may pause before it may be dropped.
_GRACE = 1.0


class Ledger:
    """Bytes that all requests hold together, and the accounts of arriving bodies, the oldest first."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self.arriving: dict[Account, None] = {}
        self.lock = threading.RLock()


class Account:
    """The bytes that a request has received and holds; they count until `close` and the end of all leases."""

    def __init__(self, ledger: Ledger, limit: int, seconds: float) -> None:
        # Bytes of the request, downloads included, and bytes per second: at this pace, the largest
        # body arrives just in time.
        self._limit, self._pace = limit, limit / seconds
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

    async def read(self, chunks: AsyncIterator[bytes], expire: Callable[[], object]) -> bytes:
        """Read the body, and hold the bytes that parsing it will take; raises `Problem` 400, 413,
        422 and 429.

        If other requests lack memory, a body that arrives too slowly is dropped and `expire` is
        called; `check` then raises the reason.
        """
        self._expire, self._due = expire, time.monotonic() + _GRACE
        self._ledger.arriving[self] = None
        try:
            async for chunk in chunks:
                self.receive(len(chunk), _ARRIVING_COPIES)
                self.body += chunk
                self._due = min(self._due + len(chunk) / self._pace, time.monotonic() + _GRACE)
        finally:
            self._ledger.arriving.pop(self, None)
        if b"\0" in self.body:
            # The parser would accept UTF-16 and UTF-32 too, which have another size as text.
            raise Problem(400, "the body is not JSON in UTF-8: it holds a NUL byte")
        values = sum(map(self.body.count, _VALUE_MARKS))
        if values > _VALUE_LIMIT:
            raise Problem(422, f"the body holds more than {_VALUE_LIMIT:,} values; send fewer")
        # Bytes per character of the text and of the strings in it.
        width = 1
        if not self.body.isascii() or b"\\u" in self.body:
            width = 4 if any(mark in self.body for mark in _ASTRAL) else 2
        copies = _COPIES - _ARRIVING_COPIES + 2 * (width - 1)
        self.hold(copies * len(self.body) + values * _VALUE_BYTES)
        body = bytes(self.body)
        self.body.clear()
        return body

    def receive(self, count: int, copies: int) -> None:
        """Hold copies of bytes of the body or of a download; raises `Problem` 413 and 429."""
        self.received += count
        if self.received > self._limit:
            message = (
                f"the request has more than {self._limit:,} bytes; shrink the images, or send fewer"
            )
            raise Problem(413, message)
        self.hold(copies * count)

    def hold(self, count: int) -> None:
        """Hold bytes; raises `Problem` 429 if there is no room for them, or if the request has ended."""
        ledger = self._ledger
        with ledger.lock:
            self.check()
            now = time.monotonic()
            for account in [*ledger.arriving]:
                if ledger.used + count <= ledger.limit:
                    break
                if account is not self and account._due < now:
                    account._drop_body()
            if ledger.used + count > ledger.limit:
                message = f"requests hold {ledger.used:,} of {ledger.limit:,} bytes; ask again in a second"
                raise Problem(429, message, _SOON)
            ledger.used += count
            self._held += count

    def _drop_body(self) -> None:
        message = (
            "the body arrives slowly, and other requests need its memory; ask again in a second"
        )
        self._refusal, self.ended = (429, message, _SOON), True
        self.body.clear()
        self._ledger.arriving.pop(self)
        self._release()
        self._expire()

    def take_image(self, name: str, pixels: int, peak: int) -> None:
        """Count an image that takes `peak` bytes to decode; raises `Problem` 413 if it is too large."""
        if pixels > MAX_PIXELS:
            raise Problem(
                413, f"{name} has {pixels:,} pixels, over the limit of {MAX_PIXELS:,}; shrink it"
            )
        self._pixels += pixels
        size = max(self.received, _MIN_REQUEST_BYTES)
        if peak > _PEAK_PER_BYTE * size or self._pixels > _PIXELS_PER_BYTE * size:
            raise Problem(
                413,
                f"{name} takes {peak:,} bytes to decode, and images so far hold {self._pixels:,} pixels, over "
                f"{_PEAK_PER_BYTE} and {_PIXELS_PER_BYTE} per byte of the request; shrink them",
            )

    def check(self) -> None:
        """Raise `Problem` once the request has ended."""
        if self.ended:
            raise Problem(*self._refusal)

    def lease(self) -> Callable[..., None]:
        """Extend the holding of all bytes until the returned function is called, once, from any thread."""
        with self._ledger.lock:
            self._leases += 1
        return self._end_lease

    def _end_lease(self, *_: object) -> None:
        with self._ledger.lock:
            self._leases -= 1
            if self._leases == 0:
                self._release()

    def _release(self) -> None:
        self._ledger.used -= self._held
        self._held = 0

    async def run(self, threads: ThreadPoolExecutor, function: Callable[..., T], *args: Any) -> T:
        """Run a function in another thread; the bytes are held until it returns, even if the caller is cancelled."""
        job = threads.submit(function, *args)
        job.add_done_callback(self.lease())
        result = asyncio.wrap_future(job)
        # Retrieve the exception, which a cancelled caller does not.
        result.add_done_callback(lambda future: future.cancelled() or future.exception())
        # Unlike `await`, this does not cancel the job: a cancelled one would keep its arguments in
        # the queue.
        await asyncio.wait([result])
        return result.result()

    def close(self) -> None:
        """End the request, which then holds no further bytes."""
        self.ended = True
        self._end_lease()


@dataclass(eq=False)
class _Entry:
    work: Any
    cost: int
    release: Callable[[], object]
    result: asyncio.Future[Any]


class Batcher:
    """Runs work in batches of at most `budget` cost, in order and in one thread; a single entry may
    cost more.

    `run` returns results in order; an exception among them is raised for its entry. If `run` itself
    raises, each entry runs alone. A batch waits up to `wait` seconds while `coming()` counts others,
    or entries keep arriving; `observe` gets the number of entries and the cost of a batch.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Any]], Sequence[Any]],
        budget: int,
        wait: float = 0.005,
        *,
        coming: Callable[[], int] = lambda: 0,
        observe: Callable[[int, int], None] = lambda entries, cost: None,
        thread: ThreadPoolExecutor | None = None,
    ) -> None:
        self.run, self.budget, self.wait = run, budget, wait
        self._coming, self._observe = coming, observe
        self._queue: deque[_Entry] = deque()
        # Entries of the last batch.
        self._batched = 0
        self._arrived = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None
        self._thread = thread or ThreadPoolExecutor(1, thread_name_prefix="batches")

    def __len__(self) -> int:
        """Return the length of the queue."""
        return len(self._queue)

    async def submit(
        self, work: Any, cost: int, release: Callable[[], object] = lambda: None
    ) -> Any:
        """Compute the result of work; cancelling this drops work that has not begun.

        `release` is called once, when the batcher no longer refers to the work: after its batch, or
        when it is dropped.
        """
        result = asyncio.get_running_loop().create_future()
        entry = _Entry(work, cost, release, result)
        self._queue.append(entry)
        self._arrived.set()
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._run_batches())
        try:
            return await result
        finally:
            if entry in self._queue:
                self._queue.remove(entry)
                release()

    def close(self) -> None:
        """End the thread after its current batch."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run_batches(self) -> None:
        while self._queue:
            await self._wait_for_others()
            # The frame of `_run_batch` ends with all references to the work.
            for release in await self._run_batch():
                release()

    async def _wait_for_others(self) -> None:
        """Wait while others are being read or keep arriving, as they do after the answers of a batch."""
        deadline = time.monotonic() + self.wait
        is_alone = self._batched + len(self._queue) < 3
        while sum(entry.cost for entry in self._queue) < self.budget:
            is_coming, waiting = self._coming() > 0, len(self._queue)
            if (is_alone and not is_coming) or time.monotonic() >= deadline:
                return
            is_alone = False
            await asyncio.sleep(_PAUSE)
            if not is_coming and len(self._queue) <= waiting:
                return

    async def _run_batch(self) -> list[Callable[[], object]]:
        """Run the first entries of the queue; returns the functions that release them."""
        batch, cost = list[_Entry](), 0
        while self._queue and (not batch or cost + self._queue[0].cost <= self.budget):
            batch.append(self._queue.popleft())
            cost += batch[-1].cost
        # The queue may have been emptied by cancellations.
        self._batched = len(batch)
        if batch:
            self._observe(len(batch), cost)
            results = await self._compute([entry.work for entry in batch])
            for entry, result in zip(batch, results, strict=True):
                if entry.result.done():
                    continue
                if isinstance(result, Exception):
                    entry.result.set_exception(result)
                else:
                    entry.result.set_result(result)
        return [entry.release for entry in batch]

    async def _compute(self, works: Sequence[Any]) -> Sequence[Any]:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self.run, works)
        except Exception as error:  # the service survives any request
            if len(works) == 1:
                return [error]
            # Only the work that fails alone gets the error.
            return [result for work in works for result in await self._compute([work])]
