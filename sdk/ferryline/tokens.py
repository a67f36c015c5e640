"""Where a client's token comes from: a text, or a function that gives one and is asked again when it is due.

A token that is a JWT says when it ends; a new one is asked for a little earlier. Any other is used until a service
refuses it. An asynchronous function is called in one event loop only, that of the first request; other loops of the
same client (the thread of heartbeats) have it called there, unless it says ``any_loop = True``.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import inspect
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp

from ferryline.protocol.errors import ConnectionFailed, FerrylineError, InvalidArgument

TokenLike = str | Callable[[], str | Awaitable[str]]

EARLY_S = 30.0  # before its end a token is replaced; of short-lived ones, a fifth of their life
AGAIN_S = 1.0  # the function is not called more often
_HTTP_UNAUTHORIZED = 401


def claims_of(token: str) -> dict[str, Any]:
    """What a JWT says, believed only where nobody is let in by it; {} for any other token."""
    parts = token.split(".")
    if len(parts) != 3:
        return {}
    try:
        found = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except (binascii.Error, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def renew_at(token: str, now_s: float) -> float:
    """When to ask for another one, in seconds since the epoch. ``now_s``: when it was made, if it does not say so."""
    claims = claims_of(token)
    expires, issued = claims.get("exp"), claims.get("iat", now_s)
    if not isinstance(expires, (int, float)) or not isinstance(issued, (int, float)):
        return float("inf")
    return expires - min(EARLY_S, max(0.0, expires - issued) / 5)


def _is_async(function: Any) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


class TokenSource:
    """The token of a client. ``renewable``: whether there may be another one after it."""

    def __init__(self, given: TokenLike) -> None:
        self.renewable = callable(given)
        self._give: Callable[[], str | Awaitable[str]] | None = None
        self._token = ""
        self._until = 0.0  # wall clock, as in tokens
        if callable(given):
            self._give = given
        elif isinstance(given, str):
            self._token, self._until = given, float("inf")
        else:
            raise InvalidArgument(f"token: {type(given).__name__} is neither text nor a function", field="token")
        plain = callable(given) and not _is_async(given)
        self._anywhere = plain or bool(getattr(given, "any_loop", False))
        self._asked_at = float("-inf")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asking: asyncio.Task[str] | None = None

    async def token(self) -> str:
        """The token to use now, "" for none. Raises what the function raises; ConnectionFailed for foreign errors."""
        if time.time() < self._until:
            return self._token
        return await self._at_home(self._token)

    async def renew(self, refused: str) -> str:
        """Another token than the refused one; the same one when there is none."""
        if self._token != refused and time.time() < self._until:
            return self._token  # somebody else was quicker
        return await self._at_home(refused)

    async def _at_home(self, old: str) -> str:
        if self._give is None:
            return self._token
        loop = asyncio.get_running_loop()
        if self._loop is None or self._loop.is_closed():
            self._loop, self._asking = loop, None
        if loop is self._loop:
            return await self._ask(old)
        if self._anywhere:  # the first loop may be blocked by a handler, and heartbeats must go on
            return await self._call()
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._ask(old), self._loop))

    async def _ask(self, old: str) -> str:
        if self._asking is None:
            if self._token and time.monotonic() - self._asked_at < AGAIN_S:
                return self._token
            self._asking = asyncio.get_running_loop().create_task(self._call())
            self._asking.add_done_callback(self._asked)
        return await asyncio.shield(self._asking)

    def _asked(self, task: asyncio.Task[str]) -> None:
        self._asking = None
        if not task.cancelled():
            task.exception()  # whoever asked may have gone; the next one asks again

    async def _call(self) -> str:
        assert self._give is not None
        self._asked_at = time.monotonic()
        try:
            given: str | Awaitable[str]
            if _is_async(self._give):
                given = self._give()
            else:  # it may read files, or ask another program
                given = await asyncio.get_running_loop().run_in_executor(None, self._give)
            token: object = await given if inspect.isawaitable(given) else given
        except FerrylineError:
            raise
        except Exception as error:
            raise ConnectionFailed(f"no token: {type(error).__name__}: {str(error)[:200]}") from error
        if not isinstance(token, str) or not token.isascii() or not token.isprintable():
            raise InvalidArgument("token: the function gave something else than a line of ASCII", field="token")
        self._token, self._until = token, renew_at(token, time.time())
        return token

    async def close(self) -> None:
        """Forget a question that is on its way."""
        if self._asking is not None and self._loop is asyncio.get_running_loop():
            self._asking.cancel()
            await asyncio.wait([self._asking])

    # -- requests ----------------------------------------------------------------------------------

    async def authorize(
        self, request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        """A middleware of aiohttp's client: shows the token, and once more a new one if that was refused."""
        if "Authorization" in request.headers:
            return await handler(request)
        token = await self.token()
        if token:
            request.headers["Authorization"] = f"Bearer {token}"
        response = await handler(request)
        if response.status != _HTTP_UNAUTHORIZED or not self.renewable:
            return response
        renewed = await self.renew(token)
        if renewed == token:
            return response
        response.close()
        request.headers["Authorization"] = f"Bearer {renewed}"
        return await handler(request)
