"""A thin client of etcd's JSON gateway: one POST for each call, and another endpoint when one does not answer.

Every request of ours may be repeated: reads, lease calls, and transactions whose guards hold once at most. So a call
goes round the endpoints until somebody answers or its time is up; whoever gets `EtcdUnavailable` cannot know whether a
transaction was applied. What etcd refuses for good is `EtcdRefused`.

An answer of another etcd cluster than the first one's is never used: guards mean nothing across two clusters.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import ssl
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from ferryline_coordinator.store.interface import StoreUnusable

ATTEMPT_S = 1.0  # the first try at an endpoint; later ones get more, for an etcd that is slow and not dead
_ATTEMPT_MAX_S = 4.0
_CONNECT_S = 0.7
_PAUSE_S = 0.05  # after a round of all endpoints
_ANSWER_BYTES_MAX = 256 * 1024 * 1024
# Codes of gRPC: refused for good. Everything else is worth another endpoint.
_INVALID, _NOT_FOUND, _EXISTS, _DENIED, _EXHAUSTED, _PRECONDITION, _OUT_OF_RANGE = 3, 5, 6, 7, 8, 9, 11
_UNIMPLEMENTED, _UNAUTHENTICATED = 12, 16
_FINAL = {_INVALID, _NOT_FOUND, _EXISTS, _DENIED, _PRECONDITION, _OUT_OF_RANGE, _UNIMPLEMENTED}
NO_SPACE = "database space exceeded"
NO_TOKEN = ("invalid auth token", "auth token is not provided", "user name is empty")


class EtcdUnavailable(Exception):
    """Nobody answered in time. A transaction may have been applied or not."""


class EtcdRefused(Exception):
    """etcd answered with a refusal: nothing was applied."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code

    @property
    def not_found(self) -> bool:
        return self.code == _NOT_FOUND

    @property
    def no_space(self) -> bool:
        return NO_SPACE in str(self)

    @property
    def compacted(self) -> bool:
        return self.code == _OUT_OF_RANGE


def text(raw: bytes | str) -> str:
    """Bytes as the gateway wants them."""
    return base64.b64encode(raw.encode() if isinstance(raw, str) else raw).decode()


def raw(encoded: Any) -> bytes:
    """Bytes of an answer. Raises StoreUnusable when it is not base64."""
    try:
        return base64.b64decode(encoded or "", validate=True)
    except (ValueError, TypeError):
        raise StoreUnusable("etcd: an answer holds what is not base64") from None


def number(value: Any) -> int:
    """An int64 of an answer: the gateway sends text, and leaves zeros out."""
    try:
        return int(value or 0)
    except (ValueError, TypeError):
        raise StoreUnusable(f"etcd: an answer holds {str(value)[:40]!r} for a number") from None


