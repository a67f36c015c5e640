"""Requests to whichever coordinator is active, over REST, and waiting until this client sees what they changed."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import aiohttp
import msgspec
import tenacity

from ferryline.core.retry import told_ms
from ferryline.finding import hinted
from ferryline.protocol.errors import (
    BY_CODE,
    ConnectionFailed,
    ConnectionLost,
    CoordinatorLoading,
    CoordinatorStandby,
    CoordinatorUnavailable,
    DeadlineExceeded,
    FerrylineError,
    InternalError,
    RequestTimedOut,
    Throttled,
)

if TYPE_CHECKING:
    from ferryline.client import Client

BODY_BYTES_MAX = 64 * 1024 * 1024
BROKER_ANSWER_S = 60.0  # some requests read a log from disk
_ATTEMPT_S = 10.0
_SILENT_S = 3.0  # a coordinator that did not answer is left alone for so long, if there are others
_VISIBLE_S = 10.0  # how long a change may take to reach this client's own metadata


class CoordinatorCalls:
    """Base of what administers: changes go to the coordinator, reads of metadata to whoever answers first.

    Every call ends within its ``timeout`` (default: the client's), with a value or a FerrylineError.
    """

    def __init__(self, client: Client) -> None:
        self._client = client

    # -- metadata ----------------------------------------------------------------------------------

    async def _refresh(self, timeout: float | None) -> None:
        limit = self._limit(timeout)
        await self._client.start()
        await self._client.watch.ask(timeout=limit)

    def _limit(self, timeout: float | None) -> float:
        return self._client.timeout if timeout is None else timeout

    async def _visible(self, condition: Any, timeout: float | None) -> None:
        """Wait until this client sees its own change; the change is made either way."""
        await self._client.watch.until(condition, timeout=min(self._limit(timeout), _VISIBLE_S))

    # -- the coordinator's REST --------------------------------------------------------------------

    async def _change(self, method: str, path: str, body: Any, timeout: float | None) -> Any:
        """A change: sent again only when it surely did not reach a coordinator."""
        return await self._request(method, path, body, self._limit(timeout), again=_surely_not_sent)

    async def _ask(self, method: str, path: str, timeout: float | None) -> Any:
        return await self._request(method, path, None, self._limit(timeout), again=_worth_another_try)

    async def _request(self, method: str, path: str, body: Any, timeout: float, *, again: Any) -> Any:
        await self._client.start()
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(again),
            wait=_pause_s,
            stop=tenacity.stop_before_delay(timeout),
            reraise=True,
        )
        try:
            async with asyncio.timeout(timeout):
                return await retrying(self._once, method, path, body)
        except TimeoutError:
            if method == "GET":
                raise DeadlineExceeded(f"{method} {path}: no answer within {timeout:g} s") from None
            raise RequestTimedOut(f"{method} {path}: no answer within {timeout:g} s") from None

    async def _once(self, method: str, path: str, body: Any) -> Any:
        """One try at each address that may be a coordinator."""
        routing = self._client.routing
        brokers = {routing.address(broker) for broker in routing.cluster.brokers}
        urls = [url for url in dict.fromkeys([*routing.coordinators, *self._client.urls]) if url not in brokers]
        silent, now = self._client.silent, asyncio.get_running_loop().time()
        urls = [url for url in urls if silent.get(url, 0.0) <= now] or urls
        last: FerrylineError = CoordinatorUnavailable("no coordinator is known")
        for url in urls:  # grows while it is gone through
            silent[url] = now + _ATTEMPT_S + _SILENT_S  # unless it answers; the caller's patience may end before ours
            try:
                answer = await self._send(url, method, path, body)
                silent.pop(url, None)
                return answer
            except FerrylineError as error:
                if not isinstance(error, RequestTimedOut) and not error.details.get("silent"):
                    silent.pop(url, None)
                if not isinstance(error, (ConnectionFailed, CoordinatorStandby)):
                    raise
                last = error
                if (active := hinted(error)) and active not in urls:
                    urls.append(active)
        if isinstance(last, CoordinatorStandby):
            raise last
        raise ConnectionFailed(f"no coordinator answers: {last.message}") from last

    async def _send(self, url: str, method: str, path: str, body: Any, *, token: str = "") -> Any:
        """One request. ``token``: shown instead of the client's own."""
        data = msgspec.json.encode(body) if body is not None else None
        headers = {"Content-Type": "application/json"} if data is not None else {}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        limits = aiohttp.ClientTimeout(total=_ATTEMPT_S, connect=self._client.connector.connect_timeout)
        try:
            async with self._client.connector.http.request(
                method, url + path, data=data, headers=headers, timeout=limits, allow_redirects=False
            ) as response:
                raw = await response.content.read(BODY_BYTES_MAX)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise ConnectionFailed(f"{url}: {error}", url=url, silent=isinstance(error, TimeoutError)) from None
        except (aiohttp.ClientError, OSError) as error:
            raise ConnectionLost(f"{url}: {error or type(error).__name__}", url=url) from None
        except TimeoutError:
            raise RequestTimedOut(f"{url}{path}: no answer within {_ATTEMPT_S:g} s") from None
        if response.status >= 400:
            raise problem_of(response.status, raw)
        return msgspec.json.decode(raw) if raw.strip() else {}


async def ask_broker(
    client: Client,
    broker: int,
    method: str,
    path: str,
    *,
    params: Mapping[str, str],
    data: bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> tuple[Mapping[str, str], bytes]:
    """One request to that broker over REST: headers and body of its answer, within BROKER_ANSWER_S.

    Raises what it refuses with, ConnectionFailed, or RequestTimedOut.
    """
    url = client.routing.address(broker)
    if not url:
        raise ConnectionFailed(f"broker {broker} is not known")
    limits = aiohttp.ClientTimeout(total=BROKER_ANSWER_S, connect=client.connector.connect_timeout)
    try:
        async with client.connector.http.request(
            method, url + path, params=params, data=data, headers=headers, timeout=limits, allow_redirects=False
        ) as response:
            raw = await response.read()
    except (aiohttp.ClientError, OSError) as error:
        raise ConnectionFailed(f"{url}: {error or type(error).__name__}", url=url) from None
    except TimeoutError:
        raise RequestTimedOut(f"{url}{path}: no answer within {BROKER_ANSWER_S:g} s") from None
    if response.status >= 400:
        raise problem_of(response.status, raw)
    return response.headers, raw


_BACKOFF_S = tenacity.wait_random_exponential(multiplier=0.05, max=1.0)


def _pause_s(state: tenacity.RetryCallState) -> float:
    """As long as the service told, or a random time that grows."""
    told = told_ms(state.outcome.exception()) if state.outcome is not None else 0
    return told / 1000 if told else _BACKOFF_S(state)


def _surely_not_sent(error: BaseException) -> bool:
    if isinstance(error, Throttled):
        return told_ms(error) > 0  # refused for now; whoever does not say for how long means a limit of the cluster
    return isinstance(error, (ConnectionFailed, CoordinatorStandby, CoordinatorLoading))


def _worth_another_try(error: BaseException) -> bool:
    return isinstance(error, FerrylineError) and error.retriable


def problem_of(status: int, raw: bytes) -> FerrylineError:
    """Problem details (RFC 9457) back into the error they were made from."""
    try:
        body = msgspec.json.decode(raw)
        code, text = str(body["code"]), str(body.get("detail") or body.get("title") or "")
        details = {str(key): value for key, value in (body.get("details") or {}).items()}
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError):
        return InternalError(f"HTTP {status}: {raw[:200]!r}", status=status)
    kind = BY_CODE.get(code)
    if kind is None:
        return InternalError(f"{code}: {text}", **details)
    details.pop("message", None)
    return kind(text, **details, request_id=str(body.get("request_id", "")))
