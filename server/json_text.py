"""JSON that clients send: whole bodies, and fields of forms."""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Callable
from typing import TypeVar

from server.errors import PayloadTooLarge
from server.reading import SLICE, parsing

T = TypeVar("T")

MAX_JSON_VALUES = 2**16
"""Commas and brackets of a text: to parse more would hold the interpreter's lock. Lists fail fast for that reason too."""
MAX_JSON_OTHERS = 2**20
"""Bytes of a text that base64 does not have."""
BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=-_"


def parse_json(text: bytes, parse: Callable[[bytes], T]) -> T:
    """By one of pydantic's parsers: those raise ValueError at whatever is wrong, deep nesting included, where Python's raises
    RecursionError. Raises PayloadTooLarge, before anything is parsed, for a text that is large beside its pictures."""
    with parsing(text):
        _check(text)
        return parse(text.removeprefix(BOM_UTF8))


def _check(text: bytes) -> None:
    values = others = 0
    for start in range(0, len(text), SLICE):
        rest = text[start : start + SLICE].translate(None, BASE64)
        values, others = values + sum(map(rest.count, (b",", b"{", b"["))), others + len(rest)
        if values > MAX_JSON_VALUES:
            raise PayloadTooLarge(f"The body has more than {MAX_JSON_VALUES:,} values.")
        if others > MAX_JSON_OTHERS:
            raise PayloadTooLarge(f"The body has more than {MAX_JSON_OTHERS:,} bytes that are not base64.")
