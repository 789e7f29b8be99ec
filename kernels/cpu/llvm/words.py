"""Change detection on scattered 32-bit words, by one kernel, where a library needs a call per tensor."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from . import Level, levels
from .builder import INT32, POINTER, Builder, kernel


class _Gather:
    """Emits a kernel that gathers words by their addresses: into `values`, or to compare them with it."""

    name = "words"

    def __init__(self, compare: bool, level: Level) -> None:
        self.compare = compare
        self.b = Builder(self.name, ("addresses", "values", "result"), ("count",), level)
        self.b.task_loop(self._gather)

    def _gather(self, task: Any, thread: Any) -> None:
        b, args = self.b, self.b.args

        def step(i: Any, difference: Any) -> list[Any]:
            address = b.load_scalar(args["addresses"], i, POINTER)
            word, value = b.load(address, align=1, typ=INT32), b.at(args["values"], i, INT32)
            if self.compare:
                return [b.or_(difference, b.xor(word, b.load(value, typ=INT32)))]
            b.store(word, value)
            return [difference]

        (difference,) = b.loop(0, args["count"], 1, step, INT32(0))
        b.store(difference, args["result"])


class Words:
    """Snapshot of the 32-bit words at some addresses."""

    def __init__(self, addresses: np.ndarray) -> None:
        self._addresses = np.ascontiguousarray(addresses, np.int64)
        self._values = np.empty(len(addresses), np.int32)
        self._compare = kernel(_Gather, True, levels()[0])
        kernel(_Gather, False, levels()[0]).run(self._args(ctypes.c_int32()), 1, 1)

    def unchanged(self) -> bool:
        """Return whether all words equal the snapshot; their memory must still be allocated."""
        result = ctypes.c_int32()
        # Without a profiler's record, as it is no operation of the model.
        self._compare.run(self._args(result), 1, 1)
        return result.value == 0

    def _args(self, result: ctypes.c_int32) -> tuple[int, ...]:
        addresses = self._addresses.ctypes.data, self._values.ctypes.data
        return *addresses, ctypes.addressof(result), len(self._addresses)
