"""Dynamic batching: a queue in order of arrival, and a thread that runs batches within a budget of tokens."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

W = TypeVar("W")
A = TypeVar("A")


@dataclass
class _Waiting(Generic[W, A]):
    work: W
    cost: int
    since: float
    answer: asyncio.Future[A]
    loop: asyncio.AbstractEventLoop
    given_up: bool = False

    def resolve(self, result: A | BaseException) -> None:
        def set_result() -> None:
            if self.answer.done():
                return
            if isinstance(result, BaseException):
                self.answer.set_exception(result)
            else:
                self.answer.set_result(result)

        if not self.given_up and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(set_result)


class Batcher(Generic[W, A]):
    """Runs work in batches of at most `budget` cost, in its own thread; a single piece may cost more.

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
        self.budget, self.wait = budget, wait
        self._run, self._coming, self._seen = run, coming, seen
        self._queue: deque[_Waiting[W, A]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """Length of the queue."""
        return len(self._queue)

    async def submit(self, work: W, cost: int) -> A:
        """Result of a piece of work; cancelling this drops work that has not begun."""
        loop = asyncio.get_running_loop()
        waiting = _Waiting[W, A](work, cost, time.monotonic(), loop.create_future(), loop)
        with self._changed:
            self._queue.append(waiting)
            self._changed.notify()
        try:
            return await waiting.answer
        finally:
            waiting.given_up = True

    def close(self, seconds: float | None = None) -> None:
        """End the thread after the queued work, waiting at most this long."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(seconds)

    def _work(self) -> None:
        while batch := self._next():
            self._seen(len(batch), sum(each.cost for each in batch))
            self._answer(batch)
            # An idle thread would otherwise keep images and results of its last batch.
            del batch

    def _next(self) -> list[_Waiting[W, A]]:
        """The next batch; empty after `close`."""
        batch: list[_Waiting[W, A]] = []
        with self._changed:
            while not batch:
                while not self._queue and not self._closed:
                    self._changed.wait()
                if not self._queue:
                    return []
                latest = self._queue[0].since + self.wait
                while (
                    not self._closed
                    and self._coming() > 0
                    and sum(each.cost for each in self._queue) < self.budget
                    and (left := latest - time.monotonic()) > 0
                ):
                    self._changed.wait(left)
                cost = 0
                while self._queue:
                    first = self._queue[0]
                    if not first.given_up:
                        if batch and cost + first.cost > self.budget:
                            break
                        batch.append(first)
                        cost += first.cost
                    self._queue.popleft()
        return batch

    def _answer(self, batch: list[_Waiting[W, A]]) -> None:
        try:
            answers = self._run([each.work for each in batch])
        except Exception as error:  # the thread survives any request
            if len(batch) == 1:
                batch[0].resolve(error)
                return
            # Only the piece that fails by itself gets the error.
            for each in batch:
                self._answer([each])
            return
        for each, answer in zip(batch, answers, strict=True):
            each.resolve(answer)
