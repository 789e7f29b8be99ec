"""What a client is told when a request cannot be answered: a status and a sentence."""

from __future__ import annotations

from typing import Any

from xfm_fast.errors import DataError, InputError, UnavailableError, XFMError

# As OpenAI's API calls them; clients choose their exceptions by status.
_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "unavailable_error",
    504: "timeout_error",
}


class Problem(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: names the thing, its value and the remedy.
        headers: of the answer.
    """

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers or {}

    @classmethod
    def of(cls, error: XFMError) -> Problem:
        """The answer to a request that an error of ours was raised for: 422 where the client can mend it."""
        return cls(422 if isinstance(error, DataError | InputError | UnavailableError) else 500, str(error))

    @classmethod
    def late(cls, seconds: float) -> Problem:
        """The answer to a request that took more than these seconds."""
        return cls(504, f"there was no answer within {seconds:g} s; ask for less, or later", {"retry-after": "5"})

    def content(self) -> dict[str, Any]:
        """The answer as OpenAI's API gives it, and with `message` for clients of Cohere's."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": None, "code": self.status}
        return {"error": error, "message": self.message}