class EtcdClient:
    """``endpoints``: URLs of the members. ``tls``: context with CA and, if etcd wants one, our certificate."""

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        tls: ssl.SSLContext | None = None,
        user: str = "",
        password: str = "",
    ) -> None:
        self.endpoints = [endpoint.rstrip("/") for endpoint in endpoints]
        self._tls = tls
        self._user, self._password = user, password
        self._token = ""
        self._turn = 0
        self._cluster = 0
        self._http: aiohttp.ClientSession | None = None

    async def call(
        self, path: str, body: dict[str, Any], *, within_s: float, unanswered: list[str] | None = None
    ) -> dict[str, Any]:
        """The answer to ``POST /v3/<path>``, from whichever endpoint gives one.

        ``unanswered`` collects the tries before it that had no answer, any of which may have been applied.
        Raises EtcdUnavailable, EtcdRefused, StoreUnusable.
        """
        end = time.monotonic() + within_s
        attempt_s, last, tries = ATTEMPT_S, "no time was given", 0
        while (left := end - time.monotonic()) > 0:
            try:
                return await self._attempt(path, body, min(left, attempt_s))
            except EtcdUnavailable as error:
                last = str(error)
                if unanswered is not None:
                    unanswered.append(last)
            self._turn += 1
            tries += 1
            if tries % len(self.endpoints) == 0:
                attempt_s = min(attempt_s * 1.5, _ATTEMPT_MAX_S)
                await asyncio.sleep(min(_PAUSE_S, max(0.0, end - time.monotonic())))
        raise EtcdUnavailable(last)

    async def _attempt(self, path: str, body: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        if self._user and not self._token:
            await self._authenticate(timeout_s)
        try:
            return await self._post(path, body, timeout_s)
        except EtcdRefused as refused:
            if not self._user or not any(words in str(refused) for words in NO_TOKEN):
                raise
            self._token = ""  # tokens end after some minutes
            raise EtcdUnavailable(str(refused)) from None

    async def _authenticate(self, timeout_s: float) -> None:
        answer = await self._post("auth/authenticate", {"name": self._user, "password": self._password}, timeout_s)
        token = answer.get("token")
        if not isinstance(token, str) or not token:
            raise StoreUnusable("etcd: the answer to a log-in holds no token")
        self._token = token

    async def _post(self, path: str, body: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        endpoint = self.endpoints[self._turn % len(self.endpoints)]
        try:
            async with asyncio.timeout(timeout_s), self._request(endpoint, path, body) as response:
                content = await response.content.read(_ANSWER_BYTES_MAX)
                while chunk := await response.content.read(_ANSWER_BYTES_MAX):
                    content += chunk
                    if len(content) > _ANSWER_BYTES_MAX:
                        raise StoreUnusable(f"{endpoint}: an answer is over {_ANSWER_BYTES_MAX} bytes")
                status = response.status
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise EtcdUnavailable(f"{endpoint}: {type(error).__name__}: {str(error)[:200]}") from None
        answer = _decoded(endpoint, content)
        if status >= 400 or "error" in answer:
            raise _refusal(endpoint, status, answer)
        if isinstance(answer.get("result"), dict):  # streaming calls wrap each answer
            answer = answer["result"]
        self._check_cluster(endpoint, answer)
        return answer

    def _check_cluster(self, endpoint: str, answer: dict[str, Any]) -> None:
        header = answer.get("header")
        cluster = number(header.get("cluster_id")) if isinstance(header, dict) else 0
        if not cluster:
            return
        if self._cluster and cluster != self._cluster:
            raise StoreUnusable(f"{endpoint} belongs to etcd cluster {cluster:x}, others to {self._cluster:x}")
        self._cluster = cluster

    async def watched(self, key: str, from_revision: int, *, within_s: float) -> bool:
        """Whether something happened to ``key`` since ``from_revision``, at the latest after ``within_s`` seconds.

        A hint: a member that is cut off from the others reports nothing. Raises EtcdUnavailable, EtcdRefused.
        """
        endpoint = self.endpoints[self._turn % len(self.endpoints)]
        body = {"create_request": {"key": text(key), "start_revision": str(from_revision)}}
        try:
            async with asyncio.timeout(within_s), self._request(endpoint, "watch", body) as response:
                while line := await response.content.readline():
                    answer = _decoded(endpoint, line)
                    if "error" in answer:
                        raise EtcdUnavailable(f"{endpoint}: {str(answer['error'])[:200]}")
                    result = answer.get("result")
                    if isinstance(result, dict) and (result.get("events") or result.get("canceled")):
                        return True
        except TimeoutError:
            return False
        except (aiohttp.ClientError, OSError, ValueError) as error:
            self._turn += 1
            raise EtcdUnavailable(f"{endpoint}: {type(error).__name__}: {str(error)[:200]}") from None
        self._turn += 1
        raise EtcdUnavailable(f"{endpoint}: the watch ended")

    @asynccontextmanager
    async def _request(self, endpoint: str, path: str, body: dict[str, Any]) -> AsyncIterator[aiohttp.ClientResponse]:
        if self._http is None or self._http.closed:
            self._http = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=64, keepalive_timeout=30),
                timeout=aiohttp.ClientTimeout(total=None, connect=_CONNECT_S),
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        headers = {"Content-Type": "application/json"}
        if self._token:
            headers["Authorization"] = self._token
        async with self._http.post(
            f"{endpoint}/v3/{path}",
            data=io.BytesIO(json.dumps(body).encode()),
            headers=headers,
            ssl=self._tls if self._tls is not None else True,
            allow_redirects=False,
        ) as response:
            yield response

    async def close(self) -> None:
        if self._http is not None:
            await self._http.close()
            await asyncio.sleep(0)  # TLS transports end in the next turns of the loop
            await asyncio.sleep(0)


def _decoded(endpoint: str, content: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(content)
    except ValueError:
        raise EtcdUnavailable(f"{endpoint}: the answer is not JSON: {content[:80]!r}") from None
    if not isinstance(answer, dict):
        raise EtcdUnavailable(f"{endpoint}: the answer is not an object: {content[:80]!r}")
    return answer


def _refusal(endpoint: str, status: int, answer: dict[str, Any]) -> Exception:
    told = answer.get("error")
    if isinstance(told, dict):  # of a streaming call
        code, message = number(told.get("grpc_code")), str(told.get("message", ""))
    else:
        code, message = number(answer.get("code")), str(answer.get("message") or told or "")
    message = f"{endpoint}: {message[:300] or f'HTTP {status}'}"
    if code in _FINAL or code == _UNAUTHENTICATED or (code == _EXHAUSTED and NO_SPACE in message):
        return EtcdRefused(code, message)
    return EtcdUnavailable(message)
