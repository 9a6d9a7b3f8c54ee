"""Where what is fetched and built is kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The user's cache: $ESPALIER_CACHE, or ~/.cache/espalier."""
    return Path(os.environ.get("ESPALIER_CACHE") or Path.home() / ".cache" / "espalier")
