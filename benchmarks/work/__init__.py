"""The benchmarks: every module of this package registers its own."""

from __future__ import annotations

import pkgutil
from importlib import import_module

from ..measure import BENCHMARKS, Benchmark


def registered() -> dict[str, Benchmark]:
    """Import the modules of this package, and return `BENCHMARKS`."""
    for module in pkgutil.iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")
    return BENCHMARKS
