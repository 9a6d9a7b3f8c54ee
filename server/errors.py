"""Every way a request can be refused, and what HTTP says about it.

EspalierError
├── InvalidRequest        400  the request itself is wrong; the message says how to mend it
│   ├── ContextTooLong    400  never fits: prompt and answer exceed the context or the KV cache
│   └── UnknownLevel      400  not on the menu
├── UnknownModel          404
├── PayloadTooLarge       413  body, image bytes, pixels or number of images
├── UnsupportedMedia      415  not a JPEG, PNG or WebP picture
├── Overloaded            429  not now: the queue is full; carries retry_after seconds
├── ShuttingDown          503  the server is draining
└── EngineFailure         500  this request failed; others go on
"""

from __future__ import annotations


class EspalierError(Exception):
    """Base of all refusals. `param` is the request field at fault, `code` a stable machine-readable reason."""

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.code


class InvalidRequest(EspalierError):
    status, type = 400, "invalid_request_error"


class ContextTooLong(InvalidRequest):
    code = "context_length_exceeded"


class UnknownLevel(InvalidRequest):
    code = "unknown_pruning_level"


class UnknownModel(EspalierError):
    status, type, code = 404, "invalid_request_error", "model_not_found"


class PayloadTooLarge(EspalierError):
    status, type, code = 413, "invalid_request_error", "payload_too_large"


class UnsupportedMedia(EspalierError):
    status, type, code = 415, "invalid_request_error", "unsupported_media"


class Overloaded(EspalierError):
    status, type, code = 429, "rate_limit_error", "overloaded"

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ShuttingDown(EspalierError):
    status, type, code = 503, "server_error", "shutting_down"


class EngineFailure(EspalierError):
    code = "engine_failure"
