"""Every way a request can be refused, and what HTTP says about it.

EspalierError
├── InvalidRequest        400  the request itself is wrong; the message says how to mend it
│   ├── ContextTooLong    400  never fits: prompt and answer exceed the context or the KV cache
│   └── UnknownLevel      400  not on the menu
├── UnknownModel          404
├── UnknownPath           404  no such route; the message lists those that exist
├── LastModel             409  a server keeps one model
├── SlowRequest           408  its body did not come in time
├── PayloadTooLarge       413  body, image bytes, pixels or number of images
├── UnsupportedMedia      415  not a picture of a known format, or an unknown Content-Encoding
├── InvalidApiKey         401  no key, or one that there is not
├── NotAllowed            403
│   ├── AdminOnly         403  changing what is served takes an admin key
│   ├── LevelNotAllowed   403  the key may not ask for this level
│   └── OriginNotAllowed  403  a web page of another origin
├── HostNotAllowed        421  the Host header is not one of this server's
├── Overloaded            429  not now: the queue is full; carries retry_after seconds
│   ├── RateLimited       429  the key has asked too often
│   └── DeadlineMissed    429  it would be too late for the deadline that its headers set, or is
├── ShuttingDown          503  the server is draining
├── NotReady              503  a probe's answer: the weights are loading, or the engine is gone
└── EngineFailure         500  this request failed; others go on
"""

from __future__ import annotations

from math import ceil
from typing import Any


class EspalierError(Exception):
    """Base of all refusals. `param` is the request field at fault, `code` a stable machine-readable reason."""

    status = 500
    type = "server_error"
    code: str | None = None
    retry_after: float | None = None
    """Seconds after which the same request may succeed; None when it never will."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.code

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """When to come back: in whole seconds for everybody, in milliseconds for OpenAI's clients, which ask for these first."""
        if self.retry_after is None:
            return {}
        return {"Retry-After": str(max(1, ceil(self.retry_after))), "retry-after-ms": str(ceil(self.retry_after * 1000))}


class InvalidRequest(EspalierError):
    status, type = 400, "invalid_request_error"


class ContextTooLong(InvalidRequest):
    code = "context_length_exceeded"

    @classmethod
    def of(cls, tokens: int | str, context: int, param: str) -> ContextTooLong:
        """In OpenAI's words, by which clients know what to cut."""
        return cls(
            f"This model's maximum context length is {context} tokens. However, your {param} resulted in {tokens} tokens. "
            "Please send a shorter question, fewer turns or fewer images.", param=param,
        )  # fmt: skip


class UnknownLevel(InvalidRequest):
    code = "unknown_pruning_level"


class InvalidApiKey(EspalierError):
    status, type, code = 401, "authentication_error", "invalid_api_key"

    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class NotAllowed(EspalierError):
    status, type, code = 403, "permission_error", "not_allowed"


class AdminOnly(NotAllowed):
    code = "admin_key_needed"


class LevelNotAllowed(NotAllowed):
    code = "level_not_allowed"


class OriginNotAllowed(NotAllowed):
    code = "origin_not_allowed"


class HostNotAllowed(EspalierError):
    status, type, code = 421, "invalid_request_error", "host_not_allowed"


class UnknownModel(EspalierError):
    status, type, code = 404, "invalid_request_error", "model_not_found"


class UnknownPath(EspalierError):
    status, type, code = 404, "invalid_request_error", "not_found"


class LastModel(EspalierError):
    status, type, code = 409, "invalid_request_error", "last_model"


class SlowRequest(EspalierError):
    status, type, code = 408, "invalid_request_error", "request_timeout"


class PayloadTooLarge(EspalierError):
    status, type, code = 413, "invalid_request_error", "payload_too_large"


class UnsupportedMedia(EspalierError):
    status, type, code = 415, "invalid_request_error", "unsupported_media"


class Overloaded(EspalierError):
    status, type, code = 429, "rate_limit_error", "overloaded"

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RateLimited(Overloaded):
    code = "rate_limit_exceeded"


class DeadlineMissed(Overloaded):
    code = "deadline_missed"


class ShuttingDown(EspalierError):
    status, type, code = 503, "server_error", "shutting_down"
    retry_after = 1.0


class NotReady(EspalierError):
    status, type, code = 503, "server_error", "not_ready"
    retry_after = 1.0


class EngineFailure(EspalierError):
    code = "engine_failure"


def rejection_reasons() -> set[str]:
    """What a refused request is counted by: its code, or its type if it has none."""
    kinds: list[type[EspalierError]] = [EspalierError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    return {"invalid_image", *(kind.code or kind.type for kind in kinds if kind.status != 500)}
