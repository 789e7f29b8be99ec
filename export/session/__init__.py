"""Sessions: exported graphs under the names of the model, how their work is divided, and what they cost."""

from . import tasks as tasks  # enters the sessions of tasks
from .session import Session, SessionMemory

__all__ = ["Session", "SessionMemory"]
