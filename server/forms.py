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
LISTS, MAPS = ("image", "stop", "stop_token_ids"), ("logit_bias",)
"""Fields that are no single value. Lists come one by one, under the same name, or as JSON, as maps do."""


def read_form(content_type: str, body: bytes, settings: Settings) -> dict[str, Any]:
    """The fields of a form, `image` a list of files as bytes. In a worker thread. Raises InvalidRequest, by name for what would be
    dropped, and PayloadTooLarge."""
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise InvalidRequest("The Content-Type of a form must name its boundary.")
    with parsing(body):
        parts = _parse(boundary, body, settings.max_image_bytes)
    if (files := sum(isinstance(part, File) for part in parts)) > settings.max_images:
        raise InvalidRequest(f"A form may have at most {settings.max_images} files, not {files}.", param="image")
    fields: dict[str, list[str | bytes]] = {"image": []}
    for part in parts:
        name, value = (part.field_name or b"").decode(errors="replace"), _value(part)
        if isinstance(value, bytes) and name != "image":
            raise InvalidRequest(f"{name[:100]}: the files of a form are its pictures; send each as image", param=name[:100])
        fields.setdefault(name, []).append(value)
    return {name: _read(name, values) for name, values in fields.items()}


def _read(name: str, values: list[str | bytes]) -> Any:
    """What a field's values, one for each time that it stands in the form, mean together."""
    if name in LISTS:
        return [one for value in values for one in _listed(name, value)]
    if len(values) > 1:
        raise InvalidRequest(f"{name[:100]}: stands in the form {len(values)} times", param=name[:100])
    (value,) = values
    return _json(name, value) if name in MAPS and isinstance(value, str) else value


def _listed(name: str, value: str | bytes) -> Any:
    return _json(name, value) if isinstance(value, str) and value.startswith("[") else [value]


def _json(name: str, text: str) -> Any:
    try:
        return parse_json(text.encode(), from_json)
    except ValueError as error:
        raise InvalidRequest(f"{name}: a map, and a list that begins with [, must be JSON: {error}", param=name) from None


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
