"""Principals, grants and quotas as JSON, for the REST surface and the access file alike."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ferryline.protocol.access import Grant, KeyMeta, PrincipalMeta, Quota
from ferryline_coordinator.models import Body, as_json


class GrantIn(Body):
    """``actions`` on resources of one type. The cluster has no names: its pattern is ``*``."""

    resource: str = Field(description="topic, group, exchange or cluster")
    pattern: str = Field("*", description="a name, or a prefix with * at its end")
    actions: list[str] = Field(description="of read, write and manage; manage implies the others")

    def meta(self) -> Grant:
        return Grant(self.resource, self.pattern, tuple(self.actions))


class QuotaIn(Body):
    """Rates are per second over the whole cluster; 0: no limit."""

    requests: int = 0
    records: int = 0
    bytes: int = 0
    connections: int = Field(0, description="sessions and streams open at one service")
    stored_bytes: int = Field(0, description="of the topics that the principal has created")

    def meta(self) -> Quota:
        return Quota(**self.model_dump())


class CreatePrincipal(Body):
    """A principal without keys: they are made one by one, and shown once."""

    name: str
    grants: list[GrantIn] = []
    quota: QuotaIn = QuotaIn()
    disabled: bool = False
    comment: str = ""

    def given(self) -> dict[str, Any]:
        """What the event of the core takes."""
        return {
            "name": self.name,
            "grants": tuple(grant.meta() for grant in self.grants),
            "quota": self.quota.meta(),
            "disabled": self.disabled,
            "comment": self.comment,
        }


class AlterPrincipal(Body):
    """What is left out stays. ``version``: refuse if the principal has been changed since it had this one."""

    grants: list[GrantIn] | None = None
    quota: QuotaIn | None = None
    disabled: bool | None = None
    comment: str | None = None
    version: int | None = None

    def given(self) -> dict[str, Any]:
        """What the event of the core takes."""
        return {
            "grants": None if self.grants is None else tuple(grant.meta() for grant in self.grants),
            "quota": None if self.quota is None else self.quota.meta(),
            "disabled": self.disabled,
            "comment": self.comment,
            "version": self.version,
        }


class AddKey(Body):
    """``expires_ms``: wall clock time from which the key is refused; 0: never."""

    expires_ms: int = Field(0, ge=0, le=2**53)


def key_json(key: KeyMeta) -> dict[str, Any]:
    """A key without its digest: nobody needs it, and it is half of what a guess could be checked with."""
    return {"id": key.id, "created_ms": key.created_ms, "expires_ms": key.expires_ms}


def principal_json(principal: PrincipalMeta, *, declared: bool = False) -> dict[str, Any]:
    """``declared``: it stands in the access file and is changed there."""
    return {
        "name": principal.name,
        "grants": [as_json(grant) for grant in principal.grants],
        "quota": as_json(principal.quota),
        "keys": [key_json(key) for key in principal.keys],
        "disabled": principal.disabled,
        "comment": principal.comment,
        "version": principal.version,
        "declared": declared,
    }
