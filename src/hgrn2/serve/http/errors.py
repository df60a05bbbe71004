"""Errors as objects of OpenAI's interface."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hgrn2.errors import UserError

# status of an error by its code; the rest is 400
_STATUS = {"not-found": 404, "unavailable": 503, "not-finite": 500, "unwritable": 507}
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error that a client receives.

    Args:
        status: status of HTTP.
        message: message for people.
        code: kind of error for programs.
        param: the parameter at fault.
        headers: further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def api_error(error: UserError, param: str | None = None) -> ApiError:
    """Return the error that a client receives for a UserError.

    Args:
        error: the error.
        param: the parameter at fault.
    """
    return ApiError(_STATUS.get(error.code, 400), str(error), error.code, param)
