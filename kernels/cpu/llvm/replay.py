"""Replay of recorded kernel launches by one call of compiled code, as a CUDA graph on a CPU.

One team of threads runs the whole list. Between two launches it waits at a barrier, which costs less than a team of its
own for every kernel.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import llvmlite.ir as ir
import numpy as np

from . import Level, levels
from .builder import (
    _COUNTERS,
    _LINE,
    INT32,
    INT64,
    POINTER,
    Builder,
    Launch,
    kernel,
    openmp_function,
)

_FIELDS = 2
# Polls of a barrier before a thread yields its core.
_POLLS = 2000


class _Replay:
    """Emits the driver: every thread runs its share of each launch and waits for the others."""

    name = "replay"

    def __init__(self, level: Level) -> None:
        numbers = ("yield", "team size", "count", "threads")
        self.b = b = Builder(self.name, ("launches", "barrier"), numbers, level)
        # OpenMP may start fewer threads than asked for.
        alone = b.args["threads"] <= 1
        before = b.block
        with b.if_then(b.not_(alone)):
            started = b.zext(self._call(b.args["team size"], INT32), INT64)
            inside = b.block
        self.team = b.index(b.phi(INT64))
        self.team.value.add_incoming(ir.Constant(INT64, 1), before)
        self.team.value.add_incoming(started, inside)
        b.loop(0, b.args["count"], 1, self._launch)
        b.finish()

    def _call(self, address: Any, result: Any, *args: Any) -> Any:
        """Call the C function at an address."""
        signature = ir.FunctionType(result, [POINTER] * len(args))
        return self.b.call(self.b.inttoptr(address.value, signature.as_pointer()), args)

    def _launch(self, index: Any) -> None:
        b, args = self.b, self.b.args
        launch = index * _FIELDS
        function = b.load_scalar(args["launches"], launch, INT64)
        operands = b.load_scalar(args["launches"], launch + 1, POINTER)
        self._call(function, ir.VoidType(), operands)
        with b.if_then(self.team > 1):
            self._wait(index)

    def _wait(self, index: Any) -> None:
        """Wait until all threads have come as far."""
        b, args = self.b, self.b.args
        b.atomic_rmw("add", args["barrier"], ir.Constant(INT64, 1), "acq_rel")
        needed = (index + 1) * self.team
        head, inside, done = (b.function.append_basic_block() for _ in range(3))
        before = b.block
        b.branch(head)
        b.position_at_end(head)
        polls = b.index(b.phi(INT64))
        polls.value.add_incoming(ir.Constant(INT64, 0), before)
        arrived = b.index(b.load_atomic(args["barrier"], "acquire", 8, typ=INT64))
        b.cbranch(arrived < needed, inside, done)
        b.position_at_end(inside)
        b.intrinsic("llvm.x86.sse2.pause", ir.VoidType())
        with b.if_then(polls > _POLLS):
            # Another process may need the core that the last thread waits for.
            self._call(args["yield"], INT32)
        polls.value.add_incoming((polls + 1).value, b.block)
        b.branch(head)
        b.position_at_end(done)


class Replay:
    """Recorded launches as one call; what they read and write must stay where it is.

    `moving` are addresses that each call replaces, by position in its argument. Not for two threads at a time.
    """

    def __init__(
        self, launches: Sequence[Launch], threads: int, moving: Sequence[int] = ()
    ) -> None:
        count = len(launches)
        self._kernels = [launch.kernel for launch in launches]
        self._counters = np.zeros((count + 1, _COUNTERS), np.int64)
        counters = self._counters.ctypes.data
        numbers, starts = list[int](), list[int]()
        for index, launch in enumerate(launches):
            place = counters + 8 * _COUNTERS * index
            starts.append(len(numbers))
            tasks, *args = launch.args
            numbers += (tasks, place, place + 8 * _LINE, launch.kernel._constants, *args)
        self._numbers = np.array(numbers, np.int64)
        self._slots = [np.flatnonzero(self._numbers == address) for address in moving]
        base = self._numbers.ctypes.data
        pairs = zip(self._kernels, starts, strict=True)
        self._launches = np.array(
            [(kernel._address, base + 8 * start) for kernel, start in pairs], np.int64
        )
        addresses = [_address(ctypes.CDLL(None).sched_yield), 0]
        team = min(threads, max((launch.args[0] for launch in launches), default=1))
        size = openmp_function("omp_get_num_threads")
        if team > 1 and size is not None:
            addresses[1] = _address(size)
        else:
            team = 1
        barrier = counters + 8 * _COUNTERS * count
        self._args = (self._launches.ctypes.data, barrier, *addresses, count, team)
        self._run, self._team = kernel(_Replay, levels()[0]), team

    def __call__(self, addresses: Sequence[int] = ()) -> None:
        """Run all launches; `addresses` replace those that moved."""
        for slots, address in zip(self._slots, addresses, strict=True):
            self._numbers[slots] = address
        self._counters.fill(0)
        self._run(self._args, self._team, self._team)


def _address(function: Any) -> int:
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return address
