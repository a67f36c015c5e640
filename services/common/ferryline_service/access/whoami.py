"""`GET /v1/whoami`: whoever asks learns how this service knows them, and what they may do."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from ferryline_service.access.caller import EVERYBODY, Caller
from ferryline_service.access.gate import CALLER, Gate

PATH = "/v1/whoami"


class WhoamiRest:
    """One route."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def routes(self) -> list[web.RouteDef]:
        return [web.get(PATH, self.whoami)]

    async def whoami(self, request: web.Request) -> web.Response:
        """Who asks, by which credential, and what is granted. Access is off where everybody may do everything."""
        policy = self._gate.policy
        shown = {
            **caller_json(request[CALLER]),
            "service": self._gate.service,
            "access": policy is not None and policy.enabled,
            "revision": policy.revision if policy is not None else 0,
        }
        return web.json_response(shown)


def caller_json(caller: Caller) -> dict[str, Any]:
    """``by``: certificate, key, token or nothing. Times in ms, 0 for never."""
    if caller.service:
        by = "nothing" if caller.name == EVERYBODY else "certificate"
    else:
        by = "key" if caller.key_id else "token"
    return {
        "principal": caller.name,
        "by": by,
        "key": caller.key_id or None,
        "expires_ms": caller.expires_ms,
        "grants": [
            {"resource": grant.resource, "pattern": grant.pattern, "actions": list(grant.actions)}
            for grant in caller.grants
        ],
        "quota": {name: getattr(caller.quota, name) for name in caller.quota.__struct_fields__},
    }
