"""The HTML report: one self-contained page with charts as inline SVG, readable in light and dark, on any screen."""

from __future__ import annotations

from typing import Any

from xfm_fast.benchmarks.page import drop_in, kernels, scenarios, suite
from xfm_fast.benchmarks.stored import benchmark


def render(content: dict[str, Any]) -> str:
    """The page of a results document, of whichever benchmark."""
    kind = benchmark(content)
    if kind == "drop-in":
        return drop_in.render(content)
    if kind == "kernels":
        return kernels.render(content)
    return scenarios.render(content) if content["schema_version"] == 2 else suite.render(content)
