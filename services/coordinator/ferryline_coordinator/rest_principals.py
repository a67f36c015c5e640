"""The REST surface of principals and their API keys. One short handler for each route, as in `rest`."""

from __future__ import annotations

import secrets
import time

from aiohttp import web

from ferryline.protocol.access import AccessPolicy, KeyMeta, PrincipalMeta, check_principal
from ferryline.protocol.errors import InvalidArgument, UnknownPrincipal
from ferryline_coordinator.core import events as ev
from ferryline_coordinator.core.tags import principal_tag
from ferryline_coordinator.driver import Driver
from ferryline_coordinator.models_access import AddKey, AlterPrincipal, CreatePrincipal, key_json, principal_json
from ferryline_coordinator.rest import durable_state
from ferryline_service.access.gate import Gate
from ferryline_service.access.keys import ID_BYTES, SECRET_BYTES, make_key
from ferryline_service.conditions import expected, tagged
from ferryline_service.errors import read_json


class PrincipalRest:
    """Handlers by name of what they do; `routes` is the table of contents. Who may ask is the gate's business."""

    def __init__(self, driver: Driver, gate: Gate) -> None:
        self._driver = driver
        self._gate = gate

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/principals", self.create_principal),
            web.get("/v1/principals", self.list_principals),
            web.get("/v1/principals/{principal}", self.get_principal),
            web.patch("/v1/principals/{principal}", self.alter_principal),
            web.delete("/v1/principals/{principal}", self.delete_principal),
            web.post("/v1/principals/{principal}/keys", self.add_key),
            web.delete("/v1/principals/{principal}/keys/{key}", self.remove_key),
        ]

    async def create_principal(self, request: web.Request) -> web.Response:
        """A principal without keys; nothing is granted to it but what the body says."""
        given = CreatePrincipal.model_validate(await read_json(request)).given()
        made = await self._driver.ask(lambda reply: ev.PrincipalCreated(reply, **given))
        return web.json_response(principal_json(made), status=201)

    async def list_principals(self, _: web.Request) -> web.Response:
        """All of them, those that the access file declares included."""
        policy = await self._policy()
        declared = self._declared()
        shown = [principal_json(one, declared=one.name in declared) for one in policy.principals]
        return web.json_response({"principals": sorted(shown, key=lambda one: one["name"])})

    async def get_principal(self, request: web.Request) -> web.Response:
        name = check_principal(request.match_info["principal"])
        for principal in (await self._policy()).principals:
            if principal.name == name:
                shown = principal_json(principal, declared=name in self._declared())
                return tagged(request, shown, principal_tag(principal))
        raise UnknownPrincipal(f"principal {name} does not exist", principal=name)

    async def alter_principal(self, request: web.Request) -> web.Response:
        """Change what the body names. Open sessions get the new grants at once."""
        name = request.match_info["principal"]
        given = AlterPrincipal.model_validate(await read_json(request)).given()
        seen = expected(request)
        altered = await self._driver.ask(lambda reply: ev.PrincipalAltered(reply, name, **given, expected=seen))
        return self._shown(altered)

    async def delete_principal(self, request: web.Request) -> web.Response:
        """Its keys end with it, and so do the sessions that were opened with them."""
        name, text = request.match_info["principal"], request.query.get("version")
        if text is not None and not (text.isascii() and text.isdigit() and len(text) <= 15):
            raise InvalidArgument(f"version: expected a number, got {text[:40]!r}", field="version")
        version = None if text is None else int(text)
        seen = expected(request)
        return self._shown(await self._driver.ask(lambda reply: ev.PrincipalDeleted(reply, name, version, seen)))

    async def add_key(self, request: web.Request) -> web.Response:
        """One more API key. It is in this answer and nowhere else."""
        name = request.match_info["principal"]
        asked = AddKey.model_validate(await read_json(request) if request.body_exists else {})
        key, key_id, digest = make_key(secrets.token_bytes(ID_BYTES + SECRET_BYTES))
        meta = KeyMeta(key_id, digest, time.time_ns() // 1_000_000, asked.expires_ms)
        seen = expected(request)
        principal = await self._driver.ask(lambda reply: ev.KeyAdded(reply, name, meta, seen))
        shown = {"principal": principal.name, "version": principal.version, "key": key, **key_json(meta)}
        return web.json_response(shown, status=201, headers={"Cache-Control": "no-store"})

    async def remove_key(self, request: web.Request) -> web.Response:
        """Sessions that were opened with it end."""
        name, key_id = request.match_info["principal"], request.match_info["key"]
        seen = expected(request)
        return self._shown(await self._driver.ask(lambda reply: ev.KeyRemoved(reply, name, key_id, seen)))

    # -- inside -------------------------------------------------------------------------------------

    async def _policy(self) -> AccessPolicy:
        """The durable one. While access is off: what the records hold."""
        state = await durable_state(self._driver)
        if self._gate.policy is not None and self._gate.policy.enabled:
            return self._gate.policy
        return AccessPolicy(principals=tuple(state.principals.values()))

    def _declared(self) -> frozenset[str]:
        return frozenset(one.name for one in self._driver.access.principals) if self._driver.access else frozenset()

    def _shown(self, principal: PrincipalMeta) -> web.Response:
        headers = {"ETag": f'"{principal_tag(principal)}"'}
        return web.json_response(principal_json(principal), headers=headers)
