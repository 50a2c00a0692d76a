"""The errors of the API in OpenAI's form, and which of them stands for an error of fedsplit."""

from typing import Any

from fedsplit.errors import FedsplitError

_RETRY_S = 1

_STATUS = {
    "CONFIG": 400,
    "DATA": 400,
    "TOO_LARGE": 400,
    "CONN_LOST": 503,
    "DEADLINE": 503,
    "DRAINING": 503,
    "MODEL_MISMATCH": 503,
    "OVERLOADED": 503,
    "TLS_FAILED": 503,
    "TRUNK_GONE": 503,
    "UNAUTHENTICATED": 503,
}
"""The HTTP status of an error of fedsplit by its code. With 503, the trunk cannot be used now."""

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}
"""The types of errors by their HTTP status; those of other states are mistakes of the caller."""


class Refusal(Exception):  # noqa: N818  # it is an answer
    """An answer with an HTTP error; it is no error of fedsplit, and never retried here.

    Args:
        status: The HTTP status.
        message: One line: what was wrong, what was found, what to do.
        code: The code for programs.
        param: The field of the request that is to blame; empty if it is none.
    """

    def __init__(self, status: int, message: str, *, code: str, param: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param

    @property
    def body(self) -> dict[str, Any]:
        """The answer's body."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        error = {"message": str(self), "type": kind, "param": self.param or None, "code": self.code}
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        """The answer's headers: when to try again, and how to authenticate."""
        if self.status in (429, 503):
            return {"Retry-After": str(_RETRY_S)}
        return {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}


def refusal_of(error: FedsplitError) -> Refusal:
    """Return the answer that stands for an error of fedsplit."""
    return Refusal(_STATUS.get(error.code, 500), str(error), code=error.code.lower())
