"""The rules by which foreign modules are recognised, and where they are kept."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module

from torch import nn

from xfm_fast.replace.settings import Settings
from xfm_fast.replace.swapping import Fused

# Families in the order in which they are asked; each module has a tuple RULES. The package named second must be
# imported already for the family to be looked at: no model of it can exist otherwise.
_FAMILIES = (
    ("xfm_fast.replace.huggingface_text", "transformers"),
    ("xfm_fast.replace.huggingface_vision", "transformers"),
    ("xfm_fast.replace.huggingface_heads", "transformers"),
    ("xfm_fast.replace.timm_vision", "timm"),
    ("xfm_fast.replace.official", None),
    ("xfm_fast.replace.official_vocabulary", None),
    ("xfm_fast.replace.torch_modules", None),
)


def accepted(module: nn.Module, settings: Settings) -> str | None:
    """A rule's `refusal` that refuses nothing."""
    return None


@dataclass(frozen=True)
class Rule:
    """One kind of foreign module and its fused form.

    Attributes:
        name: what the fused form is called in the report.
        recognises: whether a module is of the kind, by class or by structure.
        fused: the fused form.
        gain: what is saved, in a few words.
        refusal: why a module of the kind must stay as it is; None if it need not.
    """

    name: str
    recognises: Callable[[nn.Module], bool]
    fused: type[Fused]
    gain: str
    refusal: Callable[[nn.Module, Settings], str | None] = accepted


def rules() -> tuple[Rule, ...]:
    """All rules whose packages are in use."""
    return tuple(rule for name, package in _FAMILIES if package is None or package in sys.modules for rule in _of(name))


@cache
def _of(family: str) -> tuple[Rule, ...]:
    return import_module(family).RULES
