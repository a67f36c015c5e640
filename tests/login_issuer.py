"""`tests.oidc_issuer.Issuer` with what a login needs: codes, devices, refresh tokens that are good once, revocation."""

from __future__ import annotations

import secrets
import time
from typing import Any
from urllib.parse import urlencode

from aiohttp import web

from ferryline.login.flow import Client
from tests.oidc_issuer import Issuer, Keyring


class LoginIssuer(Issuer):
    """``seen``: bodies of requests for tokens, in order. ``id_claims``: changes of the next ID tokens. ``broken``: an
    answer in place of the next ones. ``life_s``: of tokens. A refresh token that is used twice ends its login."""

    def __init__(self, keyring: Keyring) -> None:
        super().__init__(keyring)
        self.seen: list[dict[str, str]] = []
        self.id_claims: dict[str, Any] = {}
        self.broken: tuple[int, Any] | None = None
        self.life_s = 600
        self.pending = 1  # answers to a device before the person has typed the code
        self.revoked: list[str] = []
        self._nonce = ""
        self._good: set[str] = set()
        self._used: set[str] = set()
        self.reused = False

    def client(self, **changes: Any) -> Client:
        return Client(**{"issuer": self.url, "client_id": "cli", "audience": "cli", **changes})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/.well-known/openid-configuration" and not self.down and request.path not in self.answers:
            names = {
                "authorization": "auth",
                "token": "token",
                "device_authorization": "device",
                "revocation": "revoke",
            }
            endpoints = {f"{name}_endpoint": f"{self.url}/{path}" for name, path in names.items()}
            return web.json_response({"issuer": self.url, "jwks_uri": f"{self.url}/keys", **endpoints})
        return await super()._answer(request)

    def redirected(self, query: dict[str, str], **changes: str) -> str:
        """Where a browser that asked for this goes after the person has logged in."""
        self._nonce = query["nonce"]
        found = {"code": "the-code", "state": query["state"], "iss": self.url, **changes}
        return f"{query['redirect_uri']}?{urlencode({name: value for name, value in found.items() if value})}"

    async def post(self, request: web.Request) -> web.Response:
        body = {name: str(value) for name, value in (await request.post()).items()}
        if self.down:
            return web.Response(status=503)
        if self.broken is not None:
            return web.json_response(self.broken[1], status=self.broken[0])
        if request.path == "/revoke":
            self.revoked.append(body["token"])
            return web.Response()
        if request.path == "/device":
            answer = {"device_code": "d", "user_code": "WDJB", "verification_uri": f"{self.url}/type", "interval": 0.1}
            return web.json_response({**answer, "expires_in": 60})
        self.seen.append(body)
        if body["grant_type"].endswith("device_code") and self.pending:
            self.pending -= 1
            return web.json_response({"error": "authorization_pending"}, status=400)
        if body["grant_type"] == "refresh_token":
            token = body["refresh_token"]
            if token in self._used:
                self.reused = True
                self._good.clear()
            if token not in self._good:
                return web.json_response({"error": "invalid_grant"}, status=400)
            self._good.discard(token)
            self._used.add(token)
        return web.json_response(self.answer())

    def answer(self) -> dict[str, Any]:
        """What the token endpoint says."""
        refresh = secrets.token_hex(8)
        self._good.add(refresh)
        now = int(time.time())
        nonce = self._nonce or None
        claims = self.claims(aud="cli", nonce=nonce, exp=now + self.life_s, iat=now, jti=refresh, **self.id_claims)
        return {"id_token": self.sign(claims), "access_token": "opaque", "refresh_token": refresh}

    def add_routes(self, app: web.Application) -> None:
        app.router.add_post("/{tail:.*}", self.post)
