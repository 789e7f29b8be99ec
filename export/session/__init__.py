"""Sessions: exported graphs under the names of the model."""

from .session import Session, SessionMemory

__all__ = ["Session", "SessionMemory"]
