"""`MetaStore` on etcd, for several coordinators of which one is active.

Safety comes from etcd's guards alone, never from clocks. A commit is one transaction that holds only if

* the active key is still the one that this coordinator created (its create revision), and
* the chain key is still where this coordinator's last commit left it, and
* every record that the commit names is at the version that the caller knows (its mod revision).

So a commit that was sent twice, or arrives late, is applied once at most; a coordinator that was replaced commits
nothing, however late it notices. The lease only says when others may go on, and `holds` keeps us from answering in the
meantime.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping, Sequence

import msgspec

from ferryline_coordinator.store.etcd_campaign import Candidate, Refuses
from ferryline_coordinator.store.etcd_client import EtcdClient, EtcdRefused, EtcdUnavailable, text
from ferryline_coordinator.store.etcd_keys import (
    Keys,
    Link,
    link_of,
    transaction,
)
from ferryline_coordinator.store.etcd_requests import (
    Json,
    Values,
    after,
    created_at,
    delete,
    found,
    get,
    modified_at,
    put,
    ranges,
    revision_of,
)
from ferryline_coordinator.store.etcd_staging import (
    OPERATIONS_MAX,
    RECORD_BYTES_MAX,
    REQUEST_BYTES_MAX,
    Items,
    Lost,
    Staging,
)
from ferryline_coordinator.store.interface import Committed, Loaded, Outcome, Primaryship, StoreUnusable
from ferryline_service.logs import get_logger

COMMIT_S = 4.0  # a commit that nobody answered for this long has ended as UNKNOWN
_CALL_S = 4.0
_RETRY_S, _RETRY_MAX_S = 0.1, 1.0
_PAGE = 2_000  # keys of one range
_COMPACT_S = 300.0  # history older than this is given up; nobody reads it
_log = get_logger()


class EtcdStore:
    """One coordinator's view of one cluster. ``url`` is told to others."""

    def __init__(
        self,
        client: EtcdClient,
        *,
        prefix: str = "ferryline",
        url: str = "",
        ttl_s: float = 5.0,
        values: Values | None = None,
        refuses: Refuses | None = None,
        compact: bool = True,
    ) -> None:
        self._client = client
        self._keys = Keys(prefix)
        self._values = values or Values()
        self._compact = compact
        self._candidate = Candidate(client, self._keys, url, ttl_s, refuses)
        self._staging = Staging(client, self._keys)
        self._chain = 0  # mod revision of the chain
        self._staged: tuple[Link, Items | None, int] | None = None  # committed, not copied yet; and its revision
        self._copying: asyncio.Task[None] | None = None
        self._compacting: asyncio.Task[None] | None = None
        self._moved: dict[str, tuple[int, int]] = {}  # key -> (version told, mod revision since it was copied)

    # -- primaryship --------------------------------------------------------------------------------

    def holds(self) -> bool:
        return self._candidate.holds()

    def active(self) -> str:
        return self._candidate.active()

    @property
    def deposed(self) -> int:
        """Coordinators that this one has deposed because their processes were gone."""
        return self._candidate.deposed

    async def members(self) -> list[str] | None:
        return await self._candidate.members()

    async def campaign(self, at_least: int = 0) -> Primaryship:
        await self.resign()
        won = await self._candidate.campaign(at_least)
        chain = self._candidate.chain
        link = link_of(chain)
        self._chain = chain.modified if chain is not None else 0
        self._staged = (link, None, self._chain) if link.staged else None
        self._moved.clear()
        if self._compact:
            self._compacting = asyncio.get_running_loop().create_task(self._compact_history())
        return won

    async def resign(self) -> None:
        self._staged = None
        for task in (self._copying, self._compacting):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        self._copying = self._compacting = None
        await self._candidate.resign()

    async def watch(self) -> None:
        await self._candidate.watch()

    async def close(self) -> None:
        await self.resign()
        await self._candidate.close()
        await self._client.close()

    # -- records ------------------------------------------------------------------------------------

    async def load(self, at_least: int) -> Loaded:
        pause_s = _RETRY_S
        while True:
            try:
                return await self._load(at_least)
            except EtcdUnavailable as error:
                _log.warning("records not loaded yet: etcd does not answer", error=str(error))
            except EtcdRefused as refused:
                if not refused.compacted:
                    raise StoreUnusable(f"etcd refuses to show the records: {refused}") from None
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, _RETRY_MAX_S)

    async def _load(self, at_least: int) -> Loaded:
        """Everything at one revision: that of the first answer, which is linearizable."""
        prefix = self._keys.records
        answer = await transaction(
            self._client, [], [get(self._keys.chain), get(self._keys.active)], [], within_s=_CALL_S
        )
        revision = revision_of(answer)
        if revision < at_least:
            raise StoreUnusable(f"etcd is at revision {revision}, and was at {at_least}: it has lost writes")
        chain = ranges(answer)[0]
        link = link_of(chain[0] if chain else None)
        records: dict[str, tuple[bytes, int]] = {}
        start = prefix.encode()
        while True:
            body = {
                "key": text(start),
                "range_end": text(after(prefix)),
                "limit": str(_PAGE),
                "revision": str(revision),
            }
            answer = await self._client.call("kv/range", body, within_s=4 * _CALL_S)
            kvs = found(answer)
            for kv in kvs:
                key = kv.key.removeprefix(prefix)
                records[key] = (self._values.unwrap(key, kv.value), kv.modified)
            if not answer.get("more") or not kvs:
                break
            start = kvs[-1].key.encode() + b"\0"
        if link.staged:
            for name, value in await self._staging.read(link, revision):
                key = name.removeprefix(prefix)
                if value is None:
                    records.pop(key, None)
                else:
                    records[key] = (self._values.unwrap(key, value), chain[0].modified)
        return Loaded(revision, records)

    async def commit(
        self, puts: Mapping[str, bytes], deletes: Sequence[str], guards: Sequence[tuple[str, int]] = ()
    ) -> Committed:
        if not self.holds():
            return Committed(Outcome.LOST)
        keys, own = self._keys, self._candidate.own
        items: Items = [(keys.record(key), None) for key in dict.fromkeys(deletes) if key not in puts]
        items += [(keys.record(key), self._values.wrap(key, value)) for key, value in puts.items()]
        size = sum(len(key) + len(value or b"") for key, value in items)
        largest = max((len(value or b"") for _, value in items), default=0)
        if largest > RECORD_BYTES_MAX:
            raise StoreUnusable(f"a record of {largest} bytes is over etcd's limit for a request")
        try:
            await self._settle()
            small = len(items) <= OPERATIONS_MAX and len(guards) <= OPERATIONS_MAX and size <= REQUEST_BYTES_MAX
            checks = self._checks(guards)
            committed = await (self._direct(items, checks) if small else self._large(items, checks))
        except Lost:
            return Committed(Outcome.LOST)
        except EtcdUnavailable as error:
            _log.warning("the outcome of a commit is not known", error=str(error))
            return Committed(Outcome.UNKNOWN)
        except EtcdRefused as refused:
            if not refused.no_space:
                raise StoreUnusable(f"etcd refuses a commit: {refused}") from None
            _log.critical("etcd is full: compact, defragment and disarm its alarm", error=str(refused))
            return Committed(Outcome.UNKNOWN)
        if committed.outcome is Outcome.OK and self._candidate.own == own:
            for key in puts:
                self._moved.pop(key, None)
        return committed

    def _checks(self, guards: Sequence[tuple[str, int]]) -> list[Json]:
        checks: dict[str, Json] = {}
        for key, version in guards:
            told, modified = self._moved.get(key, (0, 0))
            checks[f"{key}@{version}"] = modified_at(
                self._keys.record(key), modified if version and told == version else version
            )
        return list(checks.values())

    async def _direct(self, items: Items, checks: list[Json]) -> Committed:
        changes = [delete(key) if value is None else put(key, value) for key, value in items]
        return await self._move_chain(Link(secrets.token_hex(8)), changes, checks)

    async def _large(self, items: Items, checks: list[Json]) -> Committed:
        commit = secrets.token_hex(8)
        outcome, parts = await self._staging.stage(commit, items, checks, self._candidate.own)
        if outcome is not Outcome.OK:
            return Committed(outcome)
        link = Link(commit, parts)
        committed = await self._move_chain(link, [], [])
        if committed.outcome is Outcome.OK:
            self._staged = (link, items, committed.revision)
            self._copying = asyncio.get_running_loop().create_task(self._copy())
        return committed

    async def _move_chain(self, link: Link, changes: list[Json], checks: list[Json]) -> Committed:
        """The transaction that is the commit. Raises EtcdUnavailable, EtcdRefused."""
        keys, own, chain = self._keys, self._candidate.own, self._chain
        compare = [created_at(keys.active, own), modified_at(keys.chain, chain), *checks]
        success = [put(keys.chain, msgspec.json.encode(link)), *changes]
        within_s = max(0.2, min(COMMIT_S, self._candidate.lease.left_s()))
        failure, unanswered = [get(keys.active), get(keys.chain)], list[str]()
        answer = await transaction(self._client, compare, success, failure, within_s=within_s, unanswered=unanswered)
        if answer.get("succeeded"):
            self._chain = revision_of(answer)
            return Committed(Outcome.OK, self._chain)
        holder, linked = (kvs[0] if kvs else None for kvs in ranges(answer))
        ours = holder is not None and holder.created == own
        if (linked.modified if linked is not None else 0) == chain:
            return Committed(Outcome.CONFLICT if ours else Outcome.LOST)
        if ours and link_of(linked).commit == link.commit and linked is not None:
            self._chain = linked.modified  # an earlier try of this very request was applied
            return Committed(Outcome.OK, self._chain)
        # Somebody has committed since: whether that was before or after an unanswered try of ours cannot be seen.
        return Committed(Outcome.UNKNOWN if unanswered else Outcome.LOST)

    async def _settle(self) -> None:
        """Finish the copying of an earlier large commit. Raises Lost, EtcdUnavailable."""
        copying, self._copying = self._copying, None
        if copying is not None:
            await asyncio.shield(asyncio.gather(copying, return_exceptions=True))
        if self._staged is not None:
            await self._copy()

    async def _copy(self) -> None:
        staged = self._staged
        if staged is None or not self._candidate.own:
            return
        link, items, revision = staged
        if items is None:
            items = await self._staging.read(link)
        self._chain, moved = await self._staging.copy(link, items, self._candidate.own, self._chain)
        prefix = self._keys.records
        self._moved.update({key.removeprefix(prefix): (revision, modified) for key, modified in moved.items()})
        self._staged = None

    async def _compact_history(self) -> None:
        """etcd keeps every version of every key until it is told that nobody wants the old ones."""
        before = 0
        while True:
            await asyncio.sleep(_COMPACT_S)
            try:
                answer = await transaction(self._client, [], [get(self._keys.epoch)], [], within_s=_CALL_S)
                if before:
                    await self._client.call("kv/compaction", {"revision": str(before)}, within_s=_CALL_S)
                before = revision_of(answer)
            except (EtcdUnavailable, EtcdRefused) as error:
                _log.debug("history not compacted", error=str(error))
