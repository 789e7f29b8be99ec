"""Fused modules for third-party models: swapped in on a live instance, verified, and reverted."""

from xfm_fast.replace.acceleration import Entry, Report, accelerate, accelerated
from xfm_fast.replace.attention_interface import register_attention
from xfm_fast.replace.expectation import Expectation
from xfm_fast.replace.families import Family, Mlp, register
from xfm_fast.replace.rerank import Reranker
from xfm_fast.replace.swap import Fused, Rule

__all__ = [
    "Entry",
    "Expectation",
    "Family",
    "Fused",
    "Mlp",
    "Report",
    "Reranker",
    "Rule",
    "accelerate",
    "accelerated",
    "register",
    "register_attention",
]
