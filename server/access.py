"""Who may do what: API keys, each with its levels and limits, and the web pages that may ask."""

from __future__ import annotations

import hmac
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatch
from hashlib import sha256
from ipaddress import ip_address
from pathlib import Path
from time import time
from urllib.parse import urlsplit

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from models.errors import faults
from server.caller import CALLER
from server.errors import EspalierError, HostNotAllowed, InvalidApiKey, OriginNotAllowed, RateLimited, UnsupportedMedia
from server.metrics import ServerMetrics
from server.settings import Settings

OPEN = ("/live", "/ready", "/health")
"""Routes for probes, which have no key."""
PAGE, PAGE_FILES = ("/", "/playground"), "/playground/"
"""The page asks for a key itself, and uses it for all else."""
FORMS = ("application/json", "multipart/form-data")
"""What a web page may send: anything else would need no permission of the browser's."""


class ApiKey(BaseModel):
    """One key of a key file. Its name is the tenant's: it is logged, and caches of pictures are apart by it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="Of the key: printf %s KEY | sha256sum")
    levels: tuple[str, ...] = Field(default=(), description="Levels that it may ask for, its default first; all if none is named.")
    requests_per_minute: int | None = Field(default=None, ge=1)
    concurrent: int | None = Field(default=None, ge=1, description="Requests under way at once.")
    admin: bool = Field(default=False, description="May load, swap and unload models.")
    name: str = ""


class KeyFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: dict[str, ApiKey] = Field(min_length=1)


def read_keys(settings: Settings) -> tuple[ApiKey, ...]:
    """The keys of the settings and of their file. Raises ValueError that names what is wrong."""
    given = [key.strip() for key in settings.api_keys.split(",") if key.strip()]
    keys = [ApiKey(sha256=_digest(key), name=f"key-{number}") for number, key in enumerate(given, 1)]
    if settings.api_key_file:
        keys += _read_file(settings.api_key_file)
    if doubled := [digest for digest, n in Counter(key.sha256 for key in keys).items() if n > 1]:
        raise ValueError(f"an API key is given twice (its SHA-256 begins with {doubled[0][:8]})")
    if doubled := [name for name, n in Counter(key.name for key in keys).items() if n > 1]:
        raise ValueError(f"two API keys are named {doubled[0]!r}, as api_keys are by number; rename that of the key file")
    return tuple(keys)


def _read_file(path: Path) -> list[ApiKey]:
    try:
        found = KeyFile.model_validate(tomllib.loads(path.read_text("utf-8")))
    except ValidationError as error:
        raise ValueError(f"{path}: {faults(error)[0]}") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path}: {error}") from error
    return [key.model_copy(update={"name": name}) for name, key in found.keys.items()]


def check_levels(keys: Iterable[ApiKey], menus: Iterable[Iterable[str]]) -> None:
    """Raise ValueError for a key with a level that is on no menu."""
    known = tuple(dict.fromkeys(level for menu in menus for level in menu))
    for key in keys:
        if unknown := [level for level in key.levels if level not in known]:
            raise ValueError(f"API key {key.name}: level {unknown[0]!r} is not one of {', '.join(known)}")


def _digest(key: str) -> str:
    return sha256(key.encode()).hexdigest()


class Access:
    """Around the routes: refuses hosts, web pages and keys that may not ask, and holds each key to its limits."""

    def __init__(self, app: ASGIApp, settings: Settings, keys: Sequence[ApiKey], metrics: ServerMetrics) -> None:
        self.app, self.settings, self.keys, self.metrics = app, settings, keys, metrics
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        self._under_way: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            headers = Headers(scope=scope)
            self._check_page(scope, headers)
            key = self._check_key(scope, headers)
            with self._counted(scope, key), _known_as(key):
                await self.app(scope, receive, send)
        except EspalierError as refusal:  # those of the routes are answered further in
            if scope["method"] == "POST":
                self.metrics.rejected(refusal.code or refusal.type)
            await JSONResponse(refusal.body(), refusal.status, headers=refusal.headers())(scope, receive, send)

    def _check_page(self, scope: Scope, headers: Headers) -> None:
        """A page of another origin may not ask, nor one whose host's name only pretends to be this server's (DNS rebinding)."""
        host = _host(f"//{headers.get('host', '')}")
        hosts = self.settings.allowed_hosts
        if hosts and not _matches(host, hosts) and scope["path"] not in OPEN:
            raise HostNotAllowed(f"This server is not {host[:100]!r}; it answers to --allowed-hosts alone.")
        origin = headers.get("origin")
        if origin is None or scope["method"] not in ("POST", "PUT", "PATCH", "DELETE"):
            return
        own = host != "" and _host(origin) == host
        sure = bool(hosts) or _is_number(host) or not _is_loopback(self.settings.host)
        if not ((own and sure) or _matches(origin, self.settings.cors_origins)):
            raise OriginNotAllowed(f"Pages of {origin[:100]!r} may not ask this server; allow them by --cors-origins.")
        form = headers.get("content-type", "").split(";")[0].strip().lower()
        if form not in FORMS:
            raise UnsupportedMedia(f"A web page must say Content-Type: {' or '.join(FORMS)}.")

    def _check_key(self, scope: Scope, headers: Headers) -> ApiKey | None:
        path = scope["path"]
        page = path in PAGE or path.startswith(PAGE_FILES)
        free = path in OPEN or page or (path == "/metrics" and self.settings.open_metrics)
        if not self.keys or free:
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        digest = _digest(given.strip())
        found = None
        for key in self.keys:  # all of them, so that the time says nothing
            if hmac.compare_digest(digest, key.sha256):
                found = key
        if scheme.lower() != "bearer" or found is None:
            raise InvalidApiKey("This server needs an API key: send the header Authorization: Bearer KEY.")
        return found

    @contextmanager
    def _counted(self, scope: Scope, key: ApiKey | None) -> Iterator[None]:
        """A key's request while it is under way. Raises RateLimited."""
        if key is None or scope["method"] != "POST":
            yield
            return
        if key.concurrent is not None and self._under_way[key.name] >= key.concurrent:
            raise RateLimited(f"This key may have {key.concurrent} requests under way at once.", retry_after=1.0)
        if key.requests_per_minute is not None:
            item = RateLimitItemPerMinute(key.requests_per_minute)
            if not self._limiter.hit(item, key.name):
                reset = self._limiter.get_window_stats(item, key.name).reset_time
                raise RateLimited(
                    f"This key may ask {key.requests_per_minute} times a minute.", retry_after=max(0.1, reset - time())
                )
        self._under_way[key.name] += 1
        try:
            yield
        finally:
            self._under_way[key.name] -= 1


