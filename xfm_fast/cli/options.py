"""The options that commands share, and how the fields of a config become options."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt
from cyclopts import App, Group, Parameter, default_name_transform

from xfm_fast.errors import UnavailableError

UNFINISHED = 75
"""Exit code of work that stopped half way (EX_TEMPFAIL): the same command goes on from there."""

T = TypeVar("T")
Flat = Annotated[T, Parameter(name="*")]
"""A parameter of a command whose fields are options of their own: `options: Flat[CheckOptions]`."""


Json = Annotated[bool, Parameter(name="--json", help="Print JSON instead of tables.")]

MEASURE, TRAIN, DATA, SERVE = (
    Group.create_ordered(name) for name in ("Measure", "Train", "Data and checkpoints", "Export and serve")
)
"""The groups of the commands in help."""
OPTIONS = Group("Options")


def command_group(name: str, **settings: Any) -> App:
    """A group of commands, whose help looks like that of the others."""
    return App(name=name, group_parameters=OPTIONS, version_flags=(), **settings)


def mentions(hint: Any, kind: type) -> bool:
    """True of a type, of containers of it, and of both with None or annotations: `tuple[int, ...] | None` and int."""
    return hint is kind or get_origin(hint) is kind or any(mentions(part, kind) for part in get_args(hint))


def check_bounds(hint: Any, value: Any) -> None:
    """Refuse a number beyond the bounds that its annotation names, such as `Annotated[int, Ge(1)]`.

    Raises:
        ValueError: it is beyond them; names the option.
    """
    if is_dataclass(value):
        for name, field_hint in get_type_hints(type(value), include_extras=True).items():
            field = getattr(value, name)
            for message in _beyond(field_hint, field):
                raise ValueError(f'Invalid value "{field}" for --{default_name_transform(name)}: it {message}.')
            check_bounds(field_hint, field)
    for message in _beyond(hint, value):
        raise ValueError(f"It {message}.")


def _beyond(hint: Any, value: Any) -> Iterator[str]:
    if isinstance(value, int | float):
        for bound in getattr(hint, "__metadata__", ()):
            match bound:
                case Ge(least) if not value >= least:
                    yield f"must be at least {least}"
                case Gt(least) if not value > least:
                    yield f"must be more than {least}"
                case Le(most) if not value <= most:
                    yield f"must be at most {most}"
                case Lt(most) if not value < most:
                    yield f"must be less than {most}"


def shown(default: Any) -> str | None:
    """A default as help shows it; one that says nothing is left out."""
    if isinstance(default, bool) or default in (None, "", (), []):
        return None
    return ",".join(map(str, default)) if isinstance(default, list | tuple) else str(default)


PRESETS = ("base", "tiny")


def choice(name: str, value: str, choices: tuple[str, ...]) -> Any:
    """The value, if it is one of the choices.

    Raises:
        UnavailableError: it is not; names them.
    """
    if value not in choices:
        raise UnavailableError(f"{name} {value!r} is unknown; choose one of {', '.join(choices)}")
    return value
