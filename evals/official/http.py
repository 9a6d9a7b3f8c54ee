"""What the runs over HTTP share."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import httpx

TIMEOUT_S = 300.0


def client(url: str) -> httpx.Client:
    """Paths are relative to `url`. Raises ValueError without httpx, and for what is no URL."""
    try:
        import httpx
    except ImportError as error:
        raise ValueError("--url and --judge need httpx; install it with `pip install 'espalier[bench]'`") from error
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{url!r} is no URL, such as http://127.0.0.1:8000")
    return httpx.Client(base_url=url.rstrip("/") + "/", timeout=TIMEOUT_S)


def said_by(reply: httpx.Response) -> str:
    """The message of OpenAI's error object, or the beginning of whatever came instead."""
    try:
        return str(reply.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return reply.text[:200]
