"""Queues in a run: what the seed draws for them, who receives, and where dead letters go.

Everything here draws from a source of its own, and nothing of it exists in a configuration without queues: those run
as if there were none.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING

import msgspec

from ferryline.proof.queues import QueueOp, QueueRules, check_ends, check_queue
from ferryline.protocol.messages import RECORDS, STATE
from ferryline.protocol.metadata import RetryPolicy
from ferryline.protocol.queue_messages import ORDER_KEY, ORDER_NONE, ORDER_PARTITION
from ferryline_broker.core.events import Key
from ferryline_broker.core.partition import PartitionCore
from ferryline_broker.core.queue import QueueConfig
from ferryline_broker.core.queue_events import MoveDead
from ferryline_broker.core.queue_table import QueueTable
from tests.simulation.engine import MS
from tests.simulation.ghost import Violation
from tests.simulation.history import OK
from tests.simulation.receivers import Receiver

if TYPE_CHECKING:
    from tests.simulation.world import World

QUEUE = "work"
RECEIVERS_MAX = 12
DONE, FORGOTTEN = "done", "forgotten"


class Facts(msgspec.Struct, frozen=True):
    """What a producer wrote into the headers of a record. Times count from ``sent_us``, 0: none."""

    lane: bytes | None = None
    priority: int = 4
    delay_ms: int = 0
    ttl_ms: int = 0
    sent_us: int = 0

    def from_now_ms(self, after_ms: int, now_us: int) -> int:
        """How long it is to ``after_ms`` after the sending; below 0: it is over."""
        return after_ms - (now_us - self.sent_us) // MS


NOTHING = Facts()


class Queueing(msgspec.Struct):
    """What a seed draws for its queue."""

    ordering: str
    receivers: int
    lease_ms: int
    records_max: int
    keys: int
    priorities: float
    delays: float
    ttls: float
    work_ms: int
    deaths_ms: int  # mean time between two of them
    retry: RetryPolicy
    config: QueueConfig
    slow_target: float
    lossy_target: float
    forgetful_target: float


def draw(rng: random.Random) -> Queueing:
    """From the queue's own source."""

    def some(*choices: int) -> int:
        return choices[int(rng.random() * len(choices))]

    def maybe(probability: float, value: float) -> float:
        return value if rng.random() < probability else 0.0

    heads = some(2, 20_000)
    return Queueing(
        ordering=rng.choice((ORDER_KEY, ORDER_KEY, ORDER_KEY, ORDER_PARTITION, ORDER_PARTITION, ORDER_NONE)),
        receivers=some(2, 3, 4),
        lease_ms=some(500, 1_500, 4_000),
        records_max=some(1, 3, 10),
        keys=some(1, 2, 3, 6),
        priorities=maybe(0.5, 0.3),
        delays=maybe(0.5 if heads > 2 else 0.8, 0.3),  # late records and a narrow window are the hard case
        ttls=maybe(0.3, 0.2),
        work_ms=some(5, 50, 300),
        deaths_ms=some(1_500, 4_000, 15_000),
        retry=RetryPolicy(
            attempts=some(2, 3, 5), backoff_ms=some(0, 200), backoff_max_ms=1_000,
            on_dead=rng.choice(("skip", "skip", "park")),
        ),
        config=QueueConfig(
            heads=heads, waiting=some(5, 1_000_000), read_bytes=some(150, 1 << 20),
            overdue_ms=some(300, 10_000),
        ),
        slow_target=maybe(0.5, 0.4),
        lossy_target=maybe(0.5, 0.3),
        forgetful_target=maybe(0.4, 0.2),
    )  # fmt: skip


class Source:
    """What the dead-letter target remembers of one producer: of one queue in one partition."""

    __slots__ = ("epoch", "last", "seen")

    def __init__(self) -> None:
        self.epoch = -1
        self.last = -1
        self.seen: list[int] = []  # sequences of its last batches


