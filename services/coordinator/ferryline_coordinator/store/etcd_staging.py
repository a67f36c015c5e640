"""Commits that are too large for one transaction of etcd (128 operations, 1.5 MiB), all or nothing all the same.

    1. parts of the packed commit are written under ``stage/<commit>/``; their transactions check the guards, too
    2. one transaction moves the chain to this commit: from here on it has happened
    3. the records are copied to where they belong, in as many transactions as it takes
    4. the chain says that nothing is staged any more, and the parts go

Whoever loads between 2 and 4 reads the records through the parts, and its first commit finishes the copying. Nobody can
commit between 1 and 2 unnoticed: the chain would have moved.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from ferryline_coordinator.store.etcd_client import EtcdClient, EtcdRefused, EtcdUnavailable, text
from ferryline_coordinator.store.etcd_keys import Keys, Link, transaction
from ferryline_coordinator.store.etcd_requests import (
    Json,
    KeyValue,
    created_at,
    delete,
    delete_below,
    found,
    get,
    modified_at,
    put,
    revision_of,
)
from ferryline_coordinator.store.interface import Outcome, StoreUnusable

OPERATIONS_MAX = 100  # of a transaction; etcd's own limit is 128 of each kind, unless it was told otherwise
REQUEST_BYTES_MAX = 1024 * 1024  # etcd's limit for a request is 1.5 MiB
RECORD_BYTES_MAX = 1_200_000
_AT_ONCE = 8
_CALL_S = 4.0
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[tuple[str, bytes | None]])

Items = list[tuple[str, bytes | None]]  # (key in etcd, wrapped value or None: deleted)


class Lost(Exception):
    """Primaryship is over."""


class Staging:
    """Steps 1 to 4 for one prefix. ``own`` is the create revision of the active key, ``chain`` the chain's last one."""

    def __init__(self, client: EtcdClient, keys: Keys) -> None:
        self._client = client
        self._keys = keys

    async def stage(self, commit: str, items: Items, guards: Sequence[Json], own: int) -> tuple[Outcome, int]:
        """Step 1: (OK, number of parts), or why nothing can be committed. Raises EtcdUnavailable."""
        packed = _encoder.encode(items)
        parts = [packed[at : at + REQUEST_BYTES_MAX] for at in range(0, len(packed), REQUEST_BYTES_MAX)] or [b""]
        slices = [guards[at : at + OPERATIONS_MAX] for at in range(0, len(guards), OPERATIONS_MAX)]
        mine = created_at(self._keys.active, own)
        requests: list[tuple[list[Json], list[Json]]] = []
        for number in range(max(len(parts), len(slices))):
            puts = [put(f"{self._keys.stage_of(commit)}{number:06}", parts[number])] if number < len(parts) else []
            requests.append(([mine, *(slices[number] if number < len(slices) else [])], puts))
        for answer in await self._all(requests, [get(self._keys.active)]):
            if answer.get("succeeded"):
                continue
            await self._drop(commit, own)
            holder = found(answer["responses"][0]["response_range"])
            return (Outcome.CONFLICT if holder and holder[0].created == own else Outcome.LOST), 0
        return Outcome.OK, len(parts)

    async def read(self, link: Link, revision: int = 0) -> Items:
        """The parts of a staged commit, put together. Raises EtcdUnavailable, EtcdRefused, StoreUnusable."""
        prefix = self._keys.stage_of(link.commit)
        content = b""
        for number in range(link.staged):
            body: Json = {"key": text(f"{prefix}{number:06}")}
            if revision:
                body["revision"] = str(revision)
            kvs = found(await self._client.call("kv/range", body, within_s=_CALL_S))
            if not kvs:
                raise StoreUnusable(f"etcd: part {number} of commit {link.commit} is missing")
            content += kvs[0].value
        try:
            return _decoder.decode(content)
        except msgspec.MsgspecError as error:
            raise StoreUnusable(f"etcd: commit {link.commit}: {error}") from None

    async def copy(self, link: Link, items: Items, own: int, chain: int) -> tuple[int, dict[str, int]]:
        """Steps 3 and 4. Returns the chain's new revision and where each key was written. May be repeated.

        Raises Lost, EtcdUnavailable, EtcdRefused.
        """
        compare = [created_at(self._keys.active, own), modified_at(self._keys.chain, chain)]
        groups = _groups(items)
        requests = [
            (compare, [delete(key) if value is None else put(key, value) for key, value in group]) for group in groups
        ]
        moved: dict[str, int] = {}
        for group, answer in zip(groups, await self._all(requests, []), strict=True):
            if not answer.get("succeeded"):
                raise Lost
            moved.update({key: revision_of(answer) for key, value in group if value is not None})
        done = msgspec.json.encode(Link(link.commit, 0))
        success = [put(self._keys.chain, done), delete_below(self._keys.stage)]
        answer = await transaction(self._client, compare, success, [get(self._keys.chain)], within_s=_CALL_S)
        if answer.get("succeeded"):
            return revision_of(answer), moved
        chained: list[KeyValue] = found(answer["responses"][0]["response_range"])
        if chained and chained[0].value == done:  # an earlier try of this request was applied
            return chained[0].modified, moved
        raise Lost

    async def _all(self, requests: Sequence[tuple[list[Json], list[Json]]], failure: list[Json]) -> list[Json]:
        """Transactions that do not depend on one another, some at a time: etcd flushes them together."""
        turns = asyncio.Semaphore(_AT_ONCE)

        async def one(compare: list[Json], success: list[Json]) -> Json:
            async with turns:
                return await transaction(self._client, compare, success, failure, within_s=_CALL_S)

        tasks = [asyncio.ensure_future(one(compare, success)) for compare, success in requests]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _drop(self, commit: str, own: int) -> None:
        compare = [created_at(self._keys.active, own)]
        try:
            await transaction(self._client, compare, [delete_below(self._keys.stage_of(commit))], [], within_s=_CALL_S)
        except (EtcdUnavailable, EtcdRefused):
            pass  # the next one to win primaryship removes what nobody committed


def _groups(items: Items) -> list[Items]:
    """Items in transactions that etcd takes."""
    groups: list[Items] = []
    size = REQUEST_BYTES_MAX
    for key, value in items:
        cost = len(key) + len(value or b"")
        if not groups or size + cost > REQUEST_BYTES_MAX or len(groups[-1]) >= OPERATIONS_MAX:
            groups.append([])
            size = 0
        groups[-1].append((key, value))
        size += cost
    return groups
