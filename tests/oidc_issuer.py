"""An OIDC issuer on the loopback for tests: discovery and keys over HTTP, tokens good and bad, requests counted."""

from __future__ import annotations

import base64
import json
import time
from typing import Any

import jwt
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from ferryline.protocol.access import IssuerMeta

AUDIENCE = "ferryline"


def b64(raw: bytes | str | dict[str, Any]) -> str:
    """base64url without padding; of a dict, of its JSON."""
    if isinstance(raw, dict):
        raw = json.dumps(raw)
    return base64.urlsafe_b64encode(raw.encode() if isinstance(raw, str) else raw).rstrip(b"=").decode()


class Keyring:
    """Private keys by kid, made once: an RSA key takes a moment."""

    def __init__(self) -> None:
        self.rsa = rsa.generate_private_key(65537, 2048)
        self.ec = ec.generate_private_key(ec.SECP256R1())
        self.ed = ed25519.Ed25519PrivateKey.generate()
        self.by_kid: dict[str, tuple[str, Any]] = {
            "rsa-1": ("RS256", self.rsa),
            "ec-1": ("ES256", self.ec),
            "ed-1": ("EdDSA", self.ed),
        }

    def jwk(self, kid: str) -> dict[str, Any]:
        algorithm, key = self.by_kid[kid]
        return jwk_of(algorithm, key.public_key(), kid)


def jwk_of(algorithm: str, public: Any, kid: str) -> dict[str, Any]:
    """A public key as it stands in a JWKS."""
    made = jwt.get_algorithm_by_name(algorithm).to_jwk(public, as_dict=True)
    return {**{name: value for name, value in made.items() if name != "key_ops"}, "kid": kid, "use": "sig"}


class Issuer:
    """``requests``: paths that were asked for. ``down``: answers 503. Use it with ``async with``."""

    def __init__(self, keyring: Keyring) -> None:
        self.keyring = keyring
        self.kids = list(keyring.by_kid)
        self.extra: list[dict[str, Any]] = []  # further members of the JWKS
        self.requests: list[str] = []
        self.down = False
        self.answers: dict[str, Any] = {}  # path -> a response in place of the usual one
        self.url = ""
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Issuer:
        app = web.Application()
        app.router.add_get("/{tail:.*}", self._answer)
        self.add_routes(app)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    def add_routes(self, app: web.Application) -> None:
        """More of them, in a class that answers more."""

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request.path)
        if self.down:
            return web.Response(status=503)
        if request.path in self.answers:
            return self.answers[request.path]()
        if request.path == "/.well-known/openid-configuration":
            return web.json_response({"issuer": self.url, "jwks_uri": f"{self.url}/keys"})
        if request.path == "/keys":
            return web.json_response({"keys": [*(self.keyring.jwk(kid) for kid in self.kids), *self.extra]})
        return web.Response(status=404)

    def meta(self, **changes: Any) -> IssuerMeta:
        return IssuerMeta(**{"name": "test", "issuer": self.url, "audience": AUDIENCE, "leeway_ms": 0, **changes})

    def claims(self, **changes: Any) -> dict[str, Any]:
        """Good ones; a value of None leaves the claim out."""
        now = int(time.time())
        found = {"iss": self.url, "aud": AUDIENCE, "sub": "ann", "iat": now - 1, "exp": now + 600, **changes}
        return {name: value for name, value in found.items() if value is not None}

    def sign(
        self,
        claims: dict[str, Any] | str,
        *,
        kid: str = "rsa-1",
        key: Any = None,
        algorithm: str = "",
        header: dict[str, Any] | str | None = None,
    ) -> str:
        """A token with a signature that fits its bytes, whatever they are. ``header``: members to add, or its text."""
        fitting, private = self.keyring.by_kid.get(kid, ("RS256", self.keyring.rsa))
        algorithm = algorithm or fitting
        if not isinstance(header, str):
            made = {"alg": algorithm, "kid": kid, **(header or {})}
            header = json.dumps({name: value for name, value in made.items() if value is not None})
        body = claims if isinstance(claims, str) else json.dumps(claims)
        signed = f"{b64(header)}.{b64(body)}"
        signature = jwt.get_algorithm_by_name(algorithm).sign(signed.encode(), key or private)
        return f"{signed}.{b64(signature)}"

    def good(self, **changes: Any) -> str:
        return self.sign(self.claims(**changes))
