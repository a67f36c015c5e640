"""Who is active, decided by etcd: a key that hangs on a lease, and a counter of coordinator epochs.

Whoever creates the key is active until it is deleted: by itself when it resigns, by etcd when the lease ends, or by a
standby that found its process gone. The key's create revision guards every commit, so deleting it is always safe.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable

import msgspec

from ferryline_coordinator.store.etcd_client import EtcdClient, EtcdRefused, EtcdUnavailable, text
from ferryline_coordinator.store.etcd_keys import Holder, Keys, epoch_of, holder_of, link_of, transaction
from ferryline_coordinator.store.etcd_lease import Lease
from ferryline_coordinator.store.etcd_requests import (
    KeyValue,
    after,
    created_at,
    delete,
    delete_below,
    found,
    get,
    modified_at,
    put,
    ranges,
    revision_of,
)
from ferryline_coordinator.store.interface import Primaryship, StoreUnusable
from ferryline_service.logs import get_logger

_CALL_S = 4.0
_RESIGN_S = 1.0
_RETRY_S, _RETRY_MAX_S = 0.1, 1.0
_DOUBT_S = 0.4  # how often a standby asks whether the active one's machine still takes connections
_DOUBT_AGAIN_S = 0.1
_log = get_logger()

Refuses = Callable[[str], Awaitable[bool]]  # whether the machine at a URL refuses connections there


class Candidate:
    """One coordinator process as a candidate. ``own``: create revision of its active key; 0: it is not active.

    ``refuses`` lets a standby depose a coordinator whose process is gone without waiting for its lease.
    """

    def __init__(self, client: EtcdClient, keys: Keys, url: str, ttl_s: float, refuses: Refuses | None) -> None:
        self.own = 0
        self.chain: KeyValue | None = None  # as it was when primaryship was won
        self.deposed = 0  # coordinators that this one has deposed
        self.lease = Lease(client, ttl_s)
        self._client = client
        self._keys = keys
        self._url = url
        self._ttl_s = ttl_s
        self._refuses = refuses
        self._id = secrets.token_hex(8)
        self._enrolled = 0  # lease that our member key hangs on
        self._active = ""
        self._given_up = asyncio.Event()
        self._deposed_at = -1e9

    def holds(self) -> bool:
        return self.own != 0 and self.lease.holds()

    def active(self) -> str:
        return "" if self.own else self._active

    async def members(self) -> list[str] | None:
        try:
            prefix = self._keys.members
            body = {"key": text(prefix), "range_end": text(after(prefix))}
            kvs = found(await self._client.call("kv/range", body, within_s=_CALL_S))
        except (EtcdUnavailable, EtcdRefused) as error:
            _log.debug("members not read", error=str(error))
            return []
        return sorted({kv.value.decode("utf-8", "replace") for kv in kvs} - {""})

    async def campaign(self, at_least: int = 0) -> Primaryship:
        await self.resign()
        told, pause_s = "", _RETRY_S
        while True:
            try:
                won = await self._try(at_least)
                if won is not None:
                    return won
                told, pause_s = "", _RETRY_S
                continue
            except EtcdUnavailable as error:
                why = str(error)
            except EtcdRefused as refused:
                why = str(refused)
                if refused.not_found:  # the lease ended meanwhile
                    await self.lease.stop()
                elif not refused.no_space:
                    raise StoreUnusable(f"etcd refuses this coordinator: {why}") from None
            if why != told:
                told = why
                _log.warning("no campaign yet: etcd does not answer", error=why)
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, _RETRY_MAX_S)

    async def _try(self, at_least: int) -> Primaryship | None:
        """One look, and what follows: win, wait until the active one is gone, or None to look again."""
        await self._enrol()
        keys = self._keys
        answer = await transaction(
            self._client, [], [get(keys.active), get(keys.epoch), get(keys.chain)], [], within_s=_CALL_S
        )
        active, epoch, chain = (kvs[0] if kvs else None for kvs in ranges(answer))
        if active is None:
            return await self._claim(epoch, chain, at_least)
        holder = holder_of(active)
        if holder.id == self._id:  # of an earlier term, whose end we could not tell etcd
            await self._remove(active.created)
            return None
        if holder.url != self._active:
            self._active = holder.url
            _log.info("on standby", active=holder.url, coord_epoch=holder.coord_epoch)
        await self._wait_for_vacancy(holder, active.created, revision_of(answer))
        return None

    async def _enrol(self) -> None:
        """Hold a lease, and stand among the members with it."""
        if not self.lease.holds():
            await self.lease.grant()
        if self._enrolled != self.lease.id and self._url:
            lease = self.lease.id
            key = f"{self._keys.members}{self._id}"
            await transaction(self._client, [], [put(key, self._url.encode(), lease)], [], within_s=_CALL_S)
            self._enrolled = lease

    async def _claim(self, epoch: KeyValue | None, chain: KeyValue | None, at_least: int) -> Primaryship | None:
        keys = self._keys
        coord_epoch = max(epoch_of(epoch) + 1, at_least)
        holder = Holder(self._id, secrets.token_hex(8), coord_epoch, self._url)
        # A commit can be made only under an active key, and each of those raised the epoch: the chain is still as read.
        compare = [created_at(keys.active, 0), modified_at(keys.epoch, epoch.modified if epoch is not None else 0)]
        success = [
            put(keys.active, msgspec.json.encode(holder), self.lease.id),
            put(keys.epoch, str(coord_epoch).encode()),
        ]
        if not link_of(chain).staged:
            success.append(delete_below(keys.stage))  # parts of commits that never happened
        answer = await transaction(self._client, compare, success, [get(keys.active)], within_s=_CALL_S)
        if answer.get("succeeded"):
            own = revision_of(answer)
        else:
            there = ranges(answer)[0]
            if not there or holder_of(there[0]).claim != holder.claim:
                return None  # another one was quicker
            own = there[0].created  # an earlier try of this very request was applied
        self.own, self.chain = own, chain
        self._active = ""
        self._given_up = asyncio.Event()
        return Primaryship(coord_epoch, own)

    async def _wait_for_vacancy(self, holder: Holder, created: int, revision: int) -> None:
        """Until the active key changes, the active one's process is known to be gone, or some time has passed."""
        loop = asyncio.get_running_loop()
        watch = loop.create_task(self._client.watched(self._keys.active, revision + 1, within_s=self._ttl_s))
        ended = loop.create_task(self.lease.ended.wait())
        gone = loop.create_task(self._until_refused(holder.url))
        waits: set[asyncio.Task[object]] = {watch, ended, gone}
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if gone.done() and gone.exception() is None and not watch.done():
                _log.warning("deposing a coordinator whose process is gone", url=holder.url, epoch=holder.coord_epoch)
                self._deposed_at = loop.time()
                self.deposed += 1
                await self._remove(created)
            elif watch.done():
                watch.result()
        finally:
            for task in waits:
                task.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    async def _until_refused(self, url: str) -> None:
        """Return when ``url`` refuses connections, twice. Seldom: where two cannot reach one another, they must not
        depose one another in turns."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_DOUBT_S)
            if self._refuses is None or not url or loop.time() - self._deposed_at < 2 * self._ttl_s:
                continue
            if await self._refuses(url):
                await asyncio.sleep(_DOUBT_AGAIN_S)
                if await self._refuses(url):
                    return

    async def _remove(self, created: int) -> None:
        """Delete an active key, if it is still that one."""
        key = self._keys.active
        await transaction(self._client, [created_at(key, created)], [delete(key)], [], within_s=_CALL_S)

    async def resign(self) -> None:
        own, self.own = self.own, 0
        self._given_up.set()
        if own:
            key = self._keys.active
            try:
                await transaction(self._client, [created_at(key, own)], [delete(key)], [], within_s=_RESIGN_S)
            except (EtcdUnavailable, EtcdRefused) as error:
                _log.warning("etcd was not told of the resignation", error=str(error))

    async def watch(self) -> None:
        """Besides the lease, the active key is looked at: it may have been taken from us."""
        loop = asyncio.get_running_loop()
        while self.holds():
            own = self.own
            changed = loop.create_task(self._client.watched(self._keys.active, own + 1, within_s=self._ttl_s))
            ended = loop.create_task(self.lease.ended.wait())
            resigned = loop.create_task(self._given_up.wait())
            waits: set[asyncio.Task[object]] = {changed, ended, resigned}
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                if ended.done() or resigned.done() or changed.result():
                    return
            except (EtcdUnavailable, EtcdRefused):
                await asyncio.sleep(_RETRY_S)
            finally:
                for task in waits:
                    task.cancel()
                await asyncio.gather(*waits, return_exceptions=True)

    async def close(self) -> None:
        await self.resign()
        await self.lease.revoke(_RESIGN_S)
