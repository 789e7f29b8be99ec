"""Fused modules for third-party models: swapped in on a live instance, verified, and reverted."""

import warnings
from typing import Any

from xfm_fast.replace.acceleration import accelerate, accelerated
from xfm_fast.replace.attention import register_attention
from xfm_fast.replace.layer import LayerSpec, Mlp, register
from xfm_fast.replace.report import Entry, Report
from xfm_fast.replace.rerank import Reranker
from xfm_fast.replace.swap import Fused

__all__ = [
    "Entry",
    "Fused",
    "LayerSpec",
    "Mlp",
    "Report",
    "Reranker",
    "accelerate",
    "accelerated",
    "register",
    "register_attention",
]

_RETIRED = {"Expectation": "share and speedup of a report", "Rule": "register(LayerSpec(...))"}


def __getattr__(name: str) -> Any:
    if name == "Family":
        warnings.warn("xfm_fast.replace.Family is now LayerSpec", DeprecationWarning, stacklevel=2)
        return LayerSpec
    if name in _RETIRED:
        raise AttributeError(f"{__name__}.{name} is retired; use {_RETIRED[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
