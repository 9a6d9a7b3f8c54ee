"""How a benchmark ends: one JSON document on the last line of stdout. What is for people goes to stderr."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console


def finish(document: dict[str, Any]) -> dict[str, Any]:
    """Print and return a document, its floats at four significant digits: more than any timing has."""
    document = rounded(document)
    Console(soft_wrap=True, highlight=False, markup=False).print(json.dumps(document))
    return document


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value
