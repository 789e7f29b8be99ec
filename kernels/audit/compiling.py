"""Parallel compilation in processes of their own, with a cache of the figures.

Triton's compiler may abort: then the audit loses one compilation and replaces the process.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from queue import Queue

from ..files import cache_folder, write_whole
from .task import Figures, Task, measure, start


def compile_all(
    tasks: Iterable[Task],
    *,
    jobs: int | None = None,
    cache_dir: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Figures]:
    """`key` → figures of every task, in `jobs` processes (default: one per core).

    `progress(done, total)` counts compilations, without the cached ones.
    """
    folder = cache_folder("audit") if cache_dir is None else cache_dir
    unique = {task.key: task for task in tasks}
    results = {key: figures for key in unique if (figures := read_figures(folder / f"{key}.json")) is not None}
    missing = [task for key, task in unique.items() if key not in results]
    if not missing:
        return results
    count = min(len(missing), jobs or len(os.sched_getaffinity(0)))
    idle: Queue[ProcessPoolExecutor] = Queue()
    with tempfile.TemporaryDirectory(prefix="xfm-audit-") as scratch, ThreadPoolExecutor(count) as threads:

        def new_process() -> ProcessPoolExecutor:
            return ProcessPoolExecutor(1, get_context("spawn"), start, (scratch,))

        def run(task: Task) -> Figures:
            process = idle.get()
            try:
                return process.submit(measure, task).result()
            except BrokenProcessPool as error:
                process = new_process()
                return Figures(error=f"the compiler died: {error}")
            finally:
                idle.put(process)

        for _ in range(count):
            idle.put(new_process())
        try:
            for done, (task, figures) in enumerate(zip(missing, threads.map(run, missing), strict=True), 1):
                results[task.key] = figures
                if not figures.error:
                    write_figures(folder / f"{task.key}.json", figures)
                if progress is not None:
                    progress(done, len(missing))
        finally:
            threads.shutdown(cancel_futures=True)
            for _ in range(count):
                idle.get().shutdown()
    return results


def read_figures(path: Path) -> Figures | None:
    """The cached figures; None for an absent or damaged file."""
    try:
        return Figures(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def write_figures(path: Path, figures: Figures) -> None:
    """Write figures to the cache; atomic, since two audits may run at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(asdict(figures)).encode())
