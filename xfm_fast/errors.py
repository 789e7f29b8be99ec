"""Errors of the public API. Each message names the thing, its value and the remedy.

The command line prints an `XFMError` in one line and exits with code 2; a bug exits with code 70.
"""

from collections.abc import Iterator
from contextlib import contextmanager


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
    """Around imports of an optional package: the error of a missing one names the extra that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UnavailableError(f"{error.name} is not installed; pip install 'xfm-fast[{extra}]'") from None
