"""Pictures by URL, from the hosts that the operator named: the only place that opens a connection on a client's word.

ssrfguard resolves a name once, checks every address that comes back, and connects to the one that it has checked; at each redirect
too. Private, mapped and translated addresses, other ports and credentials in the URL are refused by it.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Collection

import httpx
from ssrfguard import Policy, Resolver, SSRFGuardError
from ssrfguard.httpx import AsyncClient

from server.budget import SHARE
from server.errors import InvalidRequest, PayloadTooLarge, UnsupportedMedia
from server.reading import check_wanted

log = logging.getLogger(__name__)

SECONDS = 10.0
"""For all of it: names, connections, redirects, bytes."""
REDIRECTS = 3
IMAGE_TYPE = re.compile(r"image/[\w.+-]+ *(;.*)?", re.IGNORECASE)
HEADERS = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "espalier"}


def policy_for(hosts: Collection[str]) -> Policy:
    """http and https at their usual ports. Raises ValueError for what is no host's name."""
    return Policy(allowed_hosts=frozenset(host.lower() for host in hosts), max_redirects=REDIRECTS)


def fetch(url: str, policy: Policy, max_bytes: int, *, seconds: float = SECONDS, resolver: Resolver | None = None) -> bytes:
    """A picture's file. In a thread of its own, which may wait. Raises a 4xx of `server.errors`; what a host said is in no text."""
    try:
        return asyncio.run(_within(url, policy, max_bytes, seconds, resolver))
    except SSRFGuardError as error:
        log.info("a picture's URL was refused: %s", type(error).__name__)
        raise _refused("A picture may not be fetched from there; this server names the hosts that it may ask.") from None
    except TimeoutError:
        raise _refused(f"The picture has not come within {seconds:g} seconds.") from None
    except (httpx.HTTPError, httpx.InvalidURL, OSError):
        raise _refused("The picture cannot be fetched.") from None


async def _within(url: str, policy: Policy, max_bytes: int, seconds: float, resolver: Resolver | None) -> bytes:
    async with asyncio.timeout(seconds), AsyncClient(policy=policy, resolver=resolver, trust_env=False, timeout=seconds) as client:
        async with client.stream("GET", url, headers=HEADERS, follow_redirects=True) as response:
            if response.status_code != 200:
                raise _refused(f"The picture's host answers {response.status_code}.")
            if not IMAGE_TYPE.fullmatch(response.headers.get("content-type", "")):
                raise UnsupportedMedia("What the URL leads to is no picture by its Content-Type.")
            if response.headers.get("content-encoding", "identity").lower() != "identity":
                raise UnsupportedMedia("The picture's host sends it packed, which was not asked for.")
            read = bytearray()
            async for piece in response.aiter_raw():
                check_wanted()
                if share := SHARE.get():
                    share.take(len(piece))
                read += piece
                if len(read) > max_bytes:
                    raise PayloadTooLarge(f"The picture has more than the {max_bytes:,} bytes that are left to it.")
            return bytes(read)


def _refused(message: str) -> InvalidRequest:
    return InvalidRequest(message, code="image_not_fetched")
