"""Whom a receiver asks for how many records, and what it tells a primary before that. Pure; used by `ReceiverCore`.

Rules:

* Each broker that leads partitions of the topic has one RECEIVE of ours parked. One that names more partitions takes
  the place of the one before it, which the broker then answers. It stands: while little of what was asked for has come,
  the broker answers it and keeps it, so that the next record finds us waiting.
* What is asked for, what waits here and what the application has not settled is at most ``prefetch``, and one more for
  each broker: each is asked for one at least, or the records of a quiet broker would wait for those of a busy one. A
  broker that had nothing the last time is asked for one, so that the others can be asked for the rest.
* **Keep.** A partition whose primary or session is another one since we asked, or where an answer was lost, may have
  leased us records that never arrived. Before it is asked again it is told which leases we do hold. A delivery that
  answers an older question than that is not ours: the broker has been told that we do not have it.
"""

from __future__ import annotations

from collections.abc import Iterable

from ferryline.core.leases import LeaseTable, PartitionKey
from ferryline.core.receiving_events import (
    Effect,
    ForgetReceive,
    RaiseError,
    RefreshMetadata,
    SendKeep,
    SendReceive,
)
from ferryline.core.retry import Backoff, Jitter
from ferryline.protocol.errors import FerrylineError, UnknownGroup
from ferryline.protocol.metadata import NO_BROKER

RECORDS_MAX = 10_000  # of one RECEIVE
SETTLING_MAX = 20_000  # records on their way to be settled: beyond it brokers are behind, and nothing more is asked for
BYTES_MIN, BYTES_MAX = 64 * 1024, 4 * 1024 * 1024  # of one RECEIVE
WAIT_MS = 5_000  # how long a RECEIVE parks at a broker that had nothing
SHORT_WAIT_MS = 1_000  # at one that may have: what was asked for in vain is free for others sooner
PAUSE_MS = 500  # after a refusal that will be the same the next time
_FOREVER = 2**62


class Part:
    """One partition. ``asked`` and ``kept``: numbers of the last RECEIVE and the last KEEP that named it, 0: none."""

    __slots__ = ("asked", "broker", "epoch", "failures", "keeping", "kept", "key", "must_keep", "retry_at_ms")

    def __init__(self, key: PartitionKey) -> None:
        self.key = key
        self.broker = NO_BROKER
        self.epoch = -1
        self.asked = self.kept = 0
        self.keeping = 0  # number of the KEEP whose answer is outstanding
        self.must_keep = False
        self.retry_at_ms = 0
        self.failures = 0


class Ask:
    """A RECEIVE on its way. ``records``: that it may still bring; ``given``: it has brought some."""

    __slots__ = ("broker", "given", "keys", "number", "records", "sent_ms", "wait_ms")

    def __init__(
        self, number: int, broker: int, keys: frozenset[PartitionKey], records: int, wait_ms: int, sent_ms: int
    ) -> None:
        self.number = number
        self.broker = broker
        self.keys = keys
        self.records = records
        self.wait_ms = wait_ms
        self.sent_ms = sent_ms
        self.given = False


class Peer:
    """A broker, as we ask it. ``idle``: it had nothing the last time. ``ready``: what it can be asked for now."""

    __slots__ = ("ask", "broker", "failures", "idle", "ready", "retry_at_ms")

    def __init__(self, broker: int) -> None:
        self.broker = broker
        self.ask: Ask | None = None  # the last RECEIVE, while it is unanswered
        self.idle = False
        self.ready: list[PartitionKey] = []
        self.retry_at_ms = 0
        self.failures = 0


