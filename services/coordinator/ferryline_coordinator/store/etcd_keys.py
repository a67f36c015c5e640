"""Where things stand in etcd, and transactions on them.

<prefix>/coord/active          who is active: {id, claim, coord_epoch, url}; hangs on its lease
<prefix>/coord/epoch           highest coordinator epoch ever won
<prefix>/coord/chain           the last commit: {commit, staged}; every commit is guarded by the one before
<prefix>/coord/members/<id>    URL of a coordinator that runs; hangs on its lease
<prefix>/rec/<key>             one record each, as of `etcd_requests.Values`
<prefix>/stage/<commit>/<n>    parts of a commit that is too large for one transaction
<prefix>/vault/<name>          what coordinators share besides records: CA, key of join tokens, used tokens (`vault`)
"""

from __future__ import annotations

import json

import msgspec

from ferryline_coordinator.store.etcd_client import EtcdClient
from ferryline_coordinator.store.etcd_requests import Json, KeyValue
from ferryline_coordinator.store.interface import StoreUnusable


class Holder(msgspec.Struct, frozen=True):
    """Who is active. ``id`` is of one process life, ``claim`` of one campaign."""

    id: str
    claim: str
    coord_epoch: int
    url: str = ""


class Link(msgspec.Struct, frozen=True):
    """The last commit. ``staged``: parts that have not been copied to the records yet."""

    commit: str = ""
    staged: int = 0


class Keys:
    """Names under one prefix, which one cluster has for itself."""

    def __init__(self, prefix: str) -> None:
        root = "/" + prefix.strip("/") + "/"
        self.active = f"{root}coord/active"
        self.epoch = f"{root}coord/epoch"
        self.chain = f"{root}coord/chain"
        self.members = f"{root}coord/members/"
        self.records = f"{root}rec/"
        self.stage = f"{root}stage/"
        self.vault = f"{root}vault/"

    def record(self, key: str) -> str:
        return self.records + key

    def stage_of(self, commit: str) -> str:
        return f"{self.stage}{commit}/"


def holder_of(kv: KeyValue) -> Holder:
    """Raises StoreUnusable when somebody else wrote it."""
    try:
        return msgspec.json.decode(kv.value, type=Holder)
    except msgspec.MsgspecError as error:
        raise StoreUnusable(f"etcd: {kv.key}: {error}") from None


def link_of(kv: KeyValue | None) -> Link:
    if kv is None:
        return Link()
    try:
        return msgspec.json.decode(kv.value, type=Link)
    except msgspec.MsgspecError as error:
        raise StoreUnusable(f"etcd: {kv.key}: {error}") from None


def epoch_of(kv: KeyValue | None) -> int:
    if kv is None:
        return 0
    try:
        return int(json.loads(kv.value))
    except (ValueError, TypeError):
        raise StoreUnusable(f"etcd: {kv.key}: {kv.value[:40]!r} is no epoch") from None


async def transaction(
    client: EtcdClient,
    compare: list[Json],
    success: list[Json],
    failure: list[Json],
    *,
    within_s: float,
    unanswered: list[str] | None = None,
) -> Json:
    """Whole or not at all. Arguments and errors as of `EtcdClient.call`."""
    body = {"compare": compare, "success": success, "failure": failure}
    return await client.call("kv/txn", body, within_s=within_s, unanswered=unanswered)
