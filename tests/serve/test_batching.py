"""Work that comes together is computed together, in order, within the budget; a piece that fails fails by itself."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from xfm_fast.errors import InputError
from xfm_fast.serve.work import Batcher


class Doubling:
    """Doubles numbers once `go` is set, and records the batches."""

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


@pytest.mark.parametrize(
    ("budget", "works", "given_up", "expected", "batches"),
    [
        (10, [(1, 4), (2, 6), (3, 1), (4, 30)], (), [2, 4, 6, 8], [[1, 2], [3], [4]]),
        (
            2,
            [(7, 1), (5, 1), (13, 1), (6, 1)],
            (),
            [InputError, 10, RuntimeError, 12],
            [[7, 5], [13, 6], [13], [6]],
        ),
        (100, [(1, 1), (2, 1)], (0,), [asyncio.CancelledError, 4], [[2]]),
    ],
    ids=["budget", "failures", "given up"],
)
def test_batches(
    budget: int,
    works: list[tuple[int, int]],
    given_up: Sequence[int],
    expected: list[Any],
    batches: list[list[int]],
) -> None:
    async def scenario() -> None:
        run = Doubling()
        batcher = Batcher(run, budget)
        first = asyncio.create_task(batcher.submit(0, 1))
        await asyncio.to_thread(run.begun.wait, 60)
        tasks = [asyncio.create_task(batcher.submit(*work)) for work in works]
        await asyncio.sleep(0)
        for index in given_up:
            tasks[index].cancel()
        run.go.set()
        results = await asyncio.gather(first, *tasks, return_exceptions=True)
        assert [
            type(result) if isinstance(result, BaseException) else result for result in results
        ] == [
            0,
            *expected,
        ]
        assert run.batches == [[0], *batches]
        batcher.close()

    asyncio.run(scenario())


def test_a_first_piece_waits_only_for_others_that_are_coming() -> None:
    async def scenario() -> None:
        coming, run = 0, Doubling()
        run.go.set()
        batcher = Batcher(run, budget=100, wait=60.0, coming=lambda: coming)
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
