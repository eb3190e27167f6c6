"""Errors on the wire: one object, one table of statuses, and hints to the client on whether to try again.

The shape is `{"error": {"message", "type", "param", "code"}}`, as the OpenAI clients read it. Text of an unexpected
exception never reaches a client; it is logged under the request's id.
"""

from collections.abc import Mapping

import msgspec
from aiohttp import web

from millrace.runtime.errors import MillraceError

RETRY_AFTER_S = {429: 1, 503: 2}  # the official clients wait this long before they try again

# Statuses that the official clients retry by themselves, although a retry of these would only repeat the work.
_FUTILE = {"internal_error", "deadline_exceeded"}

_TYPES = {403: "permission_error", 408: "timeout", 429: "rate_limit_error"}


class HttpError(Exception):
    """An answer other than 200, decided by the server itself rather than by the runtime."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.headers = dict(headers or {})
        self.close = close  # the connection cannot be used again: the rest of the request was not read


class BadRequest(HttpError):
    """400: a value that sending again unchanged cannot help; `param` names the field."""

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(400, code, message, param=param)


def error_type(status: int) -> str:
    return _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")


def error_object(error: HttpError | MillraceError) -> dict[str, dict[str, str | None]]:
    """The body that describes an error, in a response, a stream or a WebSocket frame."""
    status = error.status if isinstance(error, HttpError) else error.http_status
    return {
        "error": {"message": error.message, "type": error_type(status), "param": error.param, "code": error.code},
    }


def error_response(error: HttpError | MillraceError) -> web.Response:
    if isinstance(error, HttpError):
        status, headers = error.status, error.headers
    else:
        status, headers = error.http_status, {}
    if status in RETRY_AFTER_S:
        headers.setdefault("Retry-After", str(RETRY_AFTER_S[status]))
    if error.code in _FUTILE:
        headers["x-should-retry"] = "false"
    response = web.Response(
        status=status, body=msgspec.json.encode(error_object(error)), content_type="application/json", headers=headers
    )
    if isinstance(error, HttpError) and error.close:
        response.force_close()
    return response


def internal_error() -> HttpError:
    """What a client may know of an exception that nobody expected."""
    return HttpError(500, "internal_error", "the server failed on this request; its log has the cause by x-request-id")
