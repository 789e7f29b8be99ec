"""Comparison of 32-bit words all over memory, whose loads overlap: a library would take an operation per tensor."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from . import Level, levels
from .builder import INT32, INT64, POINTER, Builder, kernel


class _Gather:
    """Writes a kernel that reads words by their addresses: to `values`, or to compare them with these."""

    name = "words"

    def __init__(self, compares: bool, level: Level) -> None:
        self.compares = compares
        self.b = Builder(self.name, ("places", "values", "result"), ("count",), level)
        self.b.tasks(self._all)

    def _all(self, task: Any, thread: Any) -> None:
        b, given = self.b, self.b.given

        def word(i: Any, *others: Any) -> list[Any]:
            place = b.load(b.at(given["places"], i, INT64), typ=POINTER)
            found, kept = b.load(place, align=1, typ=INT32), b.at(given["values"], i, INT32)
            if self.compares:
                return [b.or_(other, b.xor(found, b.load(kept, typ=INT32))) for other in others]
            b.store(found, kept)
            return list(others)

        (differing,) = b.loop(0, given["count"], 1, word, INT32(0))
        b.store(differing, given["result"])


class Words:
    """The words at some addresses, as they were when this was made."""

    def __init__(self, places: np.ndarray) -> None:
        self._places, self._values = (
            np.ascontiguousarray(places, np.int64),
            np.empty(len(places), np.int32),
        )
        self._given = (self._places.ctypes.data, self._values.ctypes.data)
        self._compare = kernel(_Gather, True, levels()[0])
        result = ctypes.c_int32()
        kernel(_Gather, False, levels()[0])._run(
            (*self._given, ctypes.addressof(result), len(places)), 1, 1
        )

    def unchanged(self) -> bool:
        """True if all are the same. The memory must be the one that it was made for."""
        result = ctypes.c_int32()
        # No operation of a model, which a profiler would count.
        self._compare._run((*self._given, ctypes.addressof(result), len(self._places)), 1, 1)
        return result.value == 0
