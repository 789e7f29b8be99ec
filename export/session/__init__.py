"""Sessions: exported graphs under the names of the model."""

from . import tasks as tasks  # enters the sessions of tasks
from .session import Session, SessionMemory

__all__ = ["Session", "SessionMemory"]