class DeadLetterTopic:
    """Takes each producer epoch and sequence once, as the product's dedupe does. It is no simulated partition: it may
    be slow, lose answers and forget producers, which is what the queue must stand."""

    def __init__(self, part: QueuePart) -> None:
        self.part = part
        self.sources: dict[Key, Source] = {}
        self.travelling: Counter[Key] = Counter()  # moves that were sent and have not arrived

    def take(self, key: Key, core: PartitionCore, move: MoveDead) -> str:
        """DONE, FORGOTTEN, or "" where the answer is lost."""
        source = self.sources.setdefault(key, Source())
        new = (move.producer_epoch, move.sequence) > (source.epoch, source.last)
        if new and move.sequence and self.settled(key, core) and self.part.chance(self.part.drawn.forgetful_target):
            self.part.world.count("dead-letter producers forgotten")
            source = self.sources[key] = Source()
        if move.producer_epoch < source.epoch:
            return FORGOTTEN
        if move.producer_epoch > source.epoch:
            if move.sequence:
                return FORGOTTEN
            source.epoch, source.last = move.producer_epoch, -1
            source.seen.clear()
        if move.sequence == source.last + 1:
            source.last = move.sequence
            source.seen = [*source.seen, move.sequence][-5:]
            self.part.copied(key, move.offset)
        elif move.sequence not in source.seen:
            return FORGOTTEN
        return "" if self.part.chance(self.part.drawn.lossy_target) else DONE

    def settled(self, key: Key, core: PartitionCore) -> bool:
        """All moves before this one are committed, and none travels: only then may the target forget that there were
        any. The product forgets a producer after days, no request is on its way for so long."""
        return not self.travelling[key] and core.high_watermark[STATE] == core.log_end[STATE]


