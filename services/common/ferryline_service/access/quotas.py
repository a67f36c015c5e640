"""Quotas of principals, as one service keeps them: what is let in, what has to wait, and how long.

    quotas.take(policy, services=3)          # each later policy, too; and quotas.live(brokers) as brokers come and go
    quotas.request(caller)                   # one REST request or frame of a session
    quotas.spend(caller, records=10, bytes=4096)   # before anything is appended; give_back() if it was not
    quotas.charge(caller, records=10, bytes=4096)  # what was read: the next reader waits
    quotas.opened(caller), quotas.closed(caller)   # a session

All of it is synchronous, and costs a caller without a quota one attribute. Rates hold for the whole cluster. Where
services settle through Redis (`shared_quotas`), each has the whole rate and hears what the others have spent; else each
has its share, the rate divided by the number of live brokers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NoReturn

from ferryline.protocol.access import AccessPolicy, Quota
from ferryline.protocol.errors import QuotaExceeded
from ferryline_service.access.caller import Caller
from ferryline_service.access.gcra import Bucket

REQUESTS, RECORDS, BYTES = "requests", "records", "bytes"
RATES = (REQUESTS, RECORDS, BYTES)
CONNECTIONS, STORED_BYTES = "connections", "stored_bytes"
METERS_MAX = 20_000  # principals with a quota that were seen of late; idle ones make room
CONNECT_AGAIN_MS = 1_000
STORED_AGAIN_MS = 5_000  # room is made by retention or deletion, not by waiting a little


def _now_ms() -> float:
    return time.monotonic() * 1_000


class Meter:
    """What one principal has used at this service.

    ``spent_ms``: by rate, what was paid and not settled with other services yet, as time at the whole rate.
    """

    __slots__ = ("buckets", "connections", "name", "quota", "spent_ms", "touched")

    def __init__(self, name: str) -> None:
        self.name = name
        self.quota = Quota()
        self.buckets: dict[str, Bucket] = {}
        self.spent_ms: dict[str, float] = {}
        self.connections = 0
        self.touched = False  # since the last settlement

    def limit(self, quota: Quota, services: int) -> None:
        """Take over other limits; what was used stays used. Each of ``services`` has an equal share."""
        self.quota = quota
        for name in RATES:
            rate: int = getattr(quota, name)
            if not rate:
                self.buckets.pop(name, None)
                self.spent_ms.pop(name, None)
            elif name in self.buckets:
                self.buckets[name].rate = rate / services
            else:
                self.buckets[name] = Bucket(rate / services)

    def pay(self, name: str, amount: int, now_ms: float) -> None:
        """Book it, if this is limited at all."""
        bucket = self.buckets.get(name)
        if bucket is not None:
            bucket.pay(amount, now_ms)
            self.spent_ms[name] = self.spent_ms.get(name, 0.0) + amount * 1_000 / getattr(self.quota, name)

    def give_back(self, name: str, amount: int) -> None:
        """What was paid for was not done after all."""
        bucket = self.buckets.get(name)
        if bucket is not None:
            bucket.give_back(amount)
            self.spent_ms[name] = self.spent_ms.get(name, 0.0) - amount * 1_000 / getattr(self.quota, name)

    def idle(self, now_ms: float) -> bool:
        """Whether forgetting it changes nothing."""
        return not self.connections and all(not bucket.behind_ms(now_ms) for bucket in self.buckets.values())


class Quotas:
    """All meters of one service. Used from the loop's thread only.

    ``touched``: meters that somebody drew on since they were settled; `shared_quotas` empties it. ``refused`` counts
    refusals by the quota that was used up.
    """

    def __init__(self, now_ms: Callable[[], float] = _now_ms) -> None:
        self.touched: list[Meter] = []
        self.refused: dict[str, int] = {}
        self.shared = False
        self.redis_url = ""  # of the policy: where they are to be shared
        self.services = 1  # that have a share each while they are not
        self._now_ms = now_ms
        self._meters: dict[str, Meter] = {}
        self._over: dict[str, int] = {}  # principals that hold more than this

    # -- what is allowed ----------------------------------------------------------------------------

    def take(self, policy: AccessPolicy, services: int | None = None) -> None:
        """A policy, and how many brokers share its rates. Limits of a principal change with its next request."""
        self._over = dict(policy.over)
        self.redis_url = policy.redis_url if policy.enabled else ""
        if services is not None:
            self.live(services)

    def live(self, brokers: int) -> None:
        """So many brokers serve now."""
        if self.services != max(1, brokers):
            self.services = max(1, brokers)
            self._limit_all()

    def share(self, shared: bool) -> None:
        """Whether what others spend is heard of from now on."""
        if self.shared != shared:
            self.shared = shared
            self._limit_all()

    def drained(self) -> list[tuple[Meter, dict[str, float]]]:
        """Meters that were drawn on, with what was spent of each of their rates: a settlement begins."""
        touched, self.touched = self.touched, []
        found = []
        for meter in touched:
            spent, meter.spent_ms, meter.touched = meter.spent_ms, {}, False
            if meter.buckets:
                found.append((meter, {name: spent.get(name, 0.0) for name in meter.buckets}))
        return found

    def settled(self, meter: Meter, behind_ms: dict[str, float]) -> None:
        """How far behind the shared buckets are; what was spent here since they were asked comes on top."""
        now_ms = self._now_ms()
        for name, ms in behind_ms.items():
            bucket = meter.buckets.get(name)
            if bucket is not None and self.shared:
                bucket.owe(ms + meter.spent_ms.get(name, 0.0), now_ms)

    def hand_in(self) -> None:
        """Sharing begins: what each bucket is behind, at its share of the rate, is what this service has spent."""
        now_ms = self._now_ms()
        for meter in self._meters.values():
            for name, bucket in meter.buckets.items():
                meter.spent_ms[name] = bucket.behind_ms(now_ms) / self.services
            self._touch(meter)

    def _limit_all(self) -> None:
        for meter in self._meters.values():
            meter.limit(meter.quota, self._divided_by)

    @property
    def _divided_by(self) -> int:
        return 1 if self.shared else self.services

    # -- what is used -------------------------------------------------------------------------------

    def request(self, caller: Caller) -> None:
        """One request. Raises QuotaExceeded; it has cost nothing then."""
        if caller.limited:
            meter, now_ms = self._meter(caller), self._now_ms()
            self._admit(meter, REQUESTS, 1, now_ms)
            meter.pay(REQUESTS, 1, now_ms)

    def spend(self, caller: Caller, *, records: int = 0, bytes: int = 0) -> None:
        """Something that is about to be written. Raises QuotaExceeded; nothing is booked then."""
        if not caller.limited:
            return
        meter, now_ms = self._meter(caller), self._now_ms()
        if 0 < caller.quota.stored_bytes <= self._over.get(caller.name, 0):
            self._refuse(meter, STORED_BYTES, caller.quota.stored_bytes, STORED_AGAIN_MS)
        self._admit(meter, RECORDS, records, now_ms)
        self._admit(meter, BYTES, bytes, now_ms)
        meter.pay(RECORDS, records, now_ms)
        meter.pay(BYTES, bytes, now_ms)

    def give_back(self, caller: Caller, *, records: int = 0, bytes: int = 0) -> None:
        """What was booked by `spend` was refused later, and surely not written."""
        if caller.limited:
            meter = self._meter(caller)
            meter.give_back(RECORDS, records)
            meter.give_back(BYTES, bytes)

    def charge(self, caller: Caller, *, records: int = 0, bytes: int = 0) -> None:
        """Something that was read: whoever comes next waits for it."""
        if caller.limited:
            meter, now_ms = self._meter(caller), self._now_ms()
            meter.pay(RECORDS, records, now_ms)
            meter.pay(BYTES, bytes, now_ms)

    def check(self, caller: Caller) -> None:
        """Raises QuotaExceeded while ``caller`` has to wait before it reads or writes records."""
        if caller.limited:
            meter, now_ms = self._meter(caller), self._now_ms()
            self._admit(meter, RECORDS, 0, now_ms)
            self._admit(meter, BYTES, 0, now_ms)

    def wait_ms(self, caller: Caller) -> int:
        """How long ``caller`` has to wait before it is given more records; 0: not at all."""
        if not caller.limited:
            return 0
        meter, now_ms = self._meter(caller), self._now_ms()
        found = [meter.buckets[name].wait_ms(now_ms) for name in (RECORDS, BYTES) if name in meter.buckets]
        return math.ceil(max(found, default=0.0))

    def opened(self, caller: Caller) -> None:
        """One session more. Raises QuotaExceeded; else `closed` follows once."""
        if caller.limited:
            meter = self._meter(caller)
            limit = meter.quota.connections
            if limit and meter.connections >= limit:
                self._refuse(meter, CONNECTIONS, limit, CONNECT_AGAIN_MS)
            meter.connections += 1

    def closed(self, caller: Caller) -> None:
        """A session that was `opened` has ended."""
        meter = self._meters.get(caller.name)
        if caller.limited and meter is not None:
            meter.connections = max(0, meter.connections - 1)

    # -- inside -------------------------------------------------------------------------------------

    def _meter(self, caller: Caller) -> Meter:
        meter = self._meters.get(caller.name)
        if meter is None:
            if len(self._meters) >= METERS_MAX:
                self._forget_idle()
            meter = self._meters[caller.name] = Meter(caller.name)
        if meter.quota is not caller.quota and meter.quota != caller.quota:
            meter.limit(caller.quota, self._divided_by)
        self._touch(meter)
        return meter

    def _touch(self, meter: Meter) -> None:
        if not meter.touched:
            meter.touched = True
            self.touched.append(meter)

    def _forget_idle(self) -> None:
        now_ms = self._now_ms()
        self._meters = {name: meter for name, meter in self._meters.items() if not meter.idle(now_ms)}

    def _admit(self, meter: Meter, name: str, amount: int, now_ms: float) -> None:
        bucket = meter.buckets.get(name)
        if bucket is not None and bucket.wait_ms(now_ms):
            after_ms = math.ceil(bucket.turn_ms(amount, now_ms))
            self._refuse(meter, name, getattr(meter.quota, name), after_ms)

    def _refuse(self, meter: Meter, quota: str, limit: int, after_ms: int) -> NoReturn:
        self.refused[quota] = self.refused.get(quota, 0) + 1
        unit = "" if quota in (CONNECTIONS, STORED_BYTES) else " a second"
        raise QuotaExceeded(
            f"{meter.name} has used its {quota}: {limit}{unit}; again in {after_ms} ms",
            retry_after_ms=after_ms,
            quota=quota,
            limit=limit,
            principal=meter.name,
        )
