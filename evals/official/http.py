"""What the runs over HTTP share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx

TIMEOUT_S = 300.0


def client(url: str) -> httpx.Client:
    """Paths are relative to `url`. Raises ValueError without httpx, and for what is no URL."""
    try:
        import httpx
    except ImportError as error:
        raise ValueError("--url and --judge need httpx; install it with `pip install -e '.[bench]'`") from error
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{url!r} is no URL, such as http://127.0.0.1:8000")
    return httpx.Client(base_url=url.rstrip("/") + "/", timeout=TIMEOUT_S)


def value_at(reply: httpx.Response, *path: str | int) -> Any:
    """What a JSON reply holds there. Raises ValueError for a reply that is another."""
    found: Any = None
    try:
        found = reply.json()
        for key in path:
            found = found[key]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{reply.url} answers what no OpenAI-compatible server does: {reply.text[:200]!r}") from error
    return found


def said_by(reply: httpx.Response) -> str:
    """The message of OpenAI's error object, or the beginning of whatever came instead."""
    try:
        return str(value_at(reply, "error", "message"))
    except ValueError:
        return reply.text[:200]
