"""The primary of one epoch: append, replicate, commit, answer (rules L1 to L12 and C10). Pure.

It puts three smaller things together: the in-sync set (`insync.py`) says how far the high watermark may go, the feeder
(`feeder.py`) answers the secondaries, the wait list (`waiting.py`) holds whoever is to be answered when it has moved.
"""

from __future__ import annotations

import msgspec

from ferryline.protocol.messages import (
    RECORDS,
    STATE,
    AlterIsrResult,
    ResignEntry,
)
from ferryline.protocol.metadata import PartitionMeta
from ferryline.protocol.records import BatchHeader, epoch_start_batch, read_header, stamp
from ferryline_broker.core.ahead import LookAhead
from ferryline_broker.core.events import (
    AdvanceStart,
    AnswerBarrier,
    AnswerGroup,
    AnswerProduce,
    AwaitPassEnd,
    BarrierAsked,
    Effect,
    FetchReceived,
    HandOverAsked,
    Produced,
    ProgressReceived,
    Refuse,
    ReplayState,
    SendResign,
)
from ferryline_broker.core.feeder import Feeder
from ferryline_broker.core.group_asks import GroupEvent, decide
from ferryline_broker.core.groups import BarrierEntry, GroupTable, Refused, StateEntry, batches_of
from ferryline_broker.core.insync import InSyncSet
from ferryline_broker.core.queue_events import DeadMoved, WindowRead
from ferryline_broker.core.queues import QueueEvent, Queues
from ferryline_broker.core.replica import BOTH_LOGS, Replica
from ferryline_broker.core.waiting import WaitList


class HandOver(msgspec.Struct):
    deadline_ms: int
    stopping: bool
    resigned: bool = False


