"""Tokens that were verified a moment ago: in memory, and in Redis where services share one.

What is in Redis is believed only with our own HMAC: whoever can write there must not be able to make principals.
Nothing waits for Redis longer than its link allows, and without it tokens are verified again: a signature each.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections import OrderedDict
from collections.abc import Callable

import msgspec

from ferryline_service.access.jwt_rules import Verified
from ferryline_service.access.redis_link import RedisAway, RedisLink

ENTRIES_MAX = 5_000  # of some KiB each
WRITES_MAX = 100  # on their way to Redis; more are left out
_MAC_BYTES = 32


class Entry(msgspec.Struct, array_like=True, frozen=True):
    """``thumbprint``: of the key that signed; an entry ends with the key. ``until_ms``: wall clock."""

    verified: Verified
    thumbprint: str
    until_ms: int


class TokenCache:
    """Bounded, least recently used goes first. ``secret``: the cluster's claim key, b"" while it is not known.

    ``scope``: what the entries depend on (the issuers of the policy); another scope finds none of them.
    """

    def __init__(self, secret: Callable[[], bytes], *, entries_max: int = ENTRIES_MAX) -> None:
        self._secret = secret
        self._entries_max = entries_max
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()
        self._link: RedisLink | None = None
        self._scope = b""
        self._writes: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._entries)

    def use(self, link: RedisLink | None, scope: bytes) -> None:
        """From now on share through ``link``, under ``scope``. A changed scope forgets what is in memory."""
        self._link = link
        if scope != self._scope:
            self._scope = scope
            self._entries.clear()

    def recall(self, token: str, now_ms: int) -> Entry | None:
        """From memory."""
        digest = _digest(token)
        entry = self._entries.get(digest)
        if entry is None:
            return None
        if now_ms >= entry.until_ms:
            del self._entries[digest]
            return None
        self._entries.move_to_end(digest)
        return entry

    def forget(self, token: str) -> None:
        self._entries.pop(_digest(token), None)

    async def look_up(self, token: str, now_ms: int) -> Entry | None:
        """From Redis, into memory. None as well when Redis is away or holds what we did not write."""
        link, secret = self._link, self._secret()
        if link is None or not secret:
            return None
        name, mac_key = self._names(token, secret)
        try:
            stored = await link.run(lambda redis: redis.get(name))
        except RedisAway:
            return None
        if not isinstance(stored, bytes) or len(stored) <= _MAC_BYTES:
            return None
        mac, body = stored[:_MAC_BYTES], stored[_MAC_BYTES:]
        if not hmac.compare_digest(mac, hmac.digest(mac_key, body, "sha256")):
            return None
        try:
            entry = msgspec.msgpack.decode(body, type=Entry)
        except msgspec.MsgspecError:
            return None
        if now_ms >= entry.until_ms:
            return None
        self._remember(token, entry)
        return entry

    def keep(self, token: str, entry: Entry, now_ms: int) -> None:
        """Into memory now, into Redis in the background."""
        self._remember(token, entry)
        link, secret, left_ms = self._link, self._secret(), entry.until_ms - now_ms
        if link is None or not secret or left_ms <= 0 or len(self._writes) >= WRITES_MAX:
            return
        name, mac_key = self._names(token, secret)
        body = msgspec.msgpack.encode(entry)
        task = asyncio.get_running_loop().create_task(
            _write(link, name, hmac.digest(mac_key, body, "sha256") + body, left_ms)
        )
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)

    async def close(self) -> None:
        for task in self._writes:
            task.cancel()
        if self._writes:
            await asyncio.wait(self._writes)

    def _remember(self, token: str, entry: Entry) -> None:
        self._entries[_digest(token)] = entry
        while len(self._entries) > self._entries_max:
            self._entries.popitem(last=False)

    def _names(self, token: str, secret: bytes) -> tuple[str, bytes]:
        """Name of the entry and key of its MAC. The name is an HMAC, too: names in Redis tell nothing about tokens."""
        about = self._scope + _digest(token)
        name = hmac.digest(secret, b"verified token name\0" + about, "sha256").hex()
        return f"ferryline:token:{name}", hmac.digest(secret, b"verified token entry\0" + about, "sha256")


async def _write(link: RedisLink, name: str, value: bytes, left_ms: int) -> None:
    try:
        await link.run(lambda redis: redis.set(name, value, px=left_ms))
    except RedisAway:
        pass


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
