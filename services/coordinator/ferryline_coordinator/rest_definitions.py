"""The REST surface of definitions: everything that a cluster is told to be, out of it and into it.

``GET /v1/definitions``
``PUT /v1/definitions?dry_run=&keys_move=``    what GET has shown, here or elsewhere
"""

from __future__ import annotations

import uuid
from typing import Any

from aiohttp import web
from msgspec.structs import replace

from ferryline.protocol import access
from ferryline.protocol.errors import Conflict, FerrylineError, Forbidden, InvalidArgument
from ferryline_coordinator.access_rules import check_dead_letters
from ferryline_coordinator.core import events as ev
from ferryline_coordinator.definitions import (
    ADD_PARTITIONS,
    BINDING,
    CONFLICT,
    CREATE,
    EXCHANGE,
    PRINCIPAL,
    TOPIC,
    UNCHANGED,
    Definitions,
    Step,
    check,
    exported,
    planned,
)
from ferryline_coordinator.driver import Driver
from ferryline_coordinator.rest import durable_state
from ferryline_service.access.audited import tell
from ferryline_service.access.caller import UNCHECKED, Caller
from ferryline_service.access.gate import CALLER
from ferryline_service.conditions import digest_of, tagged
from ferryline_service.errors import read_json

_RESOURCES = {
    TOPIC: access.TOPIC,
    EXCHANGE: access.EXCHANGE,
    BINDING: access.EXCHANGE,
    PRINCIPAL: access.CLUSTER,
}


class DefinitionRest:
    """Handlers of the routes above. Each item is done, refused and told by itself."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/v1/definitions", self.get_definitions), web.put("/v1/definitions", self.put_definitions)]

    async def get_definitions(self, request: web.Request) -> web.Response:
        """Topics, exchanges and principals that the caller may read, as `PUT` takes them."""
        state, caller = await durable_state(self._driver), request.get(CALLER, UNCHECKED)
        names = sorted(topic.name for topic in state.topics.values())
        topics = [name for name in names if caller.may(access.READ, access.TOPIC, name)]
        exchanges = [name for name in sorted(state.exchanges) if caller.may(access.READ, access.EXCHANGE, name)]
        all_of_them = caller.may(access.MANAGE, access.CLUSTER, "*")
        principals = [state.principals[name] for name in sorted(state.principals)] if all_of_them else []
        shown = exported(state, topics, exchanges, principals)
        return tagged(request, shown, digest_of(shown))

    async def put_definitions(self, request: web.Request) -> web.Response:
        """Make and change what the document names; nothing is deleted. Doing it again changes nothing."""
        caller = request.get(CALLER, UNCHECKED)
        dry_run, keys_move = _flag(request, "dry_run"), _flag(request, "keys_move")
        wanted = Definitions.model_validate(await read_json(request))
        check(wanted)
        steps = planned(await durable_state(self._driver), wanted)
        results: list[dict[str, Any]] = []
        for step in steps:
            error = await self._done(step, caller, dry_run, keys_move)
            if step.action != UNCHANGED and not dry_run:
                tell(request, f"definitions_{step.action}", step.kind, step.exchange or step.name, error)
            if step.kind == PRINCIPAL and isinstance(error, Forbidden):  # whether there is one, and what it may do
                step = replace(step, action=CONFLICT, detail="")
            told: dict[str, Any] = {"kind": step.kind, "name": step.name, "action": step.action, "detail": step.detail}
            if error is not None:
                told["error"] = {"code": error.code, "detail": error.message, "retriable": error.retriable}
            results.append(told)
        failed = [one["error"]["code"] for one in results if "error" in one]
        if failed and len(failed) == len(results) and set(failed) == {Forbidden.code}:
            raise Forbidden(f"{caller.name} may change none of what the document names", principal=caller.name)
        changed = sum(one["action"] != UNCHANGED and "error" not in one for one in results)
        shown = {"dry_run": dry_run, "changed": changed, "failed": len(failed), "results": results}
        return web.json_response(shown, status=207 if failed else 200)

    # -- inside -------------------------------------------------------------------------------------

    async def _done(self, step: Step, caller: Caller, dry_run: bool, keys_move: bool) -> FerrylineError | None:
        """Carry out one step. Returns what stood in its way."""
        try:
            resource = _RESOURCES[step.kind]
            named = step.exchange or step.name
            caller.check(access.MANAGE, resource, "*" if resource == access.CLUSTER else named)
            if step.kind == TOPIC:
                check_dead_letters(caller, self._driver.state, step.name, step.settings)
            if step.action == CONFLICT:
                raise Conflict(step.detail)
            if step.action == ADD_PARTITIONS and not keys_move:
                raise Conflict(f"{step.detail} to other partitions; say keys_move=true to accept that")
            if step.action != UNCHANGED and not dry_run:
                await self._driver.ask(lambda reply: _event(reply, step, caller.owner))
        except FerrylineError as error:
            return error
        return None


def _event(reply: int, step: Step, owner: str) -> ev.Event:
    if step.kind == TOPIC:
        if step.action == CREATE:
            return ev.TopicCreated(reply, step.name, uuid.uuid4().hex, step.settings, owner)
        if step.action == ADD_PARTITIONS:
            return ev.PartitionsAdded(reply, step.name, step.settings["partitions"], True)
        return ev.TopicAltered(reply, step.name, step.settings)
    if step.kind == EXCHANGE:
        return ev.ExchangeCreated(reply, step.name, step.type, step.detail)
    if step.kind == PRINCIPAL:
        made = ev.PrincipalCreated if step.action == CREATE else ev.PrincipalAltered
        return made(reply, **step.settings)
    assert step.binding is not None
    return ev.BindingAdded(reply, step.exchange, step.binding)


def _flag(request: web.Request, name: str) -> bool:
    text = request.query.get(name, "false")
    if text not in ("true", "false", "1", "0"):
        raise InvalidArgument(f"{name}: {text[:40]!r} is neither true nor false", field=name)
    return text in ("true", "1")
