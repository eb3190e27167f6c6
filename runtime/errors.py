"""Every error that a user of Millrace can meet: typed, each with a stable code and the HTTP status that it maps to.

An error that belongs to one request crosses channels as an `ErrorInfo` (plain data) and becomes an exception again
where the request's owner reads it, by `ErrorInfo.exception()`.
"""

from typing import ClassVar

import msgspec


class MillraceError(Exception):
    """Base of all our errors.

    Attributes:
        code: stable, machine-readable name of the kind of error.
        http_status: the status that the server answers with.
        param: the request field or option at fault, where one can be named.
    """

    code: ClassVar[str] = "internal_error"
    http_status: ClassVar[int] = 500

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def info(self) -> "ErrorInfo":
        return ErrorInfo(code=self.code, message=self.message, param=self.param)


class ConfigError(MillraceError):
    """An option is unknown, out of range, or contradicts another one."""

    code = "invalid_config"
    http_status = 400


class CheckpointError(MillraceError):
    """A checkpoint cannot be used: missing file, unknown architecture, unexpected or missing weight."""

    code = "invalid_checkpoint"
    http_status = 400


class InvalidRequestError(MillraceError):
    """The request itself is wrong; sending it again unchanged cannot help."""

    code = "invalid_value"
    http_status = 400


class ContextLengthError(InvalidRequestError):
    """Prompt and requested output do not fit into the model's context or the KV cache."""

    code = "context_length_exceeded"


class ModelNotFoundError(MillraceError):
    code = "model_not_found"
    http_status = 404


class QueueFullError(MillraceError):
    """The bounded queue is full; try again later."""

    code = "queue_full"
    http_status = 429


class DeadlineExceededError(MillraceError):
    """The request's deadline passed before it finished."""

    code = "deadline_exceeded"
    http_status = 408


class RequestCancelledError(MillraceError):
    """The request was cancelled by its owner."""

    code = "request_cancelled"
    http_status = 499


class RequestFailedError(MillraceError):
    """The engine failed while it computed this request; others are not touched."""

    code = "request_failed"
    http_status = 500


class RuntimeClosedError(MillraceError):
    """The runtime is closed, draining, or has failed."""

    code = "runtime_closed"
    http_status = 503


_BY_CODE: dict[str, type[MillraceError]] = {
    error.code: error
    for error in (
        MillraceError,
        ConfigError,
        CheckpointError,
        InvalidRequestError,
        ContextLengthError,
        ModelNotFoundError,
        QueueFullError,
        DeadlineExceededError,
        RequestCancelledError,
        RequestFailedError,
        RuntimeClosedError,
    )
}


class ErrorInfo(msgspec.Struct, frozen=True):
    """An error as data, fit for a channel or a process border."""

    code: str
    message: str
    param: str | None = None

    def exception(self) -> MillraceError:
        return _BY_CODE.get(self.code, MillraceError)(self.message, param=self.param)
