"""Administration of principals and API keys, and the audit log; a part of `Admin`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote, urlencode

import msgspec

from ferryline.calls import CoordinatorCalls
from ferryline.protocol.access import Grant, Quota, check_grant, check_principal
from ferryline.protocol.errors import BadCredentials, FerrylineError, InvalidArgument, UnknownBroker, VersionConflict

_TRIES = 5  # of a change that others change, too
_SERVED_S = 5.0  # how long brokers may take to hear of a new key
_POLL_S = 0.02


class KeyInfo(msgspec.Struct, frozen=True):
    """An API key without its secret. ``expires_ms`` 0: never."""

    id: str
    created_ms: int = 0
    expires_ms: int = 0


class NewKey(msgspec.Struct, frozen=True):
    """An API key that was just made. ``key`` is the token; nobody can show it again."""

    id: str
    key: str
    expires_ms: int = 0


class PrincipalInfo(msgspec.Struct, frozen=True):
    """Who may do what. ``version`` rises with every change; ``declared``: in the access file of the coordinator."""

    name: str
    grants: tuple[Grant, ...] = ()
    quota: Quota = Quota()
    keys: tuple[KeyInfo, ...] = ()
    disabled: bool = False
    version: int = 0
    comment: str = ""
    declared: bool = False


class Whoami(msgspec.Struct, frozen=True):
    """Whom a service takes this client for, by ``by``: key, token, certificate or nothing.

    ``access`` False: access control is off, and everybody may do everything. ``key``: id of the key that was shown.
    """

    principal: str
    by: str
    access: bool
    grants: tuple[Grant, ...] = ()
    quota: Quota = Quota()
    key: str = ""
    expires_ms: int = 0


class AuditRecords(msgspec.Struct, frozen=True):
    """Some records of an audit log, newest last. ``next``: where to go on; ``more``: there is more to read now."""

    records: list[dict[str, Any]]
    next: str
    more: bool


class AccessAdmin(CoordinatorCalls):
    """Principals, their keys, and what happened. It takes ``manage`` on the cluster, except for `whoami`."""

    async def create_principal(
        self,
        name: str,
        grants: Iterable[Grant] = (),
        *,
        quota: Quota | None = None,
        comment: str = "",
        timeout: float | None = None,
    ) -> PrincipalInfo:
        """Create a principal; it may do what its grants say, and nothing else. Raises Conflict if there is one."""
        body = {
            "name": check_principal(name),
            "grants": _grants(grants),
            "quota": _quota(quota or Quota()),
            "comment": comment,
        }
        return _principal(await self._change("POST", "/v1/principals", body, timeout))

    async def list_principals(self, *, timeout: float | None = None) -> list[PrincipalInfo]:
        """All principals that are known by name: made here, or declared in the access file."""
        found = await self._ask("GET", "/v1/principals", timeout)
        return [_principal(one) for one in found["principals"]]

    async def describe_principal(self, name: str, *, timeout: float | None = None) -> PrincipalInfo:
        """One principal as it is now. Raises UnknownPrincipal."""
        return _principal(await self._ask("GET", _path(name), timeout))

    async def alter_principal(
        self,
        name: str,
        *,
        grants: Iterable[Grant] | None = None,
        quota: Quota | None = None,
        disabled: bool | None = None,
        comment: str | None = None,
        version: int | None = None,
        timeout: float | None = None,
    ) -> PrincipalInfo:
        """Change what is given, and leave the rest. With ``version`` only if nobody changed it since.

        A disabled principal is refused everywhere within a moment, and its sessions are ended. Raises UnknownPrincipal,
        VersionConflict.
        """
        body: dict[str, Any] = {} if version is None else {"version": version}
        if grants is not None:
            body["grants"] = _grants(grants)
        if quota is not None:
            body["quota"] = _quota(quota)
        if disabled is not None:
            body["disabled"] = disabled
        if comment is not None:
            body["comment"] = comment
        if not body.keys() - {"version"}:
            raise InvalidArgument("grants, quota, disabled, comment: at least one is needed", field="grants")
        return _principal(await self._change("PATCH", _path(name), body, timeout))

    async def grant(self, name: str, *grants: Grant, timeout: float | None = None) -> PrincipalInfo:
        """Allow more. Raises UnknownPrincipal."""
        return await self._change_grants(name, grants, (), timeout)

    async def revoke(self, name: str, *grants: Grant, timeout: float | None = None) -> PrincipalInfo:
        """Take the actions in ``grants`` away, on exactly the names and prefixes that stand there.

        Raises UnknownPrincipal.
        """
        return await self._change_grants(name, (), grants, timeout)

    async def delete_principal(self, name: str, *, timeout: float | None = None) -> None:
        """Delete a principal and its keys; its sessions are ended. Raises UnknownPrincipal."""
        await self._change("DELETE", _path(name), None, timeout)

    # -- keys --------------------------------------------------------------------------------------

    async def create_key(self, name: str, *, expires: float | None = None, timeout: float | None = None) -> NewKey:
        """Make an API key, good for ``expires`` seconds (None: until it is deleted), and wait until brokers know it.

        The only time that it is shown. Raises UnknownPrincipal, Conflict when there are too many.
        """
        body = {} if expires is None else {"expires_ms": int((time.time() + expires) * 1000)}
        made = await self._change("POST", f"{_path(name)}/keys", body, timeout)
        key = NewKey(str(made["id"]), str(made["key"]), int(made.get("expires_ms") or 0))
        await self._known_everywhere(key.key, min(self._limit(timeout), _SERVED_S))
        return key

    async def delete_key(self, name: str, key_id: str, *, timeout: float | None = None) -> None:
        """Delete a key: whoever shows it is refused within a moment. Raises UnknownPrincipal, NotFound."""
        await self._change("DELETE", f"{_path(name)}/keys/{quote(key_id, safe='')}", None, timeout)

    # -- who am I, what happened -------------------------------------------------------------------

    async def whoami(self, *, timeout: float | None = None) -> Whoami:
        """Whom the cluster takes this client for, and what it grants. Raises BadCredentials."""
        return msgspec.convert(_readable(await self._ask("GET", "/v1/whoami", timeout)), Whoami)

    async def audit(
        self,
        after: str | None = None,
        *,
        limit: int = 100,
        principal: str = "",
        outcome: str = "",
        broker: int | None = None,
        timeout: float | None = None,
    ) -> AuditRecords:
        """What the coordinator, or a ``broker``, has allowed and refused: the newest records, or those ``after`` a
        cursor ("0": from the beginning). An answer may be empty and have ``more``: what fits is further on.

        Raises UnknownBroker.
        """
        asked = {"after": after, "limit": limit, "principal": principal, "outcome": outcome}
        path = "/v1/audit?" + urlencode({name: value for name, value in asked.items() if value not in (None, "")})
        if broker is None:
            found = await self._ask("GET", path, timeout)
        else:
            await self._refresh(timeout)
            url = self._client.routing.address(broker)
            if not url:
                raise UnknownBroker(f"broker: there is no broker {broker}", broker=broker)
            found = await self._send(url, "GET", path, None)
        return msgspec.convert(found, AuditRecords)

    # -- inside ------------------------------------------------------------------------------------

    async def _change_grants(
        self, name: str, more: Iterable[Grant], less: Iterable[Grant], timeout: float | None
    ) -> PrincipalInfo:
        for left in reversed(range(_TRIES)):
            present = await self.describe_principal(name, timeout=timeout)
            wanted = without_grants(with_grants(present.grants, more), less)
            try:
                return await self.alter_principal(name, grants=wanted, version=present.version, timeout=timeout)
            except VersionConflict:
                if not left:
                    raise
        raise AssertionError("the last try returns or raises")

    async def _known_everywhere(self, token: str, within_s: float) -> None:
        """Wait until every broker that answers takes the token; one that is away hears of it when it comes back."""
        routing = self._client.routing
        live = [broker.id for broker in routing.cluster.brokers.values() if not broker.fenced]
        end = asyncio.get_running_loop().time() + within_s
        await asyncio.gather(*(self._known_by(url, token, end) for id in live if (url := routing.address(id))))

    async def _known_by(self, url: str, token: str, end: float) -> None:
        while asyncio.get_running_loop().time() < end:
            try:
                await self._send(url, "GET", "/v1/whoami", None, token=token)
            except BadCredentials:
                await asyncio.sleep(_POLL_S)
            except FerrylineError:
                return
            else:
                return


def with_grants(present: Iterable[Grant], more: Iterable[Grant]) -> tuple[Grant, ...]:
    """``present`` and ``more``, one grant for each thing."""
    actions: dict[tuple[str, str], dict[str, None]] = {}
    for grant in (*present, *more):
        actions.setdefault((grant.resource, grant.pattern), {}).update(dict.fromkeys(grant.actions))
    return tuple(Grant(resource, pattern, tuple(found)) for (resource, pattern), found in actions.items())


def without_grants(present: Iterable[Grant], less: Iterable[Grant]) -> tuple[Grant, ...]:
    """``present`` without the actions in ``less``, on exactly the things that are named there."""
    gone: dict[tuple[str, str], set[str]] = {}
    for grant in less:
        gone.setdefault((grant.resource, grant.pattern), set()).update(grant.actions)
    left: list[Grant] = []
    for grant in with_grants(present, ()):
        taken = gone.get((grant.resource, grant.pattern), ())
        if kept := tuple(action for action in grant.actions if action not in taken):
            left.append(Grant(grant.resource, grant.pattern, kept))
    return tuple(left)


def _path(name: str) -> str:
    return f"/v1/principals/{quote(check_principal(name), safe='')}"


def _grants(grants: Iterable[Grant]) -> list[dict[str, Any]]:
    return [
        {"resource": grant.resource, "pattern": grant.pattern, "actions": list(grant.actions)}
        for grant in map(check_grant, grants)
    ]


def _quota(quota: Quota) -> dict[str, int]:
    return {name: getattr(quota, name) for name in Quota.__struct_fields__}


def _principal(answer: Any) -> PrincipalInfo:
    return msgspec.convert(_readable(answer), PrincipalInfo)


def _readable(answer: Any) -> dict[str, Any]:
    """Grants and quota stand by name in JSON, and by place on the wire between services."""
    found = {name: value for name, value in answer.items() if value is not None}
    found["grants"] = [Grant(one["resource"], one["pattern"], tuple(one["actions"])) for one in found.get("grants", ())]
    found["quota"] = Quota(**{name: value or 0 for name, value in (found.get("quota") or {}).items()})
    return found
