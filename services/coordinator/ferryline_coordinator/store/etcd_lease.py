"""The lease that primaryship hangs on, kept alive, and the moment up to which it cannot have ended.

etcd counts a lease from when it handled the last keep-alive, which is after we sent it. So it cannot end before that
keep-alive was *sent* plus its time to live, and `holds` says no well before that. Time is CLOCK_BOOTTIME: a machine
that slept wakes up without primaryship.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from ferryline_coordinator.store.etcd_client import EtcdClient, EtcdRefused, EtcdUnavailable, number
from ferryline_service.logs import get_logger

SAFE_PART = 0.8  # of the time to live: drift of clocks (1 %) and a late turn of the loop fit into the rest
KEEP_PART = 0.2
_RETRY_S = 0.1
_log = get_logger()


def boot_s() -> float:
    """Seconds since boot, suspended ones included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Lease:
    """One lease at a time. ``ended`` is set when it is gone, or may be gone by the clock."""

    def __init__(self, client: EtcdClient, ttl_s: float, clock: Callable[[], float] = boot_s) -> None:
        self.id = 0
        self.ended = asyncio.Event()
        self._client = client
        self._ttl_s = ttl_s
        self._clock = clock
        self._safe_until = 0.0
        self._task: asyncio.Task[None] | None = None

    def holds(self) -> bool:
        """Whether the lease cannot have ended yet."""
        return self.id != 0 and self._clock() < self._safe_until

    def left_s(self) -> float:
        """How long `holds` will be true if no further keep-alive is answered."""
        return max(0.0, self._safe_until - self._clock()) if self.id else 0.0

    async def grant(self) -> None:
        """A new lease, kept alive from now on. Raises EtcdUnavailable, EtcdRefused."""
        await self.stop()
        sent = self._clock()
        answer = await self._client.call("lease/grant", {"TTL": str(round(self._ttl_s))}, within_s=self._ttl_s)
        self.id = number(answer.get("ID"))
        self._ttl_s = max(self._ttl_s, number(answer.get("TTL")))  # etcd has a minimum of its own
        self._safe_until = sent + self._ttl_s * SAFE_PART
        self.ended = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._keep(self.id, self.ended))

    async def stop(self) -> None:
        """No more keep-alives; the lease ends by itself."""
        task, self._task = self._task, None
        self.id = 0
        self.ended.set()
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def revoke(self, within_s: float) -> None:
        """End it now, if etcd can be reached."""
        lease = self.id
        await self.stop()
        if lease:
            try:
                await self._client.call("lease/revoke", {"ID": str(lease)}, within_s=within_s)
            except (EtcdUnavailable, EtcdRefused) as error:
                _log.debug("lease not revoked", error=str(error))

    async def _keep(self, lease: int, ended: asyncio.Event) -> None:
        pause_s = self._ttl_s * KEEP_PART
        while True:
            # Never past the safe end: whoever waits for it must hear of it in time.
            await asyncio.sleep(max(0.0, min(pause_s, self._safe_until - self._clock())))
            sent = self._clock()
            if sent >= self._safe_until:
                _log.warning("the lease may have ended: no keep-alive was answered in time", lease=f"{lease:x}")
                break
            limit_s = max(_RETRY_S, min(self._ttl_s * KEEP_PART, self._safe_until - sent))
            try:
                answer = await self._client.call("lease/keepalive", {"ID": str(lease)}, within_s=limit_s)
            except (EtcdUnavailable, EtcdRefused) as error:
                _log.debug("keep-alive not answered", error=str(error))
                pause_s = _RETRY_S
                continue
            if number(answer.get("TTL")) <= 0:
                _log.warning("the lease has ended", lease=f"{lease:x}")
                break
            self._safe_until = sent + self._ttl_s * SAFE_PART
            pause_s = self._ttl_s * KEEP_PART
        self.id = 0
        ended.set()
