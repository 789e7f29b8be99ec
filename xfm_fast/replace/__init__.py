"""Fused modules for models that others wrote: swapped in on a live instance, verified, and taken out again."""

from xfm_fast.replace.accelerating import accelerate, accelerated
from xfm_fast.replace.huggingface_attention import register_attention
from xfm_fast.replace.report import Entry, Report
from xfm_fast.replace.rerank import Reranker
from xfm_fast.replace.rules import Rule
from xfm_fast.replace.swapping import Fused

__all__ = ["Entry", "Fused", "Report", "Reranker", "Rule", "accelerate", "accelerated", "register_attention"]