class Asking:
    """See the module. ``out`` gets the effects; ``stopped``: ask for nothing more, but go on telling what is held.

    ``prefetch`` may change at any time; what was asked for before may still come.
    """

    def __init__(self, table: LeaseTable, *, prefetch: int, prefetch_bytes: int, seed: int) -> None:
        self.parts: dict[PartitionKey, Part] = {}
        self.stopped = False
        self.full = False  # of bytes: the table does not tell when some are handed out
        self.next_deadline_ms = _FOREVER
        self.prefetch = prefetch
        self._table = table
        self._prefetch_bytes = prefetch_bytes
        self._peers: dict[int, Peer] = {}
        self._asks: dict[int, Ask] = {}
        self._reserved = 0  # records asked for and not answered
        self._numbers = 0
        self._changed = True  # what can be asked must be looked at anew
        self._parting = False
        self._backoff = Backoff(10, 500)
        self._jitter = Jitter(seed)

    @property
    def parted(self) -> bool:
        """Whether every primary that was ever asked knows that we hold nothing."""
        return self._parting and not any(part.must_keep for part in self.parts.values())

    def broker_of(self, key: PartitionKey) -> int | None:
        """The primary of a partition; None: the partition does not exist."""
        part = self.parts.get(key)
        return None if part is None else part.broker

    # -- what happened -----------------------------------------------------------------------------

    def routes(self, routes: dict[PartitionKey, tuple[int, int]], out: list[Effect]) -> None:
        self._changed = True
        for key in [key for key in self.parts if key not in routes]:
            del self.parts[key]
        for key, (broker, epoch) in sorted(routes.items()):
            part = self.parts.get(key)
            if part is None:
                part = self.parts[key] = Part(key)
            if (part.broker, part.epoch) == (broker, epoch):
                continue
            part.broker, part.epoch = broker, epoch
            part.must_keep = part.must_keep or part.asked > 0
            part.keeping = part.retry_at_ms = part.failures = 0
            peer = self._peers.get(broker)
            if peer is None:
                self._peers[broker] = Peer(broker)
            else:
                peer.idle = False
                peer.retry_at_ms = 0  # whatever was wrong with it: it has just been made a primary
        for ask in list(self._asks.values()):
            if all(self.broker_of(key) != ask.broker for key in ask.keys):
                self._ended(ask)
                out.append(ForgetReceive(ask.number))

    def session_lost(self, broker: int) -> None:
        self._changed = True
        for part in self.parts.values():
            if part.broker == broker:
                part.must_keep = part.must_keep or part.asked > 0

    def answered(self, number: int, empty: bool, now_ms: int, *, records: int = 0, more: bool = False) -> Ask | None:
        """A RECEIVE was answered, with ``records``; with ``more`` it stands. None: it was given up before."""
        ask = self._asks.get(number)
        if ask is None:
            return None
        peer = self._peers[ask.broker]
        ask.given = ask.given or more or not empty
        if ask.given:
            peer.idle = False
            peer.failures = 0
        elif peer.ask is ask:
            peer.idle = True
            if now_ms - ask.sent_ms < ask.wait_ms // 2:  # it did not wait, for a reason of its own: do not spin
                self._fail(peer, now_ms)
            else:
                peer.failures = 0
        if more:
            records = min(records, ask.records)
            ask.records -= records
            self._reserved -= records
        else:
            self._ended(ask)
        return ask

    def ours(self, ask: Ask, key: PartitionKey) -> bool:
        """Whether a delivery that answers this RECEIVE may be kept."""
        part = self.parts.get(key)
        return part is not None and ask.number > part.kept and not self.stopped

    def failed(self, number: int, error: FerrylineError, now_ms: int, out: list[Effect]) -> None:
        ask = self._asks.get(number)
        if ask is None:
            return
        self._changed = True
        self._ended(ask)
        if not error.definite:
            self._must_keep(ask)
        self._fail(self._peers[ask.broker], now_ms, error, self._told(error, out))

    def refused(self, key: PartitionKey, error: FerrylineError, now_ms: int, out: list[Effect]) -> None:
        """One partition of a RECEIVE was refused."""
        part = self.parts.get(key)
        if part is not None:
            self._changed = True
            self._fail(part, now_ms, error, self._told(error, out))

    def kept(
        self,
        number: int,
        error: FerrylineError | None,
        errors: dict[PartitionKey, FerrylineError],
        now_ms: int,
        out: list[Effect],
    ) -> None:
        """A KEEP was answered. One without any news of ours changes nothing."""
        self._changed = True
        for part in self.parts.values():
            if part.keeping != number:
                continue
            part.keeping = 0
            told = errors.get(part.key) or error
            if told is None or isinstance(told, UnknownGroup):  # nobody has received there: nothing is leased to us
                part.must_keep = False
                part.failures = 0
            else:
                self._fail(part, now_ms, told, self._told(told, out))

    def stop(self) -> None:
        """Ask for nothing more. What stands at brokers would go on to bring records that go back at once: a KEEP ends
        it."""
        self.stopped = self._changed = True
        for ask in self._asks.values():
            self._must_keep(ask)

    def part_with_all(self) -> None:
        """Nothing is held any more: tell everybody who was ever asked."""
        self.stopped = self._parting = self._changed = True
        for part in self.parts.values():
            part.keeping = part.retry_at_ms = part.failures = 0
            part.must_keep = part.asked > 0

    def close(self, out: list[Effect]) -> None:
        """Heed nothing any more."""
        self.stopped = True
        out += [ForgetReceive(number) for number in self._asks]
        self._asks.clear()
        self.parts.clear()
        self.next_deadline_ms = _FOREVER

    # -- what to do --------------------------------------------------------------------------------

    def ask(self, now_ms: int, out: list[Effect]) -> None:
        """Send what is to be sent now."""
        if self._changed or now_ms >= self.next_deadline_ms:
            self._look(now_ms, out)
        if self.stopped:
            return
        room = self.prefetch - self._table.unsettled
        bytes_free = self._prefetch_bytes - self._table.bytes
        self.full = bytes_free <= 0
        if room <= 0 or self.full or self._table.settling >= SETTLING_MAX:
            return
        peers = [peer for peer in self._peers.values() if peer.ready and peer.retry_at_ms <= now_ms]
        wanting = [peer for peer in peers if peer.ask is None or not peer.ask.keys.issuperset(peer.ready)]
        quiet = [peer for peer in wanting if peer.idle and len(peers) > 1]
        busy = [peer for peer in wanting if peer not in quiet]
        free = room - self._reserved - len(quiet)
        for count, peer in enumerate(busy):
            share = min(RECORDS_MAX, max(1, free // (len(busy) - count)))
            free -= share
            self._send(peer, share, bytes_free // len(wanting), now_ms, out)
        for peer in quiet:
            self._send(peer, 1, bytes_free // len(wanting), now_ms, out)

    def _send(self, peer: Peer, records: int, bytes_max: int, now_ms: int, out: list[Effect]) -> None:
        self._numbers += 1
        keys = list(peer.ready)
        wait_ms = WAIT_MS if peer.idle else SHORT_WAIT_MS
        peer.ask = Ask(self._numbers, peer.broker, frozenset(keys), records, wait_ms, now_ms)
        self._asks[self._numbers] = peer.ask
        self._reserved += records
        for key in keys:
            self.parts[key].asked = self._numbers
        bytes_max = min(BYTES_MAX, max(BYTES_MIN, bytes_max))
        out.append(SendReceive(peer.broker, self._numbers, keys, records, bytes_max, wait_ms))

    def _look(self, now_ms: int, out: list[Effect]) -> None:
        """Who can be asked for what now, who must be told something first, and when to look again."""
        self._changed = False
        later = _FOREVER
        must: dict[int, list[Part]] = {}
        for peer in self._peers.values():
            peer.ready = []
            if peer.retry_at_ms > now_ms:
                later = min(later, peer.retry_at_ms)
        for part in self.parts.values():
            if part.broker == NO_BROKER:
                continue
            if part.retry_at_ms > now_ms:
                later = min(later, part.retry_at_ms)
            elif not part.must_keep:
                self._peers[part.broker].ready.append(part.key)
            elif not part.keeping and self._peers[part.broker].retry_at_ms <= now_ms:
                must.setdefault(part.broker, []).append(part)
        self.next_deadline_ms = later
        for broker, parts in sorted(must.items()):
            self._numbers += 1
            for part in parts:
                part.kept = part.keeping = self._numbers
            out.append(SendKeep(broker, self._numbers, self._held(part.key for part in parts)))

    def _held(self, keys: Iterable[PartitionKey]) -> list[tuple[PartitionKey, list[int]]]:
        numbers: dict[PartitionKey, list[int]] = {key: [] for key in keys}
        if not self._parting:
            for lease in self._table.held.values():
                if lease.key in numbers:
                    numbers[lease.key].append(lease.number)
        return [(key, sorted(found)) for key, found in numbers.items()]

    def _must_keep(self, ask: Ask) -> None:
        """The partitions of a RECEIVE are to be told what we hold before anything else."""
        for key in ask.keys:
            part = self.parts.get(key)
            if part is not None:
                part.must_keep = True

    # -- trouble -----------------------------------------------------------------------------------

    def _ended(self, ask: Ask) -> None:
        del self._asks[ask.number]
        self._reserved -= ask.records
        peer = self._peers[ask.broker]
        if peer.ask is ask:
            peer.ask = None

    def _told(self, error: FerrylineError, out: list[Effect]) -> int:
        """Pass on what only the application, or newer metadata, can help with. Returns the least pause."""
        if error.refresh_metadata:
            out.append(RefreshMetadata())
        if error.retriable or error.refresh_metadata or not error.definite:
            return 0
        out.append(RaiseError(error))
        return PAUSE_MS

    def _fail(self, what: Part | Peer, now_ms: int, error: FerrylineError | None = None, least_ms: int = 0) -> None:
        self._changed = True
        what.failures += 1
        pause_ms = self._backoff.pause_ms(what.failures, self._jitter.next(), error)
        what.retry_at_ms = now_ms + max(least_ms, pause_ms)
