"""What clients saw, and the black-box checks on it (lost, aborted, duplicated, reordered, phantom, skipped).

Nothing here knows how the cluster works: a list of sends with their outcomes, the polls of consumers, and the records
that are found on every replica after the cluster has healed.
"""

from __future__ import annotations

from collections.abc import Iterable

from ferryline_broker.core.events import Key
from tests.simulation.ghost import Violation

OK, FAIL, INFO, OPEN = "ok", "fail", "info", "open"


class Send:
    """One record that an application handed over. ``outcome`` FAIL: surely not stored; INFO: unknown."""

    __slots__ = ("began_us", "ended_us", "error", "key", "lane", "offset", "order", "outcome", "producer", "value")

    def __init__(self, producer: str, order: int, key: Key, value: bytes, began_us: int) -> None:
        self.producer = producer
        self.order = order  # of sending, per producer
        self.key = key
        self.lane: bytes | None = None  # the key of the record
        self.value = value
        self.began_us = began_us
        self.ended_us = -1
        self.outcome = OPEN
        self.offset = -1
        self.error = ""


class Poll:
    """Records that one consumer got in one row, without a seek or a change of owner in between."""

    __slots__ = ("began", "consumer", "epoch", "key", "next", "records")

    def __init__(self, consumer: str, key: Key, offset: int) -> None:
        self.consumer = consumer
        self.key = key
        self.began = offset
        self.next = offset  # where it would read on
        self.epoch = -1  # of the batch before that
        self.records: list[tuple[int, bytes]] = []


class History:
    """Everything that clients did."""

    def __init__(self) -> None:
        self.sends: dict[bytes, Send] = {}
        self.polls: list[Poll] = []
        self.processed: dict[tuple[str, Key], dict[bytes, int]] = {}  # group and partition -> value -> times

    def send(self, send: Send) -> None:
        assert send.value not in self.sends
        self.sends[send.value] = send

    def counts(self) -> dict[str, int]:
        found = {OK: 0, FAIL: 0, INFO: 0, OPEN: 0}
        for send in self.sends.values():
            found[send.outcome] += 1
        return found

    # -- checks at the end -------------------------------------------------------------------------

    def check(
        self,
        logs: dict[Key, list[tuple[str, list[tuple[int, bytes]]]]],
        lost_ranges: dict[Key, list[tuple[int, int]]],
        starts: dict[Key, int] | None = None,
    ) -> None:
        """``logs``: per partition what a fresh reader finds on every replica from its start on, as (offset, value).

        ``starts``: offsets below which retention has deleted; what was acknowledged there is excused.
        """
        starts = starts or {}
        for key, replicas in sorted(logs.items()):
            where, first = replicas[0]
            for other, found in replicas[1:]:
                if found != first:
                    raise Violation("D2 inconsistent replicas", f"{key}: {where} and {other} differ after healing")
            self._check_log(key, first, [*lost_ranges.get(key, []), (0, starts.get(key, 0))])
        self._check_polls({key: replicas[0][1] for key, replicas in logs.items()}, lost_ranges, starts)

    def _check_log(self, key: Key, log: list[tuple[int, bytes]], lost: list[tuple[int, int]]) -> None:
        places: dict[bytes, int] = {}
        for offset, value in log:
            if value in places:
                raise Violation("D2 duplicate", f"{key}: {value!r} at {places[value]} and {offset}")
            places[value] = offset
            send = self.sends.get(value)
            if send is None:
                raise Violation("D2 phantom", f"{key}: nobody sent {value!r} at {offset}")
            if send.key != key:
                raise Violation("D2 phantom", f"{value!r} was sent to {send.key}, found in {key}")
            if send.outcome == FAIL:
                raise Violation("D2 G1a aborted read", f"{key}: {value!r} at {offset} had failed: {send.error}")
        for send in self.sends.values():
            if send.key == key and send.outcome == OK:
                self._check_acked(send, places.get(send.value), lost)
        self._check_order(key, places)
        self._check_real_time(key, places)

    @staticmethod
    def _check_acked(send: Send, found: int | None, lost: list[tuple[int, int]]) -> None:
        if send.offset < 0:
            raise Violation("D2 offset sanity", f"{send.value!r} acknowledged at {send.offset}")
        if any(low <= send.offset < high for low, high in lost):
            return  # declared: it may be gone, and a late copy of its batch may have been taken for a new one
        if found is None:
            raise Violation("D2 lost write", f"{send.key}: {send.value!r} acknowledged at {send.offset} is gone")
        elif found != send.offset:
            raise Violation(
                "D2 inconsistent offsets", f"{send.key}: {send.value!r} acknowledged at {send.offset}, found at {found}"
            )

    def _check_order(self, key: Key, places: dict[bytes, int]) -> None:
        """Records of one producer lie in the order in which they were sent."""
        last: dict[str, tuple[int, int]] = {}
        for value, offset in places.items():  # in log order
            send = self.sends[value]
            before = last.get(send.producer)
            if before is not None and before[0] > send.order:
                raise Violation(
                    "D2 nonmonotonic send",
                    f"{key}: send {send.order} of {send.producer} at {offset} follows send {before[0]} at {before[1]}",
                )
            last[send.producer] = (send.order, offset)

    def _check_real_time(self, key: Key, places: dict[bytes, int]) -> None:
        """What was acknowledged before another send began lies before it."""
        latest_begin, whose = -1, b""
        for value, offset in places.items():
            send = self.sends[value]
            if send.outcome == OK and send.ended_us < latest_begin:
                raise Violation(
                    "D2 real time",
                    f"{key}: {value!r} at {offset} was acknowledged before {whose!r} began, lies after it",
                )
            if send.began_us > latest_begin:
                latest_begin, whose = send.began_us, value

    def _check_polls(
        self,
        logs: dict[Key, list[tuple[int, bytes]]],
        lost: dict[Key, list[tuple[int, int]]],
        starts: dict[Key, int],
    ) -> None:
        for poll in self.polls:
            if lost.get(poll.key):
                continue  # what was read before a declared loss may be gone
            log = logs.get(poll.key)
            if log is None:
                continue
            last = poll.began - 1
            for offset, value in poll.records:
                if offset <= last:
                    raise Violation("D2 nonmonotonic poll", f"{poll.consumer} {poll.key}: {offset} after {last}")
                last = offset
                if value not in self.sends:
                    raise Violation("D2 phantom", f"{poll.consumer} read {value!r} at {offset}; nobody sent it")
            start = starts.get(poll.key, 0)
            expected = [record for record in log if poll.began <= record[0] < poll.next]
            read = [record for record in poll.records if record[0] >= start]
            if expected != read:
                got = dict(read)
                missing = [record for record in expected if got.get(record[0]) != record[1]]
                extra = [record for record in read if record not in expected]
                raise Violation(
                    "D2 poll skip or inconsistent poll",
                    f"{poll.consumer} {poll.key} {poll.began}..{poll.next}: missing {missing[:3]}, extra {extra[:3]}",
                )

    def check_processed(self, groups: Iterable[str], logs: dict[Key, list[tuple[int, bytes]]]) -> None:
        """K6: every group has processed everything."""
        for group in groups:
            for key, log in sorted(logs.items()):
                seen = self.processed.get((group, key), {})
                missing = [record for record in log if record[1] not in seen]
                if missing:
                    raise Violation("D4 K6", f"group {group} never processed {missing[:5]} of {len(log)} in {key}")
