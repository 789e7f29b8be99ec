"""Fused modules for third-party models: swapped in on a live instance, verified, and reverted."""

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
