"""Options of the command line that take one of several words."""

from __future__ import annotations

from typing import Any

from xfm_fast.errors import UnavailableError

PRESETS = ("base", "tiny")


def choice(name: str, value: str, choices: tuple[str, ...]) -> Any:
    """The value, if it is one of the choices.

    Raises:
        UnavailableError: it is not; names them.
    """
    if value not in choices:
        raise UnavailableError(f"{name} {value!r} is unknown; choose one of {', '.join(choices)}")
    return value
