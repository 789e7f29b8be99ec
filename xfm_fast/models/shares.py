"""Inference of a batch in one chunk per thread.

Intra-op parallelism synchronises threads at the end of every operation, several hundred times per
batch, and each reads the others' results from a farther cache. Which is faster depends on the
processor, its number of threads and the batch, so the first calls time both.
"""

from __future__ import annotations

import math
import os
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from xfm_fast.kernels import host
from xfm_fast.kernels.backend import named
from xfm_fast.kernels.cpu.gemm import is_frozen
from xfm_fast.kernels.flags import kind_of
from xfm_fast.packing import ImageGroups, Sequences

# Timed calls of each way; the best of them counts.
_TURNS = 2
# The longest chunk may exceed the mean by this factor.
_UNEVEN = 1.1
LEAST_TOKENS = 160
"""Minimum tokens per thread: smaller chunks measured slower, because each thread reads all weights."""
# Kinds of calls with stored timings; the least recently used are dropped and timed again.
_MAX_KINDS = 256
_seconds: dict[Any, tuple[list[float], list[float]]] = {}
_pools: dict[int, ThreadPoolExecutor] = {}
_lock = threading.Lock()
# A child has the pools of its parent, without their threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)


class Divisible(Protocol):
    """A batch that can be cut, like a tensor along its first dimension; its length measures its work."""

    def __len__(self) -> int: ...

    def chunk(self, chunks: int, /) -> Sequence[Self]: ...


Batch = TypeVar("Batch", bound=Divisible)


@dataclass(frozen=True)
class Texts:
    """Packed texts `[T, width]`, cut between texts; the length is in tokens."""

    tokens: Tensor
    sequences: Sequences
    groups: ImageGroups | None = None  # images of the texts, in order; None without images

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def kind(self) -> tuple[Any, ...]:
        """Key that is equal for batches with about the same time per token."""
        images = 0 if self.groups is None else len(self.groups.cu_texts)
        size = round(4 * math.log2(len(self.tokens)))
        return size, images, self.tokens.shape[1], self.tokens.dtype

    def chunk(self, chunks: int, /) -> Sequence[Texts]:
        """Split into chunks of about the same number of tokens, at most one per text."""
        starts = host.integers(self.sequences.cu_seqlens)
        cuts = [0]
        for index in range(1, chunks):
            goal = index * starts[-1] / chunks
            cut = bisect_left(starts, goal)
            if cut and goal - starts[cut - 1] < starts[cut] - goal:
                cut -= 1
            cuts.append(cut)
        cuts.append(len(starts) - 1)
        batches = []
        for first, last in pairwise(cuts):
            if last > first:
                cu_seqlens = self.sequences.cu_seqlens[first : last + 1] - starts[first]
                sequences = Sequences(cu_seqlens=cu_seqlens, max_seqlen=self.sequences.longest)
                groups = None
                if self.groups is not None:
                    # The texts of an image may all be in other chunks.
                    groups = ImageGroups(self.groups.cu_texts.clamp(first, last) - first)
                tokens = self.tokens[starts[first] : starts[last]]
                batches.append(Texts(tokens, sequences, groups))
        return batches


def can_chunk(weight: Tensor) -> bool:
    """Return whether a frozen or int8 weight is used in CPU inference without autocast, tracing or modes."""
    return (
        not torch.compiler.is_compiling()
        and torch.is_inference_mode_enabled()
        and not torch.is_autocast_enabled("cpu")
        and (is_frozen(weight) or (kind_of(weight) == "int8" and weight.device.type == "cpu"))
        and not named(None)
    )


def without_hooks(modules: Iterable[nn.Module], *methods: str) -> bool:
    """Return whether methods of the modules may be called in place of the modules.

    Modules that are hooked, sharded, checkpointed or compiled have to be called as a whole; these
    have hooks, or one of `methods` overridden on the instance.
    """
    return not any(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or not vars(module).keys().isdisjoint(methods)
        for module in modules
    )


def run_chunked(run: Callable[[Batch], Tensor], batch: Batch, kind: Any) -> Tensor:
    """Run `run(batch)` in inference mode, whole or in chunks of its first dimension.

    Calls of the same hashable `kind` are timed together, by the length of their batches.
    """
    threads = torch.get_num_threads()
    if threads == 1 or not len(batch) or torch.are_deterministic_algorithms_enabled():
        return run(batch)
    chunks = batch.chunk(threads)
    if max(map(len, chunks)) * threads > _UNEVEN * len(batch):
        return run(batch)
    with _lock:
        # Move to the end: dictionaries are ordered.
        whole, chunked = _seconds[kind, threads] = _seconds.pop((kind, threads), ([], []))
        if len(_seconds) > _MAX_KINDS:
            del _seconds[next(iter(_seconds))]
    if len(whole) >= _TURNS and len(chunked) >= _TURNS:
        if min(chunked) < min(whole):
            return _run_in_threads(run, chunks, threads)
        return run(batch)
    in_chunks = len(chunked) < len(whole)
    start = time.perf_counter()
    output = _run_in_threads(run, chunks, threads) if in_chunks else run(batch)
    timings = chunked if in_chunks else whole
    timings.append((time.perf_counter() - start) / len(batch))
    return output


def _run_in_threads(
    run: Callable[[Batch], Tensor], chunks: Sequence[Batch], threads: int
) -> Tensor:
    def run_chunk(chunk: Batch) -> Tensor:
        # Inference mode is thread-local.
        with torch.inference_mode():
            return run(chunk)

    return torch.cat([*_pool(threads).map(run_chunk, chunks)])


def _pool(threads: int) -> ThreadPoolExecutor:
    with _lock:
        pool = _pools.get(threads)
        if pool is None:
            pool = _pools[threads] = ThreadPoolExecutor(threads, "xfm-fast-chunk")
            ready = threading.Barrier(threads)
            for future in [pool.submit(_use_one_thread, ready) for _ in range(threads)]:
                future.result()
            # The number set in a thread is the default of later threads, and MKL's number in all.
            torch.set_num_threads(threads)
        return pool


def _use_one_thread(ready: threading.Barrier) -> None:
    # PyTorch sets the number of a new thread at first use; query it before setting it.
    torch.get_num_threads()
    torch.set_num_threads(1)
    ready.wait()
