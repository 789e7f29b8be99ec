"""A batch in shares, one for each thread, which computes it alone.

Threads that divide every operation among them wait for each other at its end, several hundred times a batch, and read
each other's part of the result from a cache further away. Whether shares are faster depends on the processor, on the
number of its threads and on what they share, so the first calls take turns, and the faster way stays.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

# Timed calls of each way before one is chosen; the best of them counts.
_TURNS = 2
# The larger share may exceed the mean by this factor.
_UNEVEN = 1.1
# Kinds of calls whose timings are kept; beyond that those that were not asked for the longest go, to be timed again.
_MOST_KINDS = 256
_seconds: dict[Any, tuple[list[float], list[float]]] = {}
_pools: dict[int, ThreadPoolExecutor] = {}
_lock = threading.Lock()
# A child has the pools of its parent, without their threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)


def in_shares(run: Callable[[Tensor], Tensor], batch: Tensor, kind: Any) -> Tensor:
    """`run(batch)` in inference mode, whole or in shares of its first dimension, over which `run` maps.

    Args:
        kind: hashable; calls of one kind, shape and type are timed together.
    """
    threads = torch.get_num_threads()
    largest = -(-len(batch) // threads)
    if threads == 1 or largest * threads > _UNEVEN * len(batch) or torch.are_deterministic_algorithms_enabled():
        return run(batch)
    whole, shared = _timings((kind, tuple(batch.shape), batch.dtype, threads))
    if len(whole) >= _TURNS and len(shared) >= _TURNS:
        return _shared(run, batch, threads) if min(shared) < min(whole) else run(batch)
    timed = shared if len(shared) < len(whole) else whole
    start = time.perf_counter()
    found = _shared(run, batch, threads) if timed is shared else run(batch)
    timed.append(time.perf_counter() - start)
    return found


def _timings(key: Any) -> tuple[list[float], list[float]]:
    """Seconds of the calls so far, whole and in shares."""
    with _lock:
        # Behind all others: dictionaries keep the order.
        found = _seconds[key] = _seconds.pop(key, ([], []))
        if len(_seconds) > _MOST_KINDS:
            del _seconds[next(iter(_seconds))]
    return found


def _shared(run: Callable[[Tensor], Tensor], batch: Tensor, threads: int) -> Tensor:
    def alone(part: Tensor) -> Tensor:
        # The mode is a thread's own.
        with torch.inference_mode():
            return run(part)

    return torch.cat([*_pool(threads).map(alone, batch.chunk(threads))])


def _pool(threads: int) -> ThreadPoolExecutor:
    with _lock:
        found = _pools.get(threads)
        if found is None:
            found = _pools[threads] = ThreadPoolExecutor(threads, "xfm-fast-share")
            ready = threading.Barrier(threads)
            for waiting in [found.submit(_work_alone, ready) for _ in range(threads)]:
                waiting.result()
            # What a thread sets is also what later threads begin with, and how many MKL takes in all of them.
            torch.set_num_threads(threads)
        return found


def _work_alone(ready: threading.Barrier) -> None:
    # Asked first: PyTorch gives a new thread the number of the others when it is first needed.
    torch.get_num_threads()
    torch.set_num_threads(1)
    ready.wait()
