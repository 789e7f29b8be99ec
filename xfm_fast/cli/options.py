"""The options that commands share, and how the fields of a config become options."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar, get_args, get_origin

from cyclopts import App, Group, Parameter

UNFINISHED = 75
"""Exit code of work that stopped half way (EX_TEMPFAIL): the same command goes on from there."""

T = TypeVar("T")
Flat = Annotated[T, Parameter(name="*")]
"""A parameter of a command whose fields are options of their own: `options: Flat[CheckOptions]`."""

Json = Annotated[bool, Parameter(name="--json", help="Print JSON instead of tables.")]

MEASURE, TRAIN, SEARCH, DATA, SERVE = (
    Group.create_ordered(name) for name in ("Measure", "Train", "Search", "Data and checkpoints", "Export and serve")
)
"""The groups of the commands in help."""
OPTIONS = Group("Options")


def command_group(name: str, **settings: Any) -> App:
    """A group of commands, whose help looks like that of the others."""
    return App(name=name, group_parameters=OPTIONS, version_flags=(), **settings)


def mentions(hint: Any, kind: type) -> bool:
    """True of a type, of containers of it, and of both with None or annotations: `tuple[int, ...] | None` and int."""
    return hint is kind or get_origin(hint) is kind or any(mentions(part, kind) for part in get_args(hint))


def shown(default: Any) -> str | None:
    """A default as help shows it; one that says nothing is left out."""
    if isinstance(default, bool) or default in (None, "", (), []):
        return None
    return ",".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
