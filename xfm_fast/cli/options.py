"""Shared options, and how config fields become options."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, TypeVar, get_args, get_origin

from cyclopts import App, Group, Parameter

from xfm_fast.errors import InputError
from xfm_fast.loading import Weights

UNFINISHED = 75
"""Exit code of interrupted work (EX_TEMPFAIL): the same command resumes it."""

T = TypeVar("T")
S = TypeVar("S", bound=Weights)
Flat = Annotated[T, Parameter(name="*")]
"""A command parameter with its fields as options: `options: Flat[CheckOptions]`."""

Json = Annotated[bool, Parameter(name="--json", help="Print JSON instead of tables.")]
Model = Annotated[
    str | None,
    Parameter(
        name="MODEL",
        help="A run, a folder of weights, a name on the Hugging Face Hub, an official checkpoint file, or an export; "
        "the same as --model.",
    ),
]

MEASURE, TRAIN, SEARCH, DATA, SERVE = (
    Group.create_ordered(name)
    for name in ("Measure", "Train", "Search", "Data and checkpoints", "Export and serve")
)
"""Command groups in the help."""
OPTIONS = Group("Options")


def command_group(name: str, **settings: Any) -> App:
    """Create a group of commands, with the common help style."""
    return App(name=name, group_parameters=OPTIONS, version_flags=(), **settings)


def named(model: str | None, source: S) -> S:
    """Set the positional MODEL as the source's model; InputError unless one model is given."""
    if model is not None and source.model is not None:
        raise InputError(f"{model} and --model {source.model} name two models; give one")
    source = source if model is None else replace(source, model=model)
    source.check()
    return source


def mentions(hint: Any, sought: type) -> bool:
    """Return whether a type hint is or contains a type: `tuple[int, ...] | None` mentions int."""
    if hint is sought or get_origin(hint) is sought:
        return True
    return any(mentions(argument, sought) for argument in get_args(hint))


def shown(default: Any) -> str | None:
    """Format a default for the help, or omit it by None if it says nothing."""
    if isinstance(default, bool) or default in (None, "", (), []):
        return None
    return ",".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
