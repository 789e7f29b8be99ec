"""Work that comes together is computed together, in order, within the budget, and fails alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

from xfm_fast.errors import InputError
from xfm_fast.serve.batching import Batcher


class Doubling:
    """Doubles numbers, when it is let to; keeps what came together."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self, works: Sequence[int]) -> list[int | Exception]:
        self.batches.append([*works])
        self.begun.set()
        assert self.go.wait(60)
        if 13 in works:
            raise RuntimeError("thirteen")
        return [InputError("seven") if work == 7 else 2 * work for work in works]


async def _begun(run: Doubling, batcher: Batcher[int, int]) -> asyncio.Task[int]:
    """A first piece, which the thread is busy with."""
    first = asyncio.create_task(batcher.submit(0, 1))
    await asyncio.to_thread(run.begun.wait, 60)
    return first


def test_what_gathers_meanwhile_is_one_batch_within_the_budget() -> None:
    async def scenario() -> None:
        run = Doubling()
        batcher = Batcher(run, budget=10)
        first = await _begun(run, batcher)
        tasks = [
            asyncio.create_task(batcher.submit(number, cost)) for number, cost in ((1, 4), (2, 6), (3, 1), (4, 30))
        ]
        await asyncio.sleep(0)
        run.go.set()
        assert await asyncio.gather(first, *tasks) == [0, 2, 4, 6, 8]
        assert run.batches == [[0], [1, 2], [3], [4]]
        batcher.close()

    asyncio.run(scenario())


def test_one_that_fails_fails_alone() -> None:
    async def scenario() -> None:
        run = Doubling()
        batcher = Batcher(run, budget=100)
        first = await _begun(run, batcher)
        tasks = [asyncio.create_task(batcher.submit(number, 1)) for number in (7, 13, 5)]
        await asyncio.sleep(0)
        run.go.set()
        found = await asyncio.gather(first, *tasks, return_exceptions=True)
        assert found[0] == 0
        assert found[3] == 10
        assert isinstance(found[1], InputError)
        assert isinstance(found[2], RuntimeError)
        assert run.batches == [[0], [7, 13, 5], [7], [13], [5]]
        batcher.close()

    asyncio.run(scenario())


def test_what_is_given_up_is_not_begun() -> None:
    async def scenario() -> None:
        run = Doubling()
        batcher = Batcher(run, budget=100)
        first = await _begun(run, batcher)
        lost, kept = (asyncio.create_task(batcher.submit(number, 1)) for number in (1, 2))
        await asyncio.sleep(0)
        lost.cancel()
        with pytest.raises(asyncio.CancelledError):
            await lost
        run.go.set()
        assert await asyncio.gather(first, kept) == [0, 4]
        assert run.batches == [[0], [2]]
        batcher.close()

    asyncio.run(scenario())


def test_a_first_piece_waits_only_for_others_that_are_coming() -> None:
    async def scenario() -> None:
        coming, run = 0, Doubling()
        run.go.set()
        batcher = Batcher(run, budget=100, wait=60.0, coming=lambda: coming)
        # Nobody is coming: had it waited, this would take a minute.
        assert await asyncio.wait_for(batcher.submit(1, 1), 30) == 2
        coming = 1
        first = asyncio.create_task(batcher.submit(2, 1))
        await asyncio.sleep(0.05)
        assert not first.done()
        coming = 0
        second = asyncio.create_task(batcher.submit(3, 1))
        assert await asyncio.wait_for(asyncio.gather(first, second), 30) == [4, 6]
        assert run.batches == [[1], [2, 3]]
        batcher.close()

    asyncio.run(scenario())


def test_closing_ends_what_waits_first() -> None:
    async def scenario() -> None:
        run = Doubling()
        batcher = Batcher(run, budget=1)
        first = await _begun(run, batcher)
        second = asyncio.create_task(batcher.submit(4, 1))
        await asyncio.sleep(0)
        run.go.set()
        await asyncio.to_thread(batcher.close)
        assert await asyncio.gather(first, second) == [0, 8]

    asyncio.run(scenario())
