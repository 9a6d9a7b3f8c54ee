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

from server.budget import BytesBudget
from server.caller import CALLER, Caller
from server.errors import EspalierError, InvalidRequest, PayloadTooLarge, SlowRequest, UnsupportedMedia
from server.settings import Settings

log = logging.getLogger(__name__)

GZIP = 16 + zlib.MAX_WBITS
"""What zlib calls a gzip stream."""
UNPACKED = 2**18
"""Bytes of a packed body that are unpacked at once, before they are counted."""
SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Envelope:
    """Around all routes: an id on every reply, a bounded body, and OpenAI's error object when something breaks.

    The body is counted while it is read and unpacked, so that a chunked or packed one is bounded too. The client's id is an
    echo, and never names anything inside. HEAD is GET without its body, and slashes that are doubled or trail mean nothing.
    All bodies share one budget of bytes until they are answered, and each has a deadline.
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
        length, given = headers.get("content-length", ""), headers.get("x-request-id", "")
        size = int(length) if length.isdecimal() else 0
        request_id = given if SANE_ID.fullmatch(given) else uuid4().hex
        encoding = headers.get("content-encoding", "").strip().lower() or "identity"
        gunzip = zlib.decompressobj(GZIP) if encoding in ("gzip", "x-gzip") else None
        read, started, whole, packed = 0, False, False, False
        deadline = asyncio.get_running_loop().time() + self._timeout

        async def bounded_receive() -> Message:
            nonlocal read, whole, packed
            if gunzip is None and encoding != "identity":
                raise UnsupportedMedia(f"Content-Encoding {encoding[:40]} is not supported; send gzip or none.")
            if max(size, read) <= self.max_body_bytes:
                if gunzip and packed:
                    message: Message = {"type": "http.request", "body": gunzip.unconsumed_tail}
                else:
                    message = await self._receive(receive, None if whole else deadline)
                    whole = not message.get("more_body")
                if gunzip and message["type"] == "http.request":
                    body = await to_thread.run_sync(unpack, gunzip, message.get("body", b""), whole)
                    packed = len(body) == UNPACKED and not gunzip.eof
                    message = {**message, "body": body, "more_body": packed or not whole}
                piece = len(message.get("body", b""))
                read += piece
                share.take(piece)
            if max(size, read) > self.max_body_bytes:
                raise PayloadTooLarge(f"A request body may have at most {self.max_body_bytes:,} bytes.")
            return message

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
                await self.app(scope, bounded_receive, labelled_send)
        except Exception:
            log.exception("request %s to %s failed", request_id, scope["path"])
            if started:
                raise
            error = EspalierError("The server failed to answer; its log has the details.", code="internal_error")
            await JSONResponse(error.body(), error.status)(scope, receive, labelled_send)
        finally:
            CALLER.reset(caller)

    async def _receive(self, receive: Receive, deadline: float | None) -> Message:
        try:
            async with asyncio.timeout_at(deadline):
                return await receive()
        except TimeoutError:
            raise SlowRequest(f"The request's body has not come within {self._timeout} seconds.") from None


def unpack(gunzip: Any, piece: bytes, last: bool) -> bytes:
    """At most UNPACKED bytes of a gzip body; the rest waits in `gunzip`. Raises InvalidRequest for what is none."""
    try:
        body: bytes = gunzip.decompress(piece, UNPACKED)
    except zlib.error:
        raise InvalidRequest("The body is not gzip, as its Content-Encoding says.") from None
    cut = last and len(body) < UNPACKED and not gunzip.eof
    if cut or (last and gunzip.unused_data):
        raise InvalidRequest("The gzip body is cut short, or something follows it.")
    return body