class Primary:
    """One primaryship. Made when an epoch begins here, dropped when it ends; nothing is carried over.

    Invariants: the high watermark never falls; nothing of the delivery state is answered before ``ready``.
    """

    def __init__(self, replica: Replica, part: PartitionMeta, now_ms: int) -> None:
        self.replica = replica
        self.epoch = part.epoch
        self.sync = InSyncSet(replica, part, now_ms)
        self.feeder = Feeder(replica, self.sync)
        self.waits = WaitList(replica, part.epoch)
        self.ahead = LookAhead(replica, self.feeder)
        self.handover: HandOver | None = None
        self.groups: GroupTable | None = None
        self.queues: Queues | None = None  # once ready
        self.snapshot_bytes = 0  # of the last snapshot
        self.snapshot_offset = -1  # of a snapshot that was appended and is not yet committed
        self.pass_end_awaited = False  # there is news for the secondaries
        self.patient_until_ms = 0  # until when what could wait is not flushed and sent; 0: there is none
        self.moved_ms = now_ms  # when the high watermark last moved, or the tail last became non-empty

    def begin(self, now_ms: int) -> None:
        """Rule L1: mark the start of the epoch in both logs. Committing the mark commits everything before it."""
        replica = self.replica
        for log in BOTH_LOGS:
            data = epoch_start_batch(replica.log_end[log], self.epoch, replica.broker_id)
            replica.append(log, data, [(0, read_header(data))])
            replica.flush(log)
        replica.out.append(ReplayState())

    def replayed(self, entries: list[tuple[int, int, bytes]]) -> None:
        """The state log up to its *end* (not its high watermark): what the old primary may have answered is in it."""
        replica = self.replica
        self.groups = GroupTable.replay(
            entries, replica.epochs[RECORDS], replica.log_start[RECORDS], replica.log_end[RECORDS]
        )

    @property
    def ready(self) -> bool:
        high = self.replica.high_watermark
        return self.groups is not None and all(high[log] > self.sync.leso[log] for log in BOTH_LOGS)

    @property
    def isr(self) -> tuple[int, ...]:
        return self.sync.isr

    @property
    def maximal_isr(self) -> frozenset[int]:
        return self.sync.maximal_isr

    # -- appending ----------------------------------------------------------------------------------

    def produce(self, event: Produced, now_ms: int) -> None:
        replica, header = self.replica, event.header
        refusal = self._refusal(now_ms, records=True)
        if refusal is not None:
            self._refuse(event.token, *refusal)
            return
        verdict = replica.producers.check(header)
        if verdict.error:
            self._refuse(event.token, verdict.error, verdict.message)
            return
        if verdict.duplicate is not None:
            # The first copy may still be uncommitted: its repetition waits for the same high watermark.
            base = verdict.duplicate.base_offset
            last = base + verdict.duplicate.record_count - 1
            answer = AnswerProduce(event.token, base, replica.epochs[RECORDS].epoch_at(base))
            self.waits.add(RECORDS, last, event.token, answer, now_ms + event.timeout_ms)
            return
        base = replica.log_end[RECORDS]
        stamp(event.data, base, self.epoch)
        stamped = msgspec.structs.replace(header, base_offset=base, epoch=self.epoch)
        self._append(RECORDS, [(event.data, stamped)], now_ms)
        self.ahead.appended(stamped)
        self.ahead.look(self.queues)
        answer = AnswerProduce(event.token, base, self.epoch)
        self.waits.add(RECORDS, stamped.next_offset - 1, event.token, answer, now_ms + event.timeout_ms)

    def group(self, event: GroupEvent, now_ms: int) -> None:
        """Claims, commits, reads of commits and barriers: all go through the state log, in order."""
        replica = self.replica
        if not self.ready or self.groups is None:
            self._refuse(event.token, "NOT_READY", f"epoch {self.epoch} has not committed its start yet")
            return
        refusal = self._refusal(now_ms, records=False)
        if refusal is not None:
            self._refuse(event.token, *refusal)
            return
        entry = decide(self.groups, event, replica)
        if isinstance(entry, Refused):
            self._refuse(event.token, entry.code, entry.message)
            return
        if entry is not None:
            self.groups.apply(entry)
            self._append_entries([entry], now_ms)
        if isinstance(event, BarrierAsked):
            answer: Effect = AnswerBarrier(event.token)
        else:
            answer = AnswerGroup(event.token, self.groups.offset(event.group))
        self.waits.add(STATE, replica.log_end[STATE] - 1, event.token, answer, now_ms + event.timeout_ms)
        self._maybe_snapshot(now_ms)

    def queue(self, event: QueueEvent, now_ms: int) -> None:
        """Leases and settlements: entries of the state log, answered when committed. Without token nobody waits."""
        token = getattr(event, "token", 0)
        refusal: tuple[str, str] | None = ("NOT_READY", f"epoch {self.epoch} has not committed its start yet")
        if self.ready and self.queues is not None:
            refusal = self._refusal(now_ms, records=False)
        if refusal is not None:
            if token:
                self._refuse(token, *refusal)
            elif self.queues is not None and isinstance(event, WindowRead | DeadMoved):
                self.queues.block(now_ms, event)
            return
        assert self.queues is not None
        outcome = self.queues.handle(event, now_ms)
        self._append_entries(outcome.entries, now_ms, patient=getattr(event, "patient", False))
        if outcome.refused is not None:
            if token:
                self._refuse(token, outcome.refused.code, outcome.refused.message)
        elif outcome.answer is not None and outcome.at_once:
            self.replica.out.append(outcome.answer)
        elif outcome.answer is not None:
            if not outcome.entries:
                self._append_entries([BarrierEntry()], now_ms)
            last, deadline_ms = self.replica.log_end[STATE] - 1, now_ms + getattr(event, "timeout_ms", 0)
            self.waits.add(STATE, last, token, outcome.answer, deadline_ms, record=outcome.record)
        self._maybe_snapshot(now_ms)

    def _append_entries(self, entries: list[StateEntry], now_ms: int, *, patient: bool = False) -> None:
        """Several entries, as one batch if that can carry them. They were applied when they were decided."""
        if not entries:
            return
        batches = []
        for carried, data in batches_of(entries, self.replica.log_end[STATE], self.epoch):
            batches.append((data, read_header(data)))
            if self.queues is not None:
                self.queues.appended(carried, batches[-1][1].next_offset - 1)
        self._append(STATE, batches, now_ms, patient=patient)

    def _append(
        self, log: int, batches: list[tuple[bytearray, BatchHeader]], now_ms: int, *, patient: bool = False
    ) -> None:
        """``patient``: flushed and sent with what is appended next, or a moment later."""
        replica = self.replica
        if replica.high_watermark[log] == replica.log_end[log]:
            self.moved_ms = max(self.moved_ms, now_ms)
        self.feeder.appending(log, now_ms)
        for data, header in batches:
            replica.append(log, data, [(0, header)])
        if patient:
            self.patient_until_ms = self.patient_until_ms or now_ms + replica.config.patience_ms
        else:
            self._hurry(log)

    def _hurry(self, log: int) -> None:
        """Let what was appended to ``log`` be committed, and with it what could wait."""
        replica = self.replica
        if replica.fsync or len(self.maximal_isr) == 1:
            replica.flush(log)
            if self.patient_until_ms and log != STATE:
                replica.flush(STATE)
        self.patient_until_ms = 0
        if self.feeder.anybody_waits:
            self._await_pass_end()

    def _await_pass_end(self) -> None:
        if not self.pass_end_awaited:
            self.pass_end_awaited = True
            self.replica.out.append(AwaitPassEnd())

    def pass_ended(self, now_ms: int) -> None:
        self.pass_end_awaited = False
        self.feeder.serve_parked(now_ms)

    def _refusal(self, now_ms: int, *, records: bool) -> tuple[str, str] | None:
        """Rule L2: refuse *before* appending, so that the refusal is definite."""
        replica, part = self.replica, self.replica.part
        assert part is not None
        if self.handover is not None:
            return ("NOT_PRIMARY", "the primaryship is being handed over")
        if len(self.isr) < part.min_isr:
            return ("NOT_ENOUGH_REPLICAS", f"in-sync replicas: {len(self.isr)}, min_isr: {part.min_isr}")
        if records and replica.disk_full:
            return ("STORAGE_FULL", replica.disk_full)
        stalled = now_ms - self.moved_ms
        if stalled > replica.config.commit_stall_ms and replica.high_watermark != replica.log_end:
            return ("NOT_ENOUGH_REPLICAS", f"nothing was committed for {stalled} ms")
        return None

    def _maybe_snapshot(self, now_ms: int) -> None:
        """Bound the replay of a promotion: a committed snapshot makes everything before it unnecessary."""
        replica = self.replica
        enough = max(replica.config.snapshot_bytes, 4 * self.snapshot_bytes)
        if self.snapshot_offset >= 0 or replica.state_bytes < enough or self.groups is None:
            return
        if self.queues is not None:
            self.queues.before_snapshot(now_ms)
        snapshot, self.snapshot_bytes = self.groups.bounded_snapshot(replica.record_epoch)
        if snapshot is None:
            return  # the log keeps what it has; when it has grown by as much again there may be less to tell
        self.snapshot_offset = replica.log_end[STATE]
        self._append_entries([snapshot], now_ms)
        replica.state_bytes = 0

    # -- answering ----------------------------------------------------------------------------------

    def _refuse(self, token: int, code: str, message: str) -> None:
        self.replica.out.append(Refuse(token, code, message, self.replica.broker_id, self.epoch))

    def advance(self, now_ms: int) -> None:
        """Rule L4: move the high watermarks as far as every member of maximal_isr allows, and answer (L5)."""
        replica, part = self.replica, self.replica.part
        assert part is not None
        if len(self.isr) >= part.min_isr:
            high, end = replica.high_watermark, replica.log_end
            for log in BOTH_LOGS:
                if high[log] < end[log] and replica.raise_watermark(log, self.sync.committable(log)):
                    self.moved_ms = now_ms
        self.waits.release()
        if self.queues is None and self.ready:
            self.queues = Queues(replica, self._groups(), self.epoch, replica.config.queue)
            self.queues.begin(now_ms)
        if self.queues is not None:
            self.queues.committed(now_ms)
        if 0 <= self.snapshot_offset < replica.high_watermark[STATE]:
            replica.advance_start(STATE, self.snapshot_offset)
            replica.out.append(AdvanceStart(STATE, self.snapshot_offset))
            self.snapshot_offset = -1
        self._maybe_resign(now_ms)

    def _groups(self) -> GroupTable:
        assert self.groups is not None
        return self.groups

    def retained_from(self, now_ms: int) -> int:
        """What an in-sync replica still has to fetch, or a queue to settle, is not deleted."""
        if self.queues is None:
            return self.replica.log_start[RECORDS]  # which queues there are is not known yet
        limit = self.sync.retained_from()
        pinned = self.queues.pinned(now_ms)
        return limit if pinned is None else min(limit, pinned)

    # -- secondaries and the in-sync set -------------------------------------------------------------

    def fetch(self, event: FetchReceived, now_ms: int) -> None:
        """Rule L3. The caller settled whose epoch is older; here both are in this epoch."""
        if self.feeder.fetch(event, now_ms):
            self.sync.evaluate(now_ms)
            self.advance(now_ms)
            if self._refusal(now_ms, records=False) is None and self.ahead.look(self.queues):
                self._await_pass_end()  # whoever waits is served then, with the leases
            else:
                self.feeder.serve(event.sender, now_ms)

    def progress(self, event: ProgressReceived, now_ms: int) -> None:
        if self.feeder.progress(event, now_ms):
            self.sync.evaluate(now_ms)
            self.advance(now_ms)

    def peer_down(self, peer: int) -> None:
        self.feeder.peer_down(peer)

    def live_changed(self, now_ms: int) -> None:
        """Who is alive has changed, and with it who may join."""
        self.sync.evaluate(now_ms)

    def committed(self, part: PartitionMeta, now_ms: int) -> None:
        """A newer record of this epoch."""
        self.sync.committed(part)
        self._flush_alone()
        self.advance(now_ms)  # first: with the watermark moved, whoever was just removed for lagging cannot rejoin
        self.sync.evaluate(now_ms)

    def _flush_alone(self) -> None:
        """If this broker is alone from now on, what is not on its disk yet must get there."""
        if len(self.maximal_isr) == 1 and not self.replica.fsync:
            for log in BOTH_LOGS:
                self.replica.flush(log)

    def alter_answered(self, result: AlterIsrResult, now_ms: int) -> None:
        self.sync.refused(result, now_ms)
        self._flush_alone()
        self.advance(now_ms)

    # -- leaving ------------------------------------------------------------------------------------

    def hand_over(self, event: HandOverAsked, now_ms: int) -> None:
        """Rule C10: refuse new appends, let the tail commit, then resign."""
        if self.handover is not None:
            self.handover.stopping = self.handover.stopping or event.stopping
            return
        if len(self.isr) == 1 and not event.stopping:
            return  # nobody could take over
        self.handover = HandOver(now_ms + self.replica.config.handover_ms, event.stopping)
        self._hurry(STATE)
        self._maybe_resign(now_ms)

    def _maybe_resign(self, now_ms: int) -> None:
        handover, replica = self.handover, self.replica
        if handover is None or handover.resigned:
            return
        if all(replica.high_watermark[log] == replica.log_end[log] for log in BOTH_LOGS):
            self._resign(handover, now_ms)

    def _resign(self, handover: HandOver, now_ms: int) -> None:
        handover.resigned = True
        handover.deadline_ms = now_ms + self.replica.config.alter_retry_ms
        self.replica.out.append(SendResign(ResignEntry(*self.replica.key, self.epoch, "handover")))

    def step_down(self, code: str, reason: str, primary: int, epoch: int) -> None:
        self.waits.give_up(code, reason, primary, epoch)

    # -- time ---------------------------------------------------------------------------------------

    def tick(self, now_ms: int) -> None:
        if self.patient_until_ms and now_ms >= self.patient_until_ms:
            self._hurry(STATE)
        self.feeder.serve_parked(now_ms)
        self.waits.expire(now_ms)
        handover = self.handover
        if handover is not None and now_ms >= handover.deadline_ms:
            if handover.stopping:
                self._resign(handover, now_ms)
            else:
                self.handover = None  # could not commit in time, or nobody heard: serve on
        if self.queues is not None:
            if self._refusal(now_ms, records=False) is None:
                self._append_entries(self.queues.tick(now_ms), now_ms)
            else:
                self.queues.block(now_ms)
        self.sync.evaluate(now_ms)
        self.advance(now_ms)

    def next_deadline_ms(self) -> int | None:
        earliest = self.handover.deadline_ms if self.handover is not None else None
        queues = self.queues.next_deadline_ms() if self.queues is not None else None
        for due in (
            self.waits.next_deadline_ms(),
            self.feeder.next_deadline_ms(),
            self.sync.next_deadline_ms(),
            self.patient_until_ms or None,
            queues,
        ):
            if due is not None and (earliest is None or due < earliest):
                earliest = due
        return earliest
