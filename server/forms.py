"""Forms with files, as JSON's fields would be."""

from __future__ import annotations

from io import BytesIO
from typing import Any

from pydantic_core import from_json
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field, File, FormParser, parse_options_header

from server.errors import InvalidRequest, PayloadTooLarge
from server.json_text import parse_json
from server.reading import SLICE, parsing
from server.settings import Settings

MAX_PARTS = 1_000
"""Of a form, or what looks like the beginning of one: each is parsed in Python."""


def read_form(content_type: str, body: bytes, settings: Settings) -> dict[str, Any]:
    """The fields of a form, `image` a list of files as bytes. In a worker thread. Raises InvalidRequest and PayloadTooLarge."""
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise InvalidRequest("The Content-Type of a form must name its boundary.")
    with parsing(body):
        parts = _parse(boundary, body, settings.max_image_bytes)
    if (files := sum(isinstance(part, File) for part in parts)) > settings.max_images:
        raise InvalidRequest(f"A form may have at most {settings.max_images} files, not {files}.", param="image")
    named = [((part.field_name or b"").decode(errors="replace"), _value(part)) for part in parts]
    texts = {name: _read(name, value) for name, value in named if isinstance(value, str)}
    return {**texts, "image": [value for name, value in named if name == "image"]}


def _read(name: str, text: str) -> Any:
    """What a field's text stands for: a map is written as JSON."""
    if name != "logit_bias":
        return text
    try:
        return parse_json(text.encode(), from_json)
    except ValueError as error:
        raise InvalidRequest(f"{name}: must be JSON: {error}", param=name) from None


def _parse(boundary: bytes, body: bytes, max_bytes: int) -> list[Field | File]:
    # In slices: what searches megabytes in one call holds the interpreter's lock meanwhile.
    slices = [body[start : start + SLICE] for start in range(0, len(body), SLICE)]
    if sum(piece.count(b"--" + boundary) for piece in slices) > MAX_PARTS:
        raise PayloadTooLarge(f"A form may have at most {MAX_PARTS:,} parts.")
    parts: list[Field | File] = []
    config = {"MAX_MEMORY_FILE_SIZE": len(body) + 1}  # no files on disk
    try:
        parser = FormParser("multipart/form-data", parts.append, parts.append, boundary=boundary, config=config)
        whole = 0  # slices within one part
        for piece in slices:
            before = len(parts)
            parser.write(piece)
            whole = whole + 1 if len(parts) == before else 0
            if (whole - 1) * SLICE > max_bytes:
                raise PayloadTooLarge(f"A part of a form may have at most {max_bytes:,} bytes.")
        parser.finalize()
    except FormParserError:
        raise InvalidRequest("The form is broken or cut short.") from None
    return parts


def _value(part: Field | File) -> str | bytes:
    if isinstance(part, Field):
        return (part.value or b"").decode(errors="replace")
    assert isinstance(part.file_object, BytesIO)
    return part.file_object.getvalue()
