"""What every request gets, whatever its route: an id, a bounded body, and an answer when something breaks."""

from __future__ import annotations

import asyncio
import logging
import re
import zlib
from typing import Any
from uuid import uuid4

from anyio import to_thread
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.budget import BytesBudget, Share
from server.caller import CALLER, Caller
from server.errors import EspalierError, InvalidRequest, PayloadTooLarge, ShuttingDown, SlowRequest, UnsupportedMedia
from server.settings import Settings

log = logging.getLogger(__name__)

GZIP = 16 + zlib.MAX_WBITS
"""What zlib calls a gzip stream."""
UNPACKED = 2**18
"""Bytes of a packed body that are unpacked at once, before they are counted."""
SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class RequestBody:
    """A request's body as the app receives it: in time, unpacked, and counted as sent and as unpacked, so that one that is chunked
    or packed is bounded too."""

    def __init__(self, receive: Receive, headers: Headers, limit: int, timeout: float, share: Share) -> None:
        self._receive, self._limit, self._timeout, self._share = receive, limit, timeout, share
        self._deadline = asyncio.get_running_loop().time() + timeout
        length = headers.get("content-length", "")
        self._said = int(length) if length.isdecimal() else 0
        self._encoding = headers.get("content-encoding", "").strip().lower() or "identity"
        self._gunzip = zlib.decompressobj(GZIP) if self._encoding in ("gzip", "x-gzip") else None
        self._sent = self._unpacked = 0
        self._ended = False  # nothing more will come
        self._packed = False  # what has come is not all unpacked

    async def receive(self) -> Message:
        """The next piece. Raises PayloadTooLarge, UnsupportedMedia, InvalidRequest and SlowRequest."""
        if self._gunzip is None and self._encoding != "identity":
            raise UnsupportedMedia(f"Content-Encoding {self._encoding[:40]} is not supported; send gzip or none.")
        self._check_size()
        message = await self._next()
        self._check_size()
        if self._gunzip and message["type"] == "http.request":
            body = await to_thread.run_sync(unpack, self._gunzip, message.get("body", b""), self._ended)
            self._packed = len(body) == UNPACKED and not self._gunzip.eof
            message = {**message, "body": body, "more_body": self._packed or not self._ended}
        piece = len(message.get("body", b""))
        self._unpacked += piece
        self._share.take(piece)
        self._check_size()
        return message

    async def _next(self) -> Message:
        if self._gunzip and self._packed:
            return {"type": "http.request", "body": self._gunzip.unconsumed_tail}
        try:
            async with asyncio.timeout_at(None if self._ended else self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise SlowRequest(f"The request's body has not come within {self._timeout} seconds.") from None
        self._sent += len(message.get("body", b""))
        self._ended = not message.get("more_body")
        return message

    def _check_size(self) -> None:
        if max(self._said, self._sent, self._unpacked) > self._limit:
            raise PayloadTooLarge(f"A request body may have at most {self._limit:,} bytes.")


class Envelope:
    """Around all routes: an id on every reply, a bounded body, and OpenAI's error object when something breaks.

    The client's id is an echo, and never names anything inside. HEAD is GET without its body, and slashes that are doubled or
    trail mean nothing. All bodies share one budget of bytes until they are answered, and each has a deadline.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.max_body_bytes = settings.max_body_bytes
        self._budget, self._timeout = BytesBudget(settings.max_bodies_bytes), settings.body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        head = scope["method"] == "HEAD"
        path = re.sub("/+", "/", scope["path"]).removesuffix("/") or "/"
        scope = {**scope, "path": path, "method": "GET" if head else scope["method"]}
        given, started = headers.get("x-request-id", ""), False
        request_id = given if SANE_ID.fullmatch(given) else uuid4().hex

        async def labelled_send(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            elif head:
                message = {**message, "body": b""}
            await send(message)

        trace = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        caller = CALLER.set(Caller(request_id, trace))
        try:
            with self._budget.share() as share:
                body = RequestBody(receive, headers, self.max_body_bytes, self._timeout, share)
                await self.app(scope, body.receive, labelled_send)
        except Exception:
            log.exception("request %s to %s failed", request_id, scope["path"])
            if started:
                raise
            error = EspalierError("The server failed to answer; its log has the details.", code="internal_error")
            await JSONResponse(error.body(), error.status)(scope, receive, labelled_send)
        except asyncio.CancelledError:  # the grace period has ended while the body came
            if started:
                raise
            refusal = ShuttingDown("The server is shutting down.")
            await JSONResponse(refusal.body(), refusal.status, headers=refusal.headers())(scope, receive, labelled_send)
        finally:
            CALLER.reset(caller)


def unpack(gunzip: Any, piece: bytes, last: bool) -> bytes:
    """At most UNPACKED bytes of a gzip body; the rest waits in `gunzip`. Raises InvalidRequest for what is none."""
    try:
        body: bytes = gunzip.decompress(piece, UNPACKED)
    except zlib.error:
        raise InvalidRequest("The body is not gzip, as its Content-Encoding says.") from None
    cut = last and len(body) < UNPACKED and not gunzip.eof
    if cut or gunzip.unused_data:
        raise InvalidRequest("The gzip body is cut short, or something follows it.")
    return body
