"""The errors of this package, and how each looks to an HTTP client.

AlchemistError
├── UserError                  the request is at fault; also a ValueError
│   ├── InvalidRequest         422  a field has a wrong type or value
│   ├── NotFound               404  no such object; also a LookupError
│   ├── MethodNotAllowed       405
│   ├── Conflict               409  the object's state does not allow it
│   ├── TooLarge               413
│   ├── UnsupportedMedia       415
│   ├── Unauthorized           401  no key, or a wrong one
│   └── Forbidden              403  the key, if any, does not open this route
├── LedgerError                the data directory
│   ├── LedgerUnavailable      503  cannot be read or written now; also an OSError
│   │   └── LedgerFull         507  no space left
│   ├── LedgerLocked           503  another server has it
│   └── LedgerCorrupt          500  not a ledger, damaged, or from a newer release
├── LaunchError                not over HTTP: a reason not to start, told to the user in one line
├── EngineFailed               not over HTTP: SGLang did not start
└── Unavailable                503  a part of the server is not ready; also a RuntimeError

A client gets OpenAI's envelope `{"error": {"message", "type", "param", "code"}}` and never a stack trace.
"""

from __future__ import annotations

from typing import Any


class AlchemistError(Exception):
    """Base of the tree.

    Args:
        message: one sentence for the person who caused or meets it.
        param: the field at fault, if one is.
        code: a word for programs; the class has a default.
    """

    status = 500
    type = "server_error"
    default_code: str | None = None

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param, code)
        self.message = message
        self.param = param
        self.code = code or self.default_code

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.param, self.code)

    def envelope(self) -> dict[str, Any]:
        return envelope(self.status, self.message, self.param, self.code, self.type)


class UserError(AlchemistError, ValueError):
    status = 400
    type = "invalid_request_error"


class InvalidRequest(UserError):
    status = 422
    default_code = "invalid_value"


class NotFound(UserError, LookupError):
    status = 404
    default_code = "not_found"


class Conflict(UserError):
    status = 409
    default_code = "conflict"


class TooLarge(UserError):
    status = 413
    default_code = "body_too_large"


class UnsupportedMedia(UserError):
    status = 415
    default_code = "unsupported_media_type"


class Unauthorized(UserError):
    status = 401
    type = "authentication_error"
    default_code = "invalid_api_key"


class Forbidden(UserError):
    status = 403
    type = "permission_error"
    default_code = "forbidden"


class LedgerError(AlchemistError):
    default_code = "ledger_error"


class LedgerUnavailable(LedgerError, OSError):
    status = 503
    default_code = "ledger_unavailable"


class LedgerFull(LedgerUnavailable):
    status = 507
    default_code = "ledger_full"


class LedgerLocked(LedgerError):
    status = 503
    default_code = "ledger_locked"


class LedgerCorrupt(LedgerError):
    default_code = "ledger_corrupt"


class LaunchError(AlchemistError):
    pass


class EngineFailed(AlchemistError):
    pass


class Unavailable(AlchemistError, RuntimeError):
    status = 503
    default_code = "unavailable"


def envelope(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    type: str | None = None,
) -> dict[str, Any]:
    """OpenAI's error object; `type` follows from `status` unless given."""
    kind = type or ("server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
