"""Shared options, and how config fields become options."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar, get_args, get_origin

from cyclopts import App, Group, Parameter

UNFINISHED = 75
"""Exit code of interrupted work (EX_TEMPFAIL): the same command resumes it."""

T = TypeVar("T")
Flat = Annotated[T, Parameter(name="*")]
"""A command parameter with its fields as options: `options: Flat[CheckOptions]`."""

Json = Annotated[bool, Parameter(name="--json", help="Print JSON instead of tables.")]

MEASURE, TRAIN, SEARCH, DATA, SERVE = (
    Group.create_ordered(name) for name in ("Measure", "Train", "Search", "Data and checkpoints", "Export and serve")
)
"""Command groups in the help."""
OPTIONS = Group("Options")


def command_group(name: str, **settings: Any) -> App:
    """A group of commands, with the common help style."""
    return App(name=name, group_parameters=OPTIONS, version_flags=(), **settings)


def mentions(hint: Any, kind: type) -> bool:
    """True if a type hint is or contains `kind`: `tuple[int, ...] | None` mentions int."""
    return hint is kind or get_origin(hint) is kind or any(mentions(part, kind) for part in get_args(hint))


def shown(default: Any) -> str | None:
    """Format a default for the help; uninformative ones are omitted."""
    if isinstance(default, bool) or default in (None, "", (), []):
        return None
    return ",".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
