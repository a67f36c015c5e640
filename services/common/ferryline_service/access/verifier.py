"""JWTs of the configured issuers: is this token good, and who is it?

verifier = Verifier(claim_key=lambda: view.claim_key)
verifier.take(policy)
verified = await verifier.verify(token)  # raises BadCredentials, or Unavailable without the issuer's keys
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Coroutine
from typing import Any

import aiohttp
import msgspec

from ferryline.protocol.access import VERIFIED_MS_MAX, AccessPolicy
from ferryline.protocol.errors import InvalidArgument
from ferryline_service.access.jwks import FETCH_S, IssuerKeys
from ferryline_service.access.jwt_rules import TOKEN_BYTES_MAX, Parsed, Verified, believe, parse, refuse
from ferryline_service.access.redis_link import RedisLink
from ferryline_service.access.token_cache import Entry, TokenCache
from ferryline_service.logs import get_logger

__all__ = ["Verified", "Verifier", "looks_like_jwt"]

_log = get_logger()


def looks_like_jwt(token: str) -> bool:
    """Three parts with dots between them: to be asked here; anything else is none of ours."""
    return token.count(".") == 2


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000


class Verifier:
    """Verifies tokens against the issuers of one policy. What was verified is believed for five minutes at most, never
    beyond its expiry, and not longer than the key that signed it is known.

    ``claim_key``: authenticates what services share in Redis; b"" while it is not known. For one event loop.
    """

    def __init__(self, claim_key: Callable[[], bytes] = bytes, *, wall_ms: Callable[[], int] = _wall_ms) -> None:
        self.cache = TokenCache(claim_key)
        self._wall_ms = wall_ms
        self._issuers: dict[str, IssuerKeys] = {}  # by the issuer's own name for itself: its `iss`
        self._http: aiohttp.ClientSession | None = None
        self._link: RedisLink | None = None
        self._redis_url = ""
        self._closing: set[asyncio.Task[None]] = set()

    def take(self, policy: AccessPolicy) -> None:
        """Believe the issuers of this policy and no others. Their keys are fetched in the background from now on."""
        issuers = {meta.issuer: meta for meta in policy.issuers} if policy.enabled else {}
        for name, known in list(self._issuers.items()):
            if issuers.get(name) != known.issuer:
                self._later(self._issuers.pop(name).close())
        for name, meta in issuers.items():
            if name not in self._issuers:
                self._issuers[name] = IssuerKeys(meta, self._session)
        self._use_redis(policy.redis_url if policy.enabled else "")
        self.cache.use(self._link, hashlib.sha256(msgspec.msgpack.encode(policy.issuers)).digest())

    async def verify(self, token: str) -> Verified:
        """Who a token is. Raises BadCredentials, or Unavailable while its issuer's keys cannot be had."""
        if len(token) > TOKEN_BYTES_MAX:
            refuse("malformed", f"longer than {TOKEN_BYTES_MAX} bytes")
        if not token.isascii():
            refuse("malformed", "is not ASCII")
        now_ms = self._wall_ms()
        entry = self.cache.recall(token, now_ms)
        if entry is not None:
            if self._still(entry):
                return entry.verified
            self.cache.forget(token)
        parsed = parse(token)
        keys = self._issuers.get(parsed.issuer)
        if keys is None:
            refuse("issuer", "its issuer is not configured here")
        if parsed.algorithm not in keys.issuer.algorithms:
            refuse("algorithm", f"{parsed.algorithm} is not among the algorithms of this issuer")
        entry = await self.cache.look_up(token, now_ms)
        if entry is not None and self._still(entry):
            return entry.verified
        return await self._check(token, parsed, keys)

    async def _check(self, token: str, parsed: Parsed, keys: IssuerKeys) -> Verified:
        key = await keys.find(parsed.kid, parsed.algorithm)
        if key is None:
            refuse("key", "was signed with a key that its issuer does not have")
        if not key.verifies(token):
            refuse("signature", "its signature is wrong")
        now_ms = self._wall_ms()
        verified = believe(parsed, keys.issuer, now_ms)
        until_ms = min(verified.expires_ms, now_ms + VERIFIED_MS_MAX)
        if self._issuers.get(parsed.issuer) is keys:  # else the policy changed while the keys were fetched
            self.cache.keep(token, Entry(verified, key.thumbprint, until_ms), now_ms)
        else:
            refuse("issuer", "its issuer is not configured any more")
        return verified

    def _still(self, entry: Entry) -> bool:
        """Whether the key is still one of the issuer's, as far as we have heard from it."""
        for keys in self._issuers.values():
            if keys.issuer.name == entry.verified.issuer:
                return keys.keys is None or entry.thumbprint in keys.thumbprints
        return False

    async def close(self) -> None:
        """Stop fetching, and let go of every connection."""
        issuers, self._issuers = list(self._issuers.values()), {}
        await asyncio.gather(*(keys.close() for keys in issuers), *self._closing)
        await self.cache.close()
        if self._link is not None:
            await self._link.close()
        if self._http is not None:
            await self._http.close()

    def _use_redis(self, url: str) -> None:
        if url == self._redis_url:
            return
        if self._link is not None:
            self._later(self._link.close())
        self._redis_url, self._link = url, None
        if url:
            try:
                self._link = RedisLink(url)
            except InvalidArgument as error:
                _log.error("tokens are not shared", error=error.message)

    def _session(self) -> aiohttp.ClientSession:
        if self._http is None:
            self._http = aiohttp.ClientSession(
                cookie_jar=aiohttp.DummyCookieJar(), timeout=aiohttp.ClientTimeout(total=FETCH_S), trust_env=False
            )
        return self._http

    def _later(self, closing: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(closing)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
