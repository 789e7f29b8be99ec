"""Memory of this process: what it holds, and the most that it held meanwhile."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil


def resident_bytes() -> int:
    """Resident memory of this process."""
    return psutil.Process().memory_info().rss


class PeakMemory:
    """The most resident memory inside the block, `peak`, in bytes, and that at its begin, `start`.

    The kernel's own high-water mark is reset and read where the system allows it (Linux); elsewhere a thread looks
    every few milliseconds, which can miss a short peak. `method` says which.
    """

    def __enter__(self) -> Self:
        self.start = self.peak = resident_bytes()
        self.method = "high-water mark"
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self.method = "sampled"
            self._stop = threading.Event()
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.004):
            self.peak = max(self.peak, resident_bytes())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.method == "sampled":
            self._stop.set()
            self._thread.join()
            self.peak = max(self.peak, resident_bytes())
        else:
            self.peak = max(self.start, _high_water_mark())


def _high_water_mark() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
