"""The exceptions of the package: one class for each kind of error, which says who can mend it."""

from __future__ import annotations

from typing import Any


class SiderealError(Exception):
    """Any error of the engine.

    `code` is a short stable name (`unknown_item`, `history_too_long`, ...), `kind` says who can mend
    it, and `retry_after_ms` when the request may come again, where that can be said.
    """

    def __init__(
        self,
        message: str,
        code: str = "internal",
        kind: str = "internal",
        retry_after_ms: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.kind = kind
        self.retry_after_ms = retry_after_ms

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.code, self.kind, self.retry_after_ms)


class CallerError(SiderealError, ValueError):
    """Change the request, the change or the option."""


class FilesError(SiderealError):
    """Repair or replace the files of model or catalog."""


class OverloadedError(SiderealError):
    """Send the request again later, or to another machine."""


class DeadlineExceededError(OverloadedError, TimeoutError):
    """The answer could not be there within the request's deadline."""


class CancelledError(SiderealError):
    """The request was cancelled."""


class DeviceError(SiderealError):
    """The device is missing, lost or out of memory."""


class InternalError(SiderealError):
    """Report this to the authors of Sidereal or of the model."""


_BY_CODE = {"deadline_exceeded": DeadlineExceededError, "cancelled": CancelledError}
_BY_KIND = {
    "caller": CallerError,
    "files": FilesError,
    "overloaded": OverloadedError,
    "device": DeviceError,
    "internal": InternalError,
}


def from_body(body: dict[str, Any]) -> SiderealError:
    """The exception that an error's JSON stands for."""
    code, kind = body["code"], body.get("kind", "internal")
    cls = _BY_CODE.get(code) or _BY_KIND.get(kind, SiderealError)
    return cls(body["message"], code, kind, body.get("retry_after_ms"))
