"""Errors of the public API, whose messages name the thing, its value and the remedy.

The command line prints an `XFMError` in one line and exits with code 2; a bug exits with code 70.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, TypeVar, get_type_hints

F = TypeVar("F", bound=Callable[..., Any])


class XFMError(Exception):
    """Base of all errors that a user can cause and fix."""


class ConfigError(XFMError, ValueError):
    """A configuration that does not describe a valid model."""


class InputError(XFMError, ValueError):
    """An argument whose type, shape, dtype or values the function does not accept."""


class CheckpointError(XFMError, RuntimeError):
    """A checkpoint that is truncated, unsafe to load, or made for another model."""


class DataError(XFMError, ValueError):
    """An image, caption or data file that cannot be used."""


class StorageError(XFMError, OSError):
    """A result that could not be written. No partial file is left."""


class UnavailableError(XFMError, RuntimeError):
    """An explicitly requested feature that this machine or installation does not offer."""


class NonFiniteError(XFMError, ArithmeticError):
    """A NaN or infinite loss or gradient in a training step."""


class ExportError(XFMError, RuntimeError):
    """An export that is incomplete, edited, made for another machine, or not possible."""


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Convert the error of a missing optional package to one that names the extra to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UnavailableError(
            f"{error.name} is not installed; in the checkout of xfm-fast: pip install '.[{extra}]'"
        ) from None


def explain_types(function: F) -> F:
    """Decorate a function to raise an `InputError` that names the argument whose type caused an exception.

    Annotations are compared with the arguments only after an exception: a correct call pays for one
    `try`.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except XFMError:
            raise
        except (TypeError, AttributeError, ValueError, LookupError, RuntimeError) as error:
            problem = wrong_argument(function, args, kwargs)
            if problem is None:
                raise
            raise InputError(problem) from error

    return call  # type: ignore[return-value]


def wrong_argument(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    """Describe the first argument that does not fit its annotation; None if all fit or cannot be checked."""
    from pydantic import TypeAdapter, ValidationError

    signature, names = inspect.signature(function), vars(sys.modules[function.__module__])
    try:
        arguments = signature.bind_partial(*args, **kwargs).arguments
    except TypeError:
        return None
    for name, value in arguments.items():
        annotation = signature.parameters[name].annotation
        if annotation is inspect.Parameter.empty:
            continue
        try:
            hint = get_type_hints(SimpleNamespace(__annotations__={name: annotation}), names)[name]
            # Within a tuple, since pydantic refuses a configuration beside that of a model.
            wrapped: Any = tuple.__class_getitem__(hint)
            adapter = TypeAdapter(wrapped, config={"arbitrary_types_allowed": True})
            adapter.validate_python((value,), strict=True)
        except ValidationError:
            line = (repr(value).splitlines() or [""])[0][:60]
            return f"{name} is {line} ({type(value).__name__}); give {annotation}"
        except Exception:
            # The annotation is imported for type checkers only, or pydantic cannot check it.
            continue
    return None
