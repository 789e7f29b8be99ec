"""Start the TensorRT libraries and read their errors, for builders and runtimes alike."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from xfm_fast.errors import UnavailableError

_log = logging.getLogger(__name__)


def message_logger(trt: Any, errors: list[str]) -> Any:
    """Return an `ILogger` that forwards to the Python log and appends errors to a list."""
    serious = (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR)

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity in serious:
                errors.append(msg)
            level = logging.INFO if severity == trt.ILogger.WARNING else logging.DEBUG
            _log.log(level, "%s", msg)

    return Logger()


def start(title: str, factory: Callable[[Any], Any], logger: Any, errors: Sequence[str]) -> Any:
    """Start a builder or runtime of a library; raises `UnavailableError` if it does not start."""
    try:
        handle = factory(logger)
    except TypeError as error:
        handle, errors = None, [*errors, str(error)]
    if not handle:
        raise UnavailableError(
            f"{title} could not start ({first_error(errors)}); see that its CUDA libraries and the driver fit each "
            "other"
        )
    return handle


def first_error(errors: Sequence[str]) -> str:
    """Return the first error on one line."""
    return " ".join(errors[0].split()) if errors else "it gives no reason"


def local_capability() -> int | None:
    """Return the compute capability of this machine's NVIDIA GPU, 89 for 8.9; None without a GPU."""
    import torch

    if not torch.cuda.is_available() or torch.version.cuda is None:
        return None
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor
