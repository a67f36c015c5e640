"""One connection to Redis for what services share to be fast or fair, never to be right.

    link = RedisLink("redis://localhost:6379/0")
    try:
        value = await link.run(lambda redis: redis.get(name))
    except RedisAway:
        ...  # go on without it

Nobody waits long for Redis: a call ends within CALL_S, and after a failure nothing is tried for PAUSE_S.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from ferryline.protocol.errors import InvalidArgument
from ferryline_service.logs import get_logger

T = TypeVar("T")
CALL_S = 0.5  # for connecting, asking and being answered together
PAUSE_S = 1.0  # without a try after a failure
_CONNECTIONS_MAX = 8
_SCHEMES = ("redis://", "rediss://", "unix://")
_log = get_logger()


class RedisAway(Exception):
    """Redis did not answer, or was not asked because it did not a moment ago. Go on without it."""


class RedisLink:
    """A client that connects when it is first used. ``up``: whether the last call was answered.

    ``url``: redis://host:port/db, unix://PATH, or rediss:// (certificate and name are checked, and
    ``?ssl_ca_certs=FILE`` names a CA). Raises InvalidArgument for another one, without its password.
    """

    def __init__(self, url: str, *, call_s: float = CALL_S, pause_s: float = PAUSE_S) -> None:
        if not url.startswith(_SCHEMES):
            raise InvalidArgument(f"redis_url: begins with none of {', '.join(_SCHEMES)}", field="redis_url")
        try:
            pool: Any = BlockingConnectionPool.from_url(
                url,
                max_connections=_CONNECTIONS_MAX,
                timeout=call_s,
                socket_timeout=call_s,
                socket_connect_timeout=call_s,
                retry=Retry(NoBackoff(), 0),  # our pause is the only one: a retry would keep callers waiting
            )
        except (ValueError, TypeError) as error:
            raise InvalidArgument(f"redis_url: {type(error).__name__}", field="redis_url") from None
        self.up = False
        self._redis: Redis = Redis.from_pool(pool)
        self._call_s = call_s
        self._pause_s = pause_s
        self._again = 0.0  # loop time before which nothing is tried
        self._said = False

    async def run(self, act: Callable[[Redis], Awaitable[T]]) -> T:
        """What ``act`` returns, within CALL_S. Raises RedisAway; whether Redis did what was asked is then unknown."""
        loop = asyncio.get_running_loop()
        if loop.time() < self._again:
            raise RedisAway("redis failed a moment ago")
        try:
            async with asyncio.timeout(self._call_s):
                value = await act(self._redis)
        except (RedisError, OSError, TimeoutError) as error:
            self._again = loop.time() + self._pause_s
            if self.up or not self._said:
                _log.warning("redis is away", error=f"{type(error).__name__}: {str(error)[:200]}")
            self.up, self._said = False, True
            raise RedisAway(type(error).__name__) from None
        if not self.up:
            _log.info("redis answers")
            self.up = True
        return value

    async def close(self) -> None:
        """End its connections. Never raises."""
        with contextlib.suppress(RedisError, OSError):
            await self._redis.aclose()
