"""Requests to an issuer: discovery, tokens for a code, a device or a refresh token, and revocation."""

from __future__ import annotations

import json
import ssl
from typing import Any, Self

import aiohttp

from ferryline.login.flow import Client, Endpoints, discovery_url, endpoints, for_audience, said
from ferryline.protocol.errors import BadCredentials, ConnectionFailed, InvalidArgument

ANSWER_S = 15.0
ANSWER_BYTES_MAX = 256 * 1024


class Issuer:
    """One issuer. ``ca``: path of a CA's certificate, None for what the system trusts. Use it with ``async with``."""

    def __init__(self, issuer: str, *, ca: str | None = None) -> None:
        self.issuer = issuer
        self._discovery = discovery_url(issuer)
        try:
            context = ssl.create_default_context(cafile=ca)
        except (OSError, ssl.SSLError) as error:
            raise InvalidArgument(f"issuer_ca: {ca!r}: {error}", field="issuer_ca") from None
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._ssl = context
        self._http: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=self._ssl),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=ANSWER_S),
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._http is not None:
            await self._http.close()

    async def discover(self) -> Endpoints:
        """Raises ConnectionFailed, InvalidArgument."""
        status, answer = await self._ask("GET", self._discovery)
        if status != 200:
            raise ConnectionFailed(f"{self._discovery}: answered {status}")
        return endpoints(self.issuer, answer)

    async def tokens(self, url: str, client: Client, **asked: str) -> Any:
        """What the token endpoint answers. Raises BadCredentials with what it said, its ``error`` in the details."""
        fields = {"client_id": client.client_id, **for_audience(client), **asked}
        if client.client_secret:
            fields["client_secret"] = client.client_secret
        status, answer = await self._ask("POST", url, fields)
        if status == 200:
            return answer
        if status >= 500 or not isinstance(answer, dict):
            raise ConnectionFailed(f"{url}: answered {status}")
        raise BadCredentials(f"the issuer refused: {said(answer)}", reason="refused", error=str(answer.get("error")))

    async def post(self, url: str, fields: dict[str, str]) -> tuple[int, Any]:
        return await self._ask("POST", url, fields)

    async def _ask(self, method: str, url: str, fields: dict[str, str] | None = None) -> tuple[int, Any]:
        """Status and JSON (None for anything else). No redirect is followed: secrets go where discovery said."""
        assert self._http is not None, "use it with async with"
        headers = {"Accept": "application/json"}
        try:
            async with self._http.request(method, url, data=fields, headers=headers, allow_redirects=False) as response:
                raw = await response.content.read(ANSWER_BYTES_MAX)
                while not response.content.at_eof() and len(raw) < ANSWER_BYTES_MAX:
                    raw += await response.content.read(ANSWER_BYTES_MAX)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise ConnectionFailed(f"{url}: {error or type(error).__name__}", url=url) from None
        try:
            return response.status, json.loads(raw)
        except (ValueError, RecursionError):
            return response.status, None
