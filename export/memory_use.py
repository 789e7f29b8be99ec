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

    Where the system lets a process reset the kernel's high-water mark (Linux) that is read; elsewhere a thread looks
    every few milliseconds, which can miss a short peak.
    """

    def __enter__(self) -> Self:
        self.start = self.peak = resident_bytes()
        self._over = threading.Event()
        self._watcher: threading.Thread | None = None
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self._watcher = threading.Thread(target=self._watch, daemon=True)
            self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.004):
            self.peak = max(self.peak, resident_bytes())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watcher is None:
            status = Path("/proc/self/status").read_text()
            marks = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
            self.peak = max(self.start, *(int(mark) * 1024 for mark in marks))
            return
        self._over.set()
        self._watcher.join()
        self.peak = max(self.peak, resident_bytes())