@contextmanager
def _known_as(key: ApiKey | None) -> Iterator[None]:
    """Inside, the caller is the key's tenant."""
    known = replace(CALLER.get(), tenant=key.name, levels=key.levels, admin=key.admin) if key else CALLER.get()
    token = CALLER.set(known)
    try:
        yield
    finally:
        CALLER.reset(token)


def _host(url: str) -> str:
    """The host of a URL in lower case; nothing where it has none."""
    try:
        return (urlsplit(url).hostname or "").lower()
    except ValueError:
        return ""


def _matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of them fits: `*` and `?` stand for any text and any character, brackets are those of IPv6 addresses."""
    return any(fnmatch(name.lower(), pattern.lower().replace("[", "[[]")) for pattern in patterns)


def _is_number(host: str) -> bool:
    """Whether no name server was asked for it."""
    try:
        ip_address(host)
    except ValueError:
        return host == "localhost"
    return True


def _is_loopback(address: str) -> bool:
    try:
        return ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def warning(settings: Settings, keys: Sequence[ApiKey]) -> str | None:
    """What an operator should be told about who may ask."""
    if not keys and not _is_loopback(settings.host):
        return f"anybody who reaches {settings.host} may ask: no API keys are set (--api-key-file, ESPALIER_API_KEYS)"
    return None
