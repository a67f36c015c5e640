"""What a receiver holds: its leases, and what became of each of their records. Pure: no I/O, no clock, no randomness.

    WAITING -----> HANDED -----> SETTLING -----> SETTLED
       |             |              |
       +-------------+--------------+----------> LOST   somebody else has it, or it was given up

Rules:

* A record leaves WAITING only while its lease is good by our clock, so nobody works on what another may have by now.
* Of a run (``ordering="partition"``) nothing is handed out behind a record that failed or was given back: the broker
  has taken it back, and hands it out again in order.
* A lease is renewed while any of its records is open, until one of two things takes longer than ``max_processing``:
  a record in the application's hands (it is given up as failed), or the application's silence (what waits is given
  back). So a deadlock holds nothing for ever.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

PartitionKey = tuple[str, int]  # (topic_id, partition)
LeaseId = tuple[PartitionKey, int, int]  # partition, epoch, number

WAITING, HANDED, SETTLING, SETTLED, LOST = range(5)
OPEN = (WAITING, HANDED, SETTLING)
COMMIT_SHARE = 8


class Lease:
    """Records of one partition that were leased together; ``states[i]`` is that of the record at ``offsets[i]``.

    ``open`` counts those that have had no last word, ``waiting`` those that were not handed out. ``deadline_ms``: when
    the lease ends, as far as we can tell; `prolong` counts from before the broker began to.
    """

    __slots__ = (
        "attempts", "contended", "deadline_ms", "epoch", "handed_ms", "key", "lease_ms", "number", "offsets", "open",
        "receipt", "renew_at_ms", "run", "size", "states", "taken_ms", "waiting",
    )  # fmt: skip

    def __init__(
        self,
        key: PartitionKey,
        epoch: int,
        number: int,
        receipt: bytes,
        lease_ms: int,
        offsets: list[int],
        attempts: list[int],
        *,
        size: int,
        run: bool,
        now_ms: int,
        contended: bool = False,
    ) -> None:
        self.key = key
        self.epoch = epoch
        self.number = number
        self.receipt = receipt
        self.lease_ms = lease_ms
        self.offsets = offsets
        self.attempts = attempts
        self.states = bytearray(len(offsets))
        self.open = self.waiting = len(offsets)
        self.handed_ms = [0] * len(offsets)
        self.taken_ms = now_ms
        self.size = size
        self.run = run
        self.contended = contended  # records of its lanes wait, or have waited, for others
        self.deadline_ms = self.renew_at_ms = 0
        # A lease runs while it is being committed and while its delivery travels; that takes a fraction of it.
        self.prolong(now_ms - lease_ms // COMMIT_SHARE, lease_ms)

    @property
    def id(self) -> LeaseId:
        return (self.key, self.epoch, self.number)

    def prolong(self, sent_ms: int, for_ms: int) -> None:
        """The broker took a request that was sent at ``sent_ms`` and makes the lease end ``for_ms`` after it came."""
        self.deadline_ms = sent_ms + for_ms
        self.renew_at_ms = max(sent_ms + for_ms // 3, self.deadline_ms - self.lease_ms * 2 // 3)

    def index(self, offset: int) -> int:
        """Where an offset stands; -1: not in this lease."""
        try:
            return self.offsets.index(offset)
        except ValueError:
            return -1

    def indexes(self, *states: int) -> list[int]:
        """The records that are in one of these states."""
        return [index for index, state in enumerate(self.states) if state in states]


class LeaseTable:
    """All leases of one receiver.

    Invariants: ``waiting``, ``handed`` and ``settling`` are the numbers of records in these states; a lease is in
    ``held`` as long as it has an open record. ``held`` is read by the thread that renews; only the application's loop
    changes it.
    """

    def __init__(self) -> None:
        self.held: dict[LeaseId, Lease] = {}
        self.waiting = self.handed = self.settling = 0
        self.bytes = 0  # of deliveries that were not handed out to the last record
        self.progress_ms = 0  # when the application last took or settled something

    @property
    def unsettled(self) -> int:
        """What counts against ``prefetch``: records that the application has, or will get, and has not settled."""
        return self.waiting + self.handed

    def add(self, lease: Lease) -> None:
        """A delivery has arrived. Nothing is leased twice under one number."""
        assert lease.id not in self.held, lease.id
        self.held[lease.id] = lease
        self.waiting += lease.waiting
        self.bytes += lease.size

    def hand_out(self, lease: Lease, index: int, now_ms: int) -> bool:
        """Give a record to the application. False: it is not ours any more, or may not be."""
        if lease.states[index] != WAITING or lease.deadline_ms <= now_ms:
            return False
        lease.states[index] = HANDED
        lease.handed_ms[index] = self.progress_ms = now_ms
        self.handed += 1
        self._not_waiting(lease)
        return True

    def begin(self, lease: Lease, index: int) -> bool:
        """A record is about to be settled. False: it has had its last word, or is being settled already."""
        state = lease.states[index]
        if state == HANDED:
            self.handed -= 1
        elif state == WAITING:
            self._not_waiting(lease)
        else:
            return False
        lease.states[index] = SETTLING
        self.settling += 1
        return True

    def begin_all(self, lease: Lease, indexes: list[int]) -> list[int]:
        """`begin` for several records, at once if they stand in a row. Returns those for which it was too late."""
        if not _move(lease, indexes, HANDED, SETTLING):
            return [index for index in indexes if not self.begin(lease, index)]
        self.handed -= len(indexes)
        self.settling += len(indexes)
        return []

    def end(self, lease: Lease, index: int, state: int) -> None:
        """The last word on a record that was being settled: SETTLED or LOST."""
        assert lease.states[index] == SETTLING, (lease.id, index, lease.states[index])
        lease.states[index] = state
        self.settling -= 1
        self._closed(lease)

    def end_all(self, lease: Lease, indexes: list[int], state: int) -> None:
        """`end` for several records, at once if they stand in a row."""
        if not _move(lease, indexes, SETTLING, state):
            for index in indexes:
                self.end(lease, index, state)
            return
        self.settling -= len(indexes)
        self._closed(lease, len(indexes))

    def lose(self, lease: Lease, index: int) -> bool:
        """A record is not ours any more. False: nothing was open about it, or its settlement will tell."""
        state = lease.states[index]
        if state == HANDED:
            self.handed -= 1
        elif state == WAITING:
            self._not_waiting(lease)
        else:
            return False
        lease.states[index] = LOST
        self._closed(lease)
        return True

    def behind(self, lease: Lease, index: int) -> list[int]:
        """What the broker takes back together with this record: in a run, all that comes after it."""
        if not lease.run:
            return []
        return [later for later in range(index + 1, len(lease.states)) if lease.states[later] in (WAITING, HANDED)]

    def numbers(self, key: PartitionKey) -> list[int]:
        """The leases that are held in one partition."""
        return sorted(lease.number for lease in self.held.values() if lease.key == key)

    def _not_waiting(self, lease: Lease) -> None:
        self.waiting -= 1
        lease.waiting -= 1
        if not lease.waiting:
            self.bytes -= lease.size

    def _closed(self, lease: Lease, count: int = 1) -> None:
        lease.open -= count
        if not lease.open:
            del self.held[lease.id]


def _move(lease: Lease, indexes: list[int], state: int, to: int) -> bool:
    """All of these from one state to another, at once. False, and nothing is changed, unless all are in it and each is
    the one after the last: handlers end in any order, and [1, 0, 3] spans a record of its own."""
    first, end = indexes[0], indexes[-1] + 1
    if indexes != list(range(first, end)) or lease.states.count(state, first, end) != len(indexes):
        return False
    lease.states[first:end] = bytes((to,)) * len(indexes)
    return True


class Renewal(msgspec.Struct, frozen=True):
    """What to tell the broker of one lease: prolong it for ``open``; ``overdue`` failed, ``stuck`` is given back.

    All three are offsets, each in one of them at most.
    """

    lease: Lease
    open: list[int]
    overdue: list[int]
    stuck: list[int]


def renewals(leases: Iterable[Lease], progress_ms: int, now_ms: int, max_processing_ms: int) -> list[Renewal]:
    """What is due now. Only reads, so that it may run beside the application's loop."""
    due: list[Renewal] = []
    for lease in leases:
        if lease.renew_at_ms > now_ms:
            continue
        found = Renewal(lease, [], [], [])
        for index, state in enumerate(bytes(lease.states)):
            if state == HANDED and now_ms - lease.handed_ms[index] > max_processing_ms:
                found.overdue.append(lease.offsets[index])
            elif state == WAITING and now_ms - max(progress_ms, lease.taken_ms) > max_processing_ms:
                found.stuck.append(lease.offsets[index])
            elif state in OPEN:
                found.open.append(lease.offsets[index])
        if found.open or found.overdue or found.stuck:
            due.append(found)
    return due