class QueuePart:
    """The queue's share of a world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.engine = world.engine
        self.rng = random.Random(f"queues of {world.engine.seed}")
        self.drawn = draw(self.rng)
        self.facts: dict[bytes, Facts] = {}
        self.receivers: list[Receiver] = []
        self.ops: list[QueueOp] = []
        self.began: dict[Key, int] = {}  # where the queue stood when it first gave something out
        self.lost_us: dict[Key, int] = {}  # when a loss was last declared
        self.target = DeadLetterTopic(self)
        self._names = 0

    # -- drawing -----------------------------------------------------------------------------------

    def chance(self, probability: float) -> bool:
        return not self.world.calm and self.rng.random() < probability

    def between(self, low: int, high: int) -> int:
        return low + int(self.rng.random() * (high - low + 1))

    def fact(self, value: bytes) -> Facts:
        """What the record with this value says of itself."""
        return self.facts.get(value, NOTHING)

    def sent(self, value: bytes) -> bytes | None:
        """A record is made: draw what it says. Returns its key."""
        drawn, rng = self.drawn, self.rng
        lane = b"k%d" % int(rng.random() * drawn.keys) if rng.random() < 0.85 else None
        self.facts[value] = Facts(
            lane,
            rng.choice((0, 9)) if rng.random() < drawn.priorities else 4,
            self.between(200, 3_000) if rng.random() < drawn.delays else 0,
            self.between(300, 4_000) if rng.random() < drawn.ttls else 0,
            self.engine.now_us,
        )
        return lane

    # -- receivers ---------------------------------------------------------------------------------

    def begin(self) -> None:
        for _ in range(self.drawn.receivers):
            self.add()
        self._churn()

    def add(self) -> None:
        self._names += 1
        receiver = Receiver(self, self._names)
        self.receivers.append(receiver)
        receiver.start()

    def _churn(self) -> None:
        self.engine.after(int(self.rng.random() * 2 * self.drawn.deaths_ms * MS) + 1, self._strike)

    def _strike(self) -> None:
        if self.world.calm:
            return
        alive = [receiver for receiver in self.receivers if receiver.host.alive]
        choice = self.between(0, 3)
        if alive and choice == 0:
            self.world.count("receivers died")
            self.rng.choice(alive).die()
        elif alive and choice == 1:
            self.world.count("receivers closed")
            self.rng.choice(alive).close()
        elif alive and choice == 2:
            self.world.count("receivers paused")
            receiver = self.rng.choice(alive)
            receiver.host.pause()
            self.engine.after(self.between(200, 3 * self.drawn.lease_ms) * MS, receiver.host.resume)
        if len(alive) <= self.drawn.receivers and len(self.receivers) < RECEIVERS_MAX:
            self.add()
        self._churn()

    def heal(self) -> None:
        for receiver in self.receivers:
            receiver.host.resume()
        self.add()

    # -- what happened -----------------------------------------------------------------------------

    def note(self, op: QueueOp) -> None:
        self.ops.append(op)

    def copied(self, key: Key, offset: int) -> None:
        """The dead-letter topic took a copy that it had not had before."""
        self.world.count("dead letters copied")
        now = self.engine.now_us
        self.note(QueueOp("copy", lane_of(key), t0=now, t1=now, offsets=[offset]))

    def gave_out(self, key: Key, start: int) -> None:
        """The first lease of a partition was answered; the queue stood at ``start``. What an earlier primary had
        retained away by then may still be here, and go when one leads that knows of it."""
        self.began.setdefault(key, max(start, self.world.retained.get(key, 0)))

    def redrive(self) -> None:
        """After the faults: whatever is parked goes on."""
        for key, record in sorted(self.world.checks.parts.items()):
            table = self.table(key, record.meta.primary)
            if table is not None and any(story.parked for story in table.stories.values()):
                next(receiver for receiver in self.receivers if receiver.host.alive).redrive(key)

    def table(self, key: Key, primary: int) -> QueueTable | None:
        """The queue of a partition, as its primary has it."""
        broker = self.world.broker_by_id(primary)
        hosted = broker.parts.get(key) if broker is not None else None
        if hosted is None or hosted.core.primary is None or hosted.core.primary.groups is None:
            return None
        found: QueueTable | None = hosted.core.primary.groups.queues.get(QUEUE)
        return found

    def settled(self) -> int:
        """How far all partitions are settled."""
        tables = (self.table(key, record.meta.primary) for key, record in sorted(self.world.checks.parts.items()))
        return sum(table.start for table in tables if table is not None)

    # -- the end -----------------------------------------------------------------------------------

    def trouble(self) -> str | None:
        """What is not settled yet, or None."""
        for key, record in sorted(self.world.checks.parts.items()):
            table, high = self.table(key, record.meta.primary), self.world.truth(key)[RECORDS].end
            if table is None:
                return f"nobody has received from {key}"
            if table.start != high:
                return f"queue of {key}: settled up to {table.start} of {high}, {len(table.leases)} leases"
        return None

    def check(self, logs: dict[Key, list[tuple[int, bytes]]]) -> None:
        """``logs``: (offset, value) of what is left of each partition. Raises Violation."""
        rules = QueueRules(self.drawn.ordering, self.drawn.retry.attempts, drift=0.03)
        lost = {lane_of(key): when for key, when in self.lost_us.items()}
        ops = [op for op in self.ops if op.partition not in lost]
        after = [op for op in self.ops if op.partition in lost and op.t0 > lost[op.partition]]
        for key, log in sorted(logs.items()):
            if key in self.lost_us:
                after += self._written_after(key, log)
            elif key in self.began:
                ops += self._records(key, log)
        for finding in [*check_queue(ops, rules), *check_ends(after, rules)]:
            raise Violation(finding.rule, finding.text)

    def _records(self, key: Key, log: list[tuple[int, bytes]]) -> list[QueueOp]:
        """Everything that the queue had to deal with: what is there, and what was acknowledged and is not any more."""
        began, there = self.began[key], {offset for offset, _ in log}
        found = [self._record(key, offset, value) for offset, value in log if offset >= began]
        for send in self.world.history.sends.values():
            if send.key == key and send.outcome == OK and send.offset >= began and send.offset not in there:
                found.append(self._record(key, send.offset, send.value))
        return found

    def _written_after(self, key: Key, log: list[tuple[int, bytes]]) -> list[QueueOp]:
        """What was sent after the last declared loss, and not retained away anywhere, nobody may forget."""
        retained = self.world.retained.get(key, 0)
        found = [self._record(key, offset, value) for offset, value in log if offset >= retained]
        return [op for op in found if op.t0 > self.lost_us[key]]

    def _record(self, key: Key, offset: int, value: bytes) -> QueueOp:
        facts = self.fact(value)
        lane = (facts.lane or b"").decode()
        return QueueOp(
            "record", lane_of(key), t0=self.world.history.sends[value].began_us, offsets=[offset], lane=lane,
            delay_ms=facts.delay_ms, expires=facts.ttl_ms > 0,
        )  # fmt: skip


def lane_of(key: Key) -> str:
    """The name of a partition in a history."""
    return f"{key[0][:8]}-{key[1]}"
