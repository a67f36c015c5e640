"""What went through this broker, by topic and queue group: plain numbers on small objects, added to as it happens.

Names come from outside, so what is shown is bounded: the first topics that this process saw are shown by name, the
others together as `OTHERS`. First come, first shown, and not the largest: a topic that changed places with another one
would take its counters along, and Prometheus would see an increase where nothing happened.
"""

from __future__ import annotations

from collections.abc import Set

from ferryline.protocol.queue_messages import ACK, NACK, REJECT
from ferryline_service.histogram import SLOW_S, Buckets

OTHERS = "(others)"  # no name of a topic or group: those have no brackets
GROUPS_MAX = 100  # queue groups of one topic
MEMBERS_MAX = 10_000  # receivers of one group that are remembered
LIVE_MS = 30_000  # a receiver that has said nothing for so long is not counted: renewals come more often
_FIELDS = ("records_in", "bytes_in", "records_out", "bytes_out")


class GroupCounts:
    """What one queue group did with the records of one topic, on this broker."""

    __slots__ = ("acked", "dead", "failed", "leased", "leased_again", "rejected", "seconds", "seen")

    def __init__(self) -> None:
        self.leased = self.leased_again = self.acked = self.failed = self.rejected = self.dead = 0
        self.seconds = Buckets(SLOW_S)  # from lease to acknowledgement
        self.seen: dict[str, int] = {}  # member -> when it last said something, oldest first

    def handed_out(self, attempts: list[int]) -> None:
        """One number for each record: how often it has been leased, this time included."""
        self.leased += len(attempts)
        self.leased_again += len(attempts) - attempts.count(1)

    def settled(self, action: str, count: int, held_ms: int) -> None:
        """``count`` records of one lease; ``held_ms`` -1: nobody knows."""
        if action == ACK:
            self.acked += count
            if held_ms >= 0:
                self.seconds.observe(held_ms / 1000, count)
        elif action == NACK:
            self.failed += count
        elif action == REJECT:
            self.rejected += count

    def saw(self, member: str, now_ms: int) -> None:
        self.seen.pop(member, None)
        self.seen[member] = now_ms
        if len(self.seen) > MEMBERS_MAX:
            del self.seen[next(iter(self.seen))]

    def live(self, now_ms: int, holders: Set[str] = frozenset()) -> int:
        """Receivers that said something within `LIVE_MS`, or have leases: long work is quiet."""
        while self.seen:
            member, last = next(iter(self.seen.items()))
            if now_ms - last <= LIVE_MS:
                break
            del self.seen[member]
        return len(self.seen.keys() | holders)

    def take(self, other: GroupCounts) -> None:
        for name in ("leased", "leased_again", "acked", "failed", "rejected", "dead"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.seconds.take(other.seconds)
        self.seen = dict(sorted({**other.seen, **self.seen}.items(), key=lambda item: item[1]))


class TopicCounts:
    """Traffic of one topic on this broker."""

    __slots__ = ("bytes_in", "bytes_out", "groups", "records_in", "records_out")

    def __init__(self) -> None:
        self.records_in = self.bytes_in = self.records_out = self.bytes_out = 0
        self.groups: dict[str, GroupCounts] = {}

    def group(self, name: str) -> GroupCounts:
        counts = self.groups.get(name)
        if counts is None:
            if len(self.groups) >= GROUPS_MAX:
                name = OTHERS
            counts = self.groups.setdefault(name, GroupCounts())
        return counts

    def take(self, other: TopicCounts) -> None:
        for name in _FIELDS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for group, counts in other.groups.items():
            self.group(group).take(counts)


class Topics:
    """The counts of all topics. ``shown``: those that have series of their own."""

    def __init__(self, shown_max: int) -> None:
        self.counts: dict[str, TopicCounts] = {}
        self.shown: dict[str, None] = {}
        self._shown_max = shown_max
        self._gone = TopicCounts()  # of topics that had no series of their own, and are deleted

    def of(self, name: str) -> TopicCounts:
        counts = self.counts.get(name)
        if counts is None:
            counts = self.counts[name] = TopicCounts()
            if len(self.shown) < self._shown_max:
                self.shown[name] = None
        return counts

    def forget(self, name: str) -> None:
        """The topic is deleted. Its place goes to a new one, never to one that was counted among the others."""
        counts = self.counts.pop(name, None)
        if counts is None:
            return
        if name in self.shown:
            del self.shown[name]
        else:
            self._gone.take(counts)

    def label(self, name: str) -> str:
        return name if name in self.shown else OTHERS

    @property
    def left_out(self) -> int:
        return len(self.counts) - len(self.shown)

    def rows(self) -> dict[str, TopicCounts]:
        """What is shown, by label."""
        found = {name: self.counts[name] for name in self.shown}
        if self.left_out or self._gone.records_in or self._gone.records_out:
            rest = TopicCounts()
            rest.take(self._gone)
            for name, counts in self.counts.items():
                if name not in self.shown:
                    rest.take(counts)
            found[OTHERS] = rest
        return found
