"""How levels choose the visual tokens to keep: by the checkpoint's router, or by merging. Apart, for who reads settings only."""

from __future__ import annotations

from typing import Literal

TokenPolicy = Literal["router", "merging"]
