"""Configurations of the official code as recipes: its keys are translated, and one that is not known is named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xfm_fast.errors import ConfigError


def is_official(values: Mapping[str, Any]) -> bool:
    """True of a mapping with the sections of the official YAML files."""
    return "schedular" in values or "train_file" in values


def from_official(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The values of a recipe.

    Raises:
        ConfigError: keys that have no meaning here, or a task that cannot be told.
    """
    raise ConfigError(f"{name} is a configuration of the official code; it cannot be read yet")
