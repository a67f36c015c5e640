"""Who holds more than they may: what brokers tell of the topics of each owner, against the quotas of a policy. Pure.

Brokers tell what the partitions hold that they lead, so each partition counts once, however many replicas it has. It is
not durable: after a change of coordinators nobody is over before the brokers have told, seconds later.
"""

from __future__ import annotations

from collections.abc import Iterable

from ferryline.protocol.access import AccessPolicy, Quota


class Stored:
    """What each broker told last."""

    def __init__(self) -> None:
        self._told: dict[int, dict[str, int]] = {}

    def take(self, broker_id: int, owners: Iterable[tuple[str, int]]) -> None:
        """All that a broker has to tell; owners that it does not name hold nothing there any more."""
        self._told[broker_id] = dict(owners)

    def totals(self, serving: Iterable[int]) -> dict[str, int]:
        """Bytes by owner, over the brokers that serve: others lead what the rest has told of."""
        found: dict[str, int] = {}
        for broker_id in serving:
            for owner, size in self._told.get(broker_id, {}).items():
                found[owner] = found.get(owner, 0) + size
        return found

    def over(self, policy: AccessPolicy, serving: Iterable[int]) -> tuple[tuple[str, int], ...]:
        """`AccessPolicy.over`: owners that hold more than a limit that may be theirs, and the largest of those."""
        own = {principal.name: principal.quota for principal in policy.principals}
        by_issuer: dict[str, list[int]] = {}
        for rule in policy.rules:
            by_issuer.setdefault(rule.issuer, []).append(rule.quota.stored_bytes)
        found = []
        for owner, size in sorted(self.totals(serving).items()):
            quota = own.get(owner, Quota())
            issuer, colon, _ = owner.partition(":")
            limits = [quota.stored_bytes] if quota != Quota() or not colon else by_issuer.get(issuer, [])
            exceeded = [limit for limit in limits if 0 < limit < size]
            if exceeded:
                found.append((owner, max(exceeded)))
        return tuple(found)
