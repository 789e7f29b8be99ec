"""Requests that wait for the model, and the thread that takes as many of them together as a budget of tokens holds.

While a batch is computed, others gather; a request that comes alone starts at once. Order is that of arrival.
"""

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

    def settle(self, found: A | BaseException) -> None:
        def give() -> None:
            if self.answer.done():
                return
            if isinstance(found, BaseException):
                self.answer.set_exception(found)
            else:
                self.answer.set_result(found)

        if not self.given_up and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(give)


class Batcher(Generic[W, A]):
    """Runs work in batches, in a thread of its own.

    Args:
        run: answers several pieces of work, in their order; an answer may be an exception, which is then raised for
            that piece. When it raises one itself, every piece is tried alone.
        budget: cost of a batch, at most; a single piece may have more.
        wait: seconds that the first piece of a batch waits for others, where `coming` says that there are some.
        coming: pieces that are being prepared.
        seen: told of every batch, its number of pieces and its cost.
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
        """Pieces that wait."""
        return len(self._queue)

    async def submit(self, work: W, cost: int) -> A:
        """The answer to a piece of work. Cancelling this gives the work up if it has not begun."""
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
        """End the thread when the work that waits is done; wait for that so many seconds at most."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(seconds)

    def _work(self) -> None:
        while batch := self._next():
            self._seen(len(batch), sum(each.cost for each in batch))
            self._answer(batch)
            # An idle thread would otherwise keep images and answers of its last batch.
            del batch

    def _next(self) -> list[_Waiting[W, A]]:
        """The next batch; empty when there will be none."""
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
        except Exception as error:  # the thread outlives whatever a request does to it
            if len(batch) == 1:
                batch[0].settle(error)
                return
            # One of them is to blame, and only that one is to fail.
            for each in batch:
                self._answer([each])
            return
        for each, answer in zip(batch, answers, strict=True):
            each.settle(answer)
