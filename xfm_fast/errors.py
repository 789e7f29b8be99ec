"""The errors that xfm-fast raises on purpose: each names the thing, its value and the remedy.

The command line turns every `XFMError` into one line and exit code 2, and a bug into one and exit code 70.
"""


class XFMError(Exception):
    """Base of all errors that a user can cause and mend."""


class ConfigError(XFMError, ValueError):
    """A configuration that cannot describe a model."""


class InputError(XFMError, ValueError):
    """A tensor whose shape, dtype or content the called function cannot accept."""


class CheckpointError(XFMError, RuntimeError):
    """A checkpoint that is truncated, unsafe to load, or made for another model."""


class DataError(XFMError, ValueError):
    """An image, caption or data file that cannot be used."""


class StorageError(XFMError, OSError):
    """A result that could not be written; nothing half-written is left behind."""


class UnavailableError(XFMError, RuntimeError):
    """A path that was asked for by name but that this machine does not offer."""


class NonFiniteError(XFMError, ArithmeticError):
    """A loss or gradient of a training step that is NaN or infinite."""


class ExportError(XFMError, RuntimeError):
    """An export that is incomplete, edited, made for another machine, or cannot be made as asked."""
