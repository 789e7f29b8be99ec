"""Memory and pixels that requests may take, and dynamic batching of their work within a budget of tokens."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

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
# Copies of a body: its bytes, its text and values, the files of its images; a character beyond ASCII makes text wider.
COPIES, _WIDE_COPIES = 3, 3
# Values of a body of JSON, each of which may take 200 bytes.
_MOST_VALUES = 1 << 18


class Memory:
    """Bytes that all requests hold together."""

    def __init__(self, most: int) -> None:
        self.most, self.used = most, 0
        self.lock = threading.Lock()


class Budget:
    """What one request has received, holds and may still take."""

    def __init__(self, memory: Memory, options: ServiceOptions) -> None:
        self.options = options
        # The work of the request is in the queue of the batcher, or done.
        self.submitted = False
        self.ended = False
        self._memory = memory
        self._held = self._received = self._pixels = 0
        self._job: Future[Any] | None = None

    def receive(self, count: int, copies: int = 1) -> None:
        """Hold bytes of the body or of a download, in this many copies; raises `Problem` 413 and 429."""
        self._received += count
        most = self.options.max_body_bytes
        if self._received > most:
            raise Problem(413, f"the request has more than {most:,} bytes; shrink the images, or send fewer")
        self._hold(copies * count)

    def _hold(self, count: int) -> None:
        memory = self._memory
        with memory.lock:
            self.check()
            if memory.used + count > memory.most:
                message = f"requests hold {memory.used:,} of {memory.most:,} bytes; ask again in a second"
                raise Problem(429, message, {"retry-after": "1"})
            memory.used += count
            self._held += count

    def check_values(self, body: bytearray) -> None:
        """Raise `Problem` for a body of JSON with too many values, which take much more memory than its bytes."""
        if not body.isascii():
            self._hold(_WIDE_COPIES * len(body))
        # Separators inside strings count, too.
        if sum(map(body.count, (b",", b"[", b"{"))) > _MOST_VALUES:
            raise Problem(422, f"the body holds more than {_MOST_VALUES:,} values; send fewer")

    def take_image(self, name: str, pixels: int, peak: int) -> None:
        """Count an image that takes `peak` bytes to decode; raises `Problem` 413 where it is too large."""
        if pixels > MAX_PIXELS:
            raise Problem(413, f"{name} has {pixels:,} pixels, over the limit of {MAX_PIXELS:,}; shrink it")
        self._pixels += pixels
        size = max(self._received, _SMALL_REQUEST)
        if peak > _PEAK_PER_BYTE * size or self._pixels > _PIXELS_PER_BYTE * size:
            raise Problem(
                413, f"{name} takes {peak:,} bytes to decode, and images so far hold {self._pixels:,} pixels, over "
                f"{_PEAK_PER_BYTE} and {_PIXELS_PER_BYTE} per byte of the request; shrink them",
            )  # fmt: skip

    def check(self) -> None:
        """Raise `Problem` once the request has ended."""
        if self.ended:
            raise Problem(503, "the request has ended; ask again")

    async def run(self, threads: ThreadPoolExecutor, function: Callable[..., T], *arguments: Any) -> T:
        """Result of a function in another thread; the request holds its memory until the function returns."""
        self._job = threads.submit(function, *arguments)
        return await asyncio.wrap_future(self._job)

    def close(self) -> None:
        """End the request: it takes no more, and its memory is released once no thread works on it."""

        def release(job: object) -> None:
            with self._memory.lock:
                self.ended = True
                self._memory.used -= self._held
                self._held = 0

        self.ended = True
        if self._job is None:
            release(None)
        else:
            self._job.add_done_callback(release)


class _Piece(NamedTuple):
    work: Any
    cost: int
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

    async def submit(self, work: Any, cost: int) -> Any:
        """Result of a piece of work; cancelling this drops work that has not begun."""
        piece = _Piece(work, cost, asyncio.get_running_loop().create_future(), time.monotonic())
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
            batch, cost = list[_Piece](), 0
            while self._queue and (not batch or cost + self._queue[0].cost <= self.budget):
                piece = self._queue.popleft()
                if not piece.answer.done():
                    batch.append(piece)
                    cost += piece.cost
            if not batch:
                continue
            self._observe(len(batch), cost)
            for piece, answer in zip(batch, await self._answers([piece.work for piece in batch]), strict=True):
                if piece.answer.done():
                    continue
                if isinstance(answer, Exception):
                    piece.answer.set_exception(answer)
                else:
                    piece.answer.set_result(answer)

    async def _answers(self, works: Sequence[Any]) -> Sequence[Any]:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self.run, works)
        except Exception as error:  # the service survives any request
            if len(works) == 1:
                return [error]
            # Only the piece that fails by itself gets the error.
            return [answer for work in works for answer in await self._answers([work])]
