"""Error responses of the service."""

from __future__ import annotations

from fastapi import HTTPException
from fastapi.responses import JSONResponse

from xfm_fast.errors import DataError, InputError, UnavailableError, XFMError

# The types of OpenAI's API; clients choose their exceptions by status.
_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "unavailable_error",
    504: "timeout_error",
}


class Problem(HTTPException):
    """An error response: status, and a detail that names the thing, its value and the remedy."""

    @classmethod
    def of(cls, error: XFMError) -> Problem:
        """The response to an error of ours: 422 where the client can mend it, else 500."""
        return cls(422 if isinstance(error, DataError | InputError | UnavailableError) else 500, str(error))

    @classmethod
    def late(cls, seconds: float) -> Problem:
        """The response to a request that took more than these seconds."""
        return cls(504, f"there was no answer within {seconds:g} s; ask for less, or later", {"retry-after": "5"})

    def response(self) -> JSONResponse:
        """The error in the format of OpenAI's API, and with `message` for Cohere's clients."""
        kind = _TYPES.get(self.status_code, "invalid_request_error")
        error = {"message": self.detail, "type": kind, "param": None, "code": self.status_code}
        return JSONResponse({"error": error, "message": self.detail}, self.status_code, self.headers)
