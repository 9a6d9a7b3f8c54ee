"""Picture files without what is no picture: text, profiles, comments, previews. Broken or endless metadata then spoils nothing."""

from __future__ import annotations

import struct
import zlib

PNG = b"\x89PNG\r\n\x1a\n"
PNG_KEEPS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"acTL"}
"""Pixels and transparency; and what says that it is animated."""
JPEG_DROPS = {*range(0xE2, 0xEE), 0xEF, 0xFE}
"""Application data but JFIF's, EXIF's and Adobe's (how colours are written), a phone's second views among them; and comments."""


def without_metadata(data: bytes, kind: str) -> bytes:
    """The file's pixels, transparency and orientation. What does not parse is returned as it is, for the decoder to judge."""
    clean = {"PNG": _png, "JPEG": _jpeg, "GIF": _gif}.get(kind)
    return clean(data) if clean else data


def _png(data: bytes) -> bytes:
    """Chunks that hold pixels, and an orientation whose checksum is right; that first, to be known before they are decoded."""
    kept, exif, at = [PNG], b"", len(PNG)
    while at + 12 <= len(data):
        (size,) = struct.unpack_from(">I", data, at)
        name, end = data[at + 4 : at + 8], at + 12 + size
        whole = data[at:end]
        if name in PNG_KEEPS:
            kept.append(whole)
        elif name == b"eXIf" and zlib.crc32(whole[4:-4]) == int.from_bytes(whole[-4:]):
            exif = whole
        at = end
        if name == b"IEND":
            break
    return b"".join([*kept[:2], exif, *kept[2:]])


def _jpeg(data: bytes) -> bytes:
    """Segments up to the first scan but those of JPEG_DROPS, and all behind it."""
    kept, at = [data[:2]], 2
    while data[at : at + 1] == b"\xff" and at + 4 <= len(data):
        marker, size = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        if marker == 0xDA or size < 2:
            break
        if marker not in JPEG_DROPS:
            kept.append(data[at : at + 2 + size])
        at += 2 + size
    return b"".join([*kept, data[at:]])


def _gif(data: bytes) -> bytes:
    """Header, colours, and the first frame with the block that says what of it is transparent."""
    if len(data) < 13:
        return data
    at = 13 + _table(data[10])
    kept, control = [data[:at]], b""
    while at < len(data) and data[at] == 0x21:  # extensions
        end = _end_of_blocks(data, at + 2)
        control = data[at:end] if data[at + 1 : at + 2] == b"\xf9" else control
        at = end
    if data[at : at + 1] != b"\x2c" or at + 10 > len(data):
        return data
    end = _end_of_blocks(data, at + 11 + _table(data[at + 9]))
    return b"".join([*kept, control, data[at:end], b"\x3b"])


def _table(flags: int) -> int:
    """Bytes of a GIF's table of colours."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _end_of_blocks(data: bytes, at: int) -> int:
    """Where a GIF's chain of blocks ends, behind its empty block."""
    while at < len(data) and data[at]:
        at += 1 + data[at]
    return at + 1
