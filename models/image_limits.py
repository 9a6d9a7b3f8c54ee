"""How large a picture may be. Apart from the decoder, for who reads settings only."""

from __future__ import annotations

MAX_PIXELS = 7680 * 4320
PILLOW_MAX_PIXELS = 89_478_485
"""Above it Pillow warns of a decompression bomb by itself."""
