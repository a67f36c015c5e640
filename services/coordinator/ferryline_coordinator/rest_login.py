"""`GET /v1/login`: what `ferryline login` must know before anybody is logged in."""

from __future__ import annotations

from aiohttp import web

from ferryline.protocol.errors import NotReady
from ferryline_service.access.gate import Gate


class LoginRest:
    """One route, open to everybody: nothing that it tells lets anybody in."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/v1/login", self.issuers)]

    async def issuers(self, _: web.Request) -> web.Response:
        """The issuers with which people log in here, and under which name programs ask them for tokens."""
        policy = self._gate.policy
        if policy is None:  # a standby: another coordinator knows
            raise NotReady("this coordinator does not know yet who may do what")
        issuers = policy.issuers if policy.enabled else ()
        shown = [
            {
                "name": issuer.name,
                "issuer": issuer.issuer,
                "audience": issuer.audience,
                "client_id": issuer.client_id,
                "client_secret": issuer.client_secret,
                "scopes": list(issuer.scopes),
            }
            for issuer in issuers
            if issuer.client_id
        ]
        return web.json_response({"issuers": shown})
