"""The primary of one epoch: append, replicate, commit, answer (rules L1 to L12 and C10). Pure.

The rule behind all others: the high watermark counts the *union* of the in-sync set that the coordinator committed and
every set proposed since (``maximal_isr``). Otherwise a broker elected from the set we had not heard of yet could miss a
record we acknowledged.
"""

from __future__ import annotations

import heapq

import msgspec

from ferryline.protocol.messages import (
    RECORDS,
    STATE,
    AlterIsr,
    AlterIsrResult,
    IsrMember,
    LogData,
    ReplicaData,
    ReplicaFetch,
    ResignEntry,
)
from ferryline.protocol.metadata import PartitionMeta
from ferryline.protocol.records import BatchHeader, encode_batch, epoch_start_batch, read_header, stamp
from ferryline_broker.core.events import (
    AdvanceStart,
    AnswerBarrier,
    AnswerGroup,
    AnswerProduce,
    BarrierAsked,
    Claimed,
    CommitAsked,
    CommittedAsked,
    Effect,
    FetchReceived,
    GroupForgotten,
    HandOverAsked,
    Produced,
    ProgressReceived,
    Refuse,
    ReplayState,
    SendAlterIsr,
    SendData,
    SendResign,
)
from ferryline_broker.core.groups import BarrierEntry, ForgetEntry, GroupTable, Refused, StateEntry, encode_entry
from ferryline_broker.core.replica import BOTH_LOGS, Replica

GroupEvent = Claimed | CommitAsked | CommittedAsked | GroupForgotten | BarrierAsked


class Member:
    """What this primaryship has seen of one secondary. A new broker epoch of the sender is a new Member.

    ``fetched``/``flushed`` are -1 per log until a fetch of this epoch passed the divergence check of that log.
    """

    __slots__ = (
        "broker_epoch",
        "caught_up_ms",
        "end_then",
        "fetch_id",
        "fetched",
        "flushed",
        "last_fetch_ms",
        "parked",
        "parked_ms",
        "session",
        "told_watermark",
        "version",
    )

    def __init__(self, broker_epoch: int, now_ms: int) -> None:
        self.broker_epoch = broker_epoch
        self.session = -1
        self.version = -1  # of the partition record that it knew when it fetched
        self.fetch_id = -1
        self.fetched = [-1, -1]
        self.flushed = [-1, -1]
        self.parked: ReplicaFetch | None = None
        self.parked_ms = 0
        self.told_watermark = [-1, -1]
        self.caught_up_ms = now_ms
        self.last_fetch_ms = now_ms
        self.end_then = [0, 0]  # our log ends when it last fetched: reaching them means it was caught up then


class Waiting(msgspec.Struct, order=True, gc=False):
    """A token that is answered when the high watermark passes ``last_offset``."""

    last_offset: int
    order: int
    deadline_ms: int
    token: int
    answer: Effect


class Proposal(msgspec.Struct, frozen=True):
    request_id: int
    deadline_ms: int


class HandOver(msgspec.Struct):
    deadline_ms: int
    stopping: bool
    resigned: bool = False


class Primary:
    """One primaryship. Made when an epoch begins here, dropped when it ends; nothing is carried over.

    Invariants: isr is a subset of maximal_isr; this broker is in both; the high watermark never falls;
    nothing of the delivery state is answered before ``ready``.
    """

    def __init__(self, replica: Replica, part: PartitionMeta, now_ms: int) -> None:
        self.replica = replica
        self.epoch = part.epoch
        self.isr: tuple[int, ...] = part.isr
        self.maximal_isr: frozenset[int] = frozenset(part.isr)
        self.members: dict[int, Member] = {}
        self.waiting: tuple[list[Waiting], list[Waiting]] = ([], [])
        self.orders = 0
        self.expiry_ms: int | None = None  # earliest deadline of anything waiting
        self.proposal: Proposal | None = None
        self.propose_after_ms = 0
        self.handover: HandOver | None = None
        self.groups: GroupTable | None = None
        self.snapshot_offset = -1  # of a snapshot that was appended and is not yet committed
        self.began_ms = now_ms
        self.moved_ms = now_ms  # when the high watermark last moved, or the tail last became non-empty
        self.leso = tuple(replica.log_end)  # log ends at the start of the epoch

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
        return self.groups is not None and all(high[log] > self.leso[log] for log in BOTH_LOGS)

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
            self._wait(RECORDS, last, event.token, answer, now_ms + event.timeout_ms)
            return
        base = replica.log_end[RECORDS]
        stamp(event.data, base, self.epoch)
        stamped = msgspec.structs.replace(header, base_offset=base, epoch=self.epoch)
        self._append(RECORDS, event.data, stamped, now_ms)
        answer = AnswerProduce(event.token, base, self.epoch)
        self._wait(RECORDS, stamped.next_offset - 1, event.token, answer, now_ms + event.timeout_ms)

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
        entry = self._decide(event)
        if isinstance(entry, Refused):
            self._refuse(event.token, entry.code, entry.message)
            return
        if entry is not None:
            self.groups.apply(entry)
            self._append_state(entry, now_ms)
        if isinstance(event, BarrierAsked):
            answer: Effect = AnswerBarrier(event.token)
        else:
            answer = AnswerGroup(event.token, self.groups.offset(event.group))
        self._wait(STATE, replica.log_end[STATE] - 1, event.token, answer, now_ms + event.timeout_ms)
        self._maybe_snapshot(now_ms)

    def _decide(self, event: GroupEvent) -> StateEntry | Refused | None:
        groups, replica = self.groups, self.replica
        assert groups is not None
        match event:
            case Claimed():
                return groups.decide_claim(event.group, event.member, event.generation)
            case CommitAsked():
                return groups.decide_commit(
                    event.group,
                    event.member,
                    event.generation,
                    event.offset,
                    event.metadata,
                    event.reset,
                    records=replica.epochs[RECORDS],
                    high_watermark=replica.high_watermark[RECORDS],
                    log_start=replica.log_start[RECORDS],
                )
            case GroupForgotten():
                return ForgetEntry(event.group)
            case BarrierAsked():
                return BarrierEntry()
            case CommittedAsked():
                return None

    def _append_state(self, entry: StateEntry, now_ms: int) -> None:
        base = self.replica.log_end[STATE]
        data = encode_batch([(None, encode_entry(entry), [])], base_offset=base, epoch=self.epoch)
        self._append(STATE, data, read_header(data), now_ms)

    def _append(self, log: int, data: bytearray, header: BatchHeader, now_ms: int) -> None:
        replica = self.replica
        if replica.high_watermark[log] == replica.log_end[log]:
            self.moved_ms = max(self.moved_ms, now_ms)
        for member in self.members.values():
            if member.parked is not None and member.fetched[log] == replica.log_end[log]:
                member.caught_up_ms = now_ms
        replica.append(log, data, [(0, header)])
        if replica.fsync or len(self.maximal_isr) == 1:
            replica.flush(log)
        self._serve_parked(now_ms)
        self.advance(now_ms)

    def _refusal(self, now_ms: int, *, records: bool) -> tuple[str, str] | None:
        """Rule L2: refuse *before* appending, so that the refusal is definite."""
        replica, part = self.replica, self.replica.part
        assert part is not None
        if self.handover is not None:
            return ("NOT_PRIMARY", "the primaryship is being handed over")
        if len(self.isr) < part.min_isr:
            return ("NOT_ENOUGH_REPLICAS", f"in-sync replicas: {len(self.isr)}, min_isr: {part.min_isr}")
        if records and replica.disk_full:
            return ("STORAGE_FULL", "free disk space is below the reserve")
        stalled = now_ms - self.moved_ms
        tail = any(replica.high_watermark[log] < replica.log_end[log] for log in BOTH_LOGS)
        if tail and stalled > replica.config.commit_stall_ms:
            return ("NOT_ENOUGH_REPLICAS", f"nothing was committed for {stalled} ms")
        return None

    def _maybe_snapshot(self, now_ms: int) -> None:
        """Bound the replay of a promotion: a committed snapshot makes everything before it unnecessary."""
        replica = self.replica
        if self.snapshot_offset >= 0 or replica.state_bytes < replica.config.snapshot_bytes or self.groups is None:
            return
        self.snapshot_offset = replica.log_end[STATE]
        self._append_state(self.groups.snapshot(), now_ms)
        replica.state_bytes = 0

    # -- answering ----------------------------------------------------------------------------------

    def _wait(self, log: int, last: int, token: int, answer: Effect, deadline_ms: int) -> None:
        if self.replica.high_watermark[log] > last:
            self.replica.out.append(answer)
            return
        self.orders += 1
        heapq.heappush(self.waiting[log], Waiting(last, self.orders, deadline_ms, token, answer))
        self.expiry_ms = deadline_ms if self.expiry_ms is None else min(self.expiry_ms, deadline_ms)

    def _refuse(self, token: int, code: str, message: str) -> None:
        self.replica.out.append(Refuse(token, code, message, self.replica.broker_id, self.epoch))

    def advance(self, now_ms: int) -> None:
        """Rule L4: move the high watermarks as far as every member of maximal_isr allows, and answer (L5)."""
        replica, part = self.replica, self.replica.part
        assert part is not None
        if len(self.isr) >= part.min_isr:
            for log in BOTH_LOGS:
                if replica.raise_watermark(log, self._committable(log)):
                    self.moved_ms = now_ms
        for log in BOTH_LOGS:
            waiting, high = self.waiting[log], replica.high_watermark[log]
            while waiting and waiting[0].last_offset < high:
                replica.out.append(heapq.heappop(waiting).answer)
        if 0 <= self.snapshot_offset < replica.high_watermark[STATE]:
            replica.advance_start(STATE, self.snapshot_offset)
            replica.out.append(AdvanceStart(STATE, self.snapshot_offset))
            self.snapshot_offset = -1
        self._maybe_resign(now_ms)

    def _committable(self, log: int) -> int:
        replica = self.replica
        solo = len(self.maximal_isr) == 1  # rule L9: alone, nothing but the own disk holds the record
        lowest = replica.flushed[log] if replica.fsync or solo else replica.log_end[log]
        for broker_id in self.maximal_isr:
            if broker_id != replica.broker_id:
                lowest = min(lowest, self._progress(broker_id, log))
        return lowest

    def _progress(self, broker_id: int, log: int) -> int:
        """How far a member counts; -1, which blocks, until it has fetched in this epoch."""
        member = self.members.get(broker_id)
        if member is None:
            return -1
        return member.flushed[log] if self.replica.fsync else member.fetched[log]

    # -- serving secondaries ------------------------------------------------------------------------

    def fetch(self, event: FetchReceived, now_ms: int) -> None:
        """Rule L3. The caller settled whose epoch is older; here both are in this epoch."""
        fetch, replica = event.fetch, self.replica
        member = self.members.get(event.sender)
        if member is not None and event.sender_epoch < member.broker_epoch:
            return
        if member is None or event.sender_epoch > member.broker_epoch:
            member = self.members[event.sender] = Member(event.sender_epoch, self.began_ms)
        if (fetch.version, fetch.fetch_id) <= (member.version, member.fetch_id):
            return  # overtaken or doubled; ids rise over all sessions, and begin again only with a new copy
        member.session = event.session
        member.version = fetch.version
        member.fetch_id = fetch.fetch_id
        member.parked = None
        diverging: list[tuple[int, int] | None] = [self._divergence(log, fetch) for log in BOTH_LOGS]
        for log in BOTH_LOGS:
            position = fetch.positions[log]
            if diverging[log] is None and position.fetch_offset >= replica.log_start[log]:
                member.fetched[log] = position.fetch_offset
                member.flushed[log] = min(position.flushed, position.fetch_offset)
            else:
                member.fetched[log] = member.flushed[log] = -1
        if all(member.fetched[log] >= replica.log_end[log] for log in BOTH_LOGS):
            member.caught_up_ms = now_ms
        elif all(member.fetched[log] >= member.end_then[log] for log in BOTH_LOGS):
            member.caught_up_ms = max(member.caught_up_ms, member.last_fetch_ms)
        member.last_fetch_ms = now_ms
        member.end_then = list(replica.log_end)
        member.parked = fetch
        member.parked_ms = now_ms
        if any(diverging):
            self._answer(event.sender, member, diverging)
        else:
            self._serve(event.sender, member, now_ms)
        self.evaluate_isr(now_ms)
        self.advance(now_ms)

    def progress(self, event: ProgressReceived, now_ms: int) -> None:
        """A flush ended at a secondary. Counts per log, and only behind a fetch of this session that passed."""
        member, progress = self.members.get(event.sender), event.progress
        if member is None or event.session != member.session or event.sender_epoch != member.broker_epoch:
            return
        if progress.epoch != self.epoch or progress.version < member.version:
            return
        for log in BOTH_LOGS:
            if member.fetched[log] >= 0:
                told = min(progress.flushed[log], member.fetched[log])
                member.flushed[log] = max(member.flushed[log], told)
        self.evaluate_isr(now_ms)
        self.advance(now_ms)

    def peer_down(self, peer: int) -> None:
        member = self.members.get(peer)
        if member is not None:
            member.parked = None
            member.session = -1

    def _divergence(self, log: int, fetch: ReplicaFetch) -> tuple[int, int] | None:
        replica, position = self.replica, fetch.positions[log]
        if position.fetch_offset < replica.log_start[log]:
            return None  # far behind: it has to begin again at our log start
        if position.last_epoch < 0:
            end = replica.log_end[log]
            return None if position.fetch_offset <= end else (-1, end)
        epoch, end = replica.epochs[log].end_offset_for(position.last_epoch, replica.log_end[log])
        if epoch < position.last_epoch or end < position.fetch_offset:
            return (epoch, end)
        return None

    def _serve(self, to: int, member: Member, now_ms: int) -> None:
        """Answer a parked fetch if there is something to say; otherwise leave it parked."""
        fetch, replica, config = member.parked, self.replica, self.replica.config
        if fetch is None:
            return
        news = any(fetch.positions[log].fetch_offset != replica.log_end[log] for log in BOTH_LOGS)
        waited = now_ms - member.parked_ms
        stale = member.told_watermark != replica.high_watermark and waited >= config.watermark_tell_ms
        if news or stale or waited >= config.fetch_wait_ms:
            self._answer(to, member, [None, None])

    def _answer(self, to: int, member: Member, diverging: list[tuple[int, int] | None]) -> None:
        fetch, replica = member.parked, self.replica
        assert fetch is not None
        member.parked = None
        member.told_watermark = list(replica.high_watermark)
        logs, reads = [], []
        for log in BOTH_LOGS:
            position = fetch.positions[log]
            start, end = replica.log_start[log], replica.log_end[log]
            logs.append(
                LogData(
                    position.fetch_offset,
                    position.last_epoch,
                    replica.high_watermark[log],
                    start,
                    diverging=diverging[log],
                )
            )
            due = diverging[log] is None and start <= position.fetch_offset < end
            reads.append((position.fetch_offset, end, replica.config.fetch_bytes_max) if due else None)
        data = ReplicaData(*replica.key, self.epoch, fetch.fetch_id, (logs[RECORDS], logs[STATE]))
        replica.out.append(SendData(member.session, to, data, (reads[RECORDS], reads[STATE])))

    def _serve_parked(self, now_ms: int) -> None:
        for broker_id, member in self.members.items():
            if member.parked is not None:
                self._serve(broker_id, member, now_ms)

    # -- the in-sync set ----------------------------------------------------------------------------

    def evaluate_isr(self, now_ms: int) -> None:
        """Rules L6 and L7: propose who leaves and who joins; one proposal at a time."""
        replica, part = self.replica, self.replica.part
        assert part is not None
        if now_ms < self.propose_after_ms:
            return
        self.propose_after_ms = 0
        if self.proposal is not None and now_ms < self.proposal.deadline_ms:
            return
        wanted = [b for b in self.isr if b == replica.broker_id or not self._lagging(b, now_ms)]
        wanted += [b for b in part.replicas if b not in self.isr and self._may_join(b, now_ms)]
        if self.proposal is None and set(wanted) == set(self.isr):
            return
        # An unanswered proposal is asked again under a new id even when nothing is wanted any more: only a definite
        # answer may make maximal_isr smaller.
        self._propose(wanted, now_ms)

    def _propose(self, wanted: list[int], now_ms: int) -> None:
        replica, part = self.replica, self.replica.part
        assert part is not None
        replica.request_id += 1
        self.maximal_isr = self.maximal_isr | frozenset(wanted)
        self.proposal = Proposal(replica.request_id, now_ms + replica.config.alter_retry_ms)
        members = [IsrMember(b, self._broker_epoch_of(b)) for b in wanted]
        proposal = AlterIsr(
            *replica.key,
            replica.broker_id,
            replica.broker_epoch,
            replica.coord_epoch,
            self.epoch,
            part.version,
            replica.request_id,
            members,
        )
        replica.out.append(SendAlterIsr(proposal))

    def _broker_epoch_of(self, broker_id: int) -> int:
        """Of the life whose fetches we counted: a broker that restarted since must be refused (KIP-903)."""
        if broker_id == self.replica.broker_id:
            return self.replica.broker_epoch
        member = self.members.get(broker_id)
        return member.broker_epoch if member else self.replica.live.get(broker_id, 0)

    def _lagging(self, broker_id: int, now_ms: int) -> bool:
        deadline = self._lag_deadline_ms(broker_id)
        return deadline is not None and now_ms >= deadline

    def _lag_deadline_ms(self, broker_id: int) -> int | None:
        """When this member will have lagged for too long; None while it has everything and waits for more."""
        member, replica = self.members.get(broker_id), self.replica
        if member is None:
            return self.began_ms + replica.config.lag_max_ms
        complete = all(self._progress(broker_id, log) >= replica.log_end[log] for log in BOTH_LOGS)
        if member.parked is not None and complete:
            return None
        return member.caught_up_ms + replica.config.lag_max_ms

    def _may_join(self, broker_id: int, now_ms: int) -> bool:
        """It has everything, in this epoch, in its present life, and it asked knowing the record we propose from.

        Without the last, a replica that was moved away (and deleted) and moved back within one epoch would count with
        what its earlier copy had.
        """
        member, replica, part = self.members.get(broker_id), self.replica, self.replica.part
        assert part is not None
        if member is None or replica.live.get(broker_id) != member.broker_epoch or member.version < part.version:
            return False
        if self._lagging(broker_id, now_ms):
            return False
        return all(
            self._progress(broker_id, log) >= max(replica.high_watermark[log], self.leso[log]) for log in BOTH_LOGS
        )

    def committed(self, part: PartitionMeta, now_ms: int) -> None:
        """A newer record of this epoch: proposals made against older versions can never be accepted any more."""
        assert part.epoch == self.epoch, part
        assert self.replica.broker_id in part.isr, part
        self.isr = part.isr
        self.maximal_isr = frozenset(part.isr)
        self.proposal = None
        self.propose_after_ms = 0
        if len(self.maximal_isr) == 1 and not self.replica.fsync:
            for log in BOTH_LOGS:  # alone from now on: what is not on this disk yet must get there
                self.replica.flush(log)
        self.advance(now_ms)  # first: with the watermark moved, whoever was just removed for lagging cannot rejoin
        self.evaluate_isr(now_ms)

    def alter_answered(self, result: AlterIsrResult, now_ms: int) -> None:
        """Rule L8, for an answer that brought no newer record. Only a refusal of the *latest* proposal counts."""
        proposal, part = self.proposal, self.replica.part
        assert part is not None
        if proposal is None or result.request_id != proposal.request_id or result.accepted:
            return
        if result.part is None or result.part.version != part.version:
            return
        self.proposal = None
        self.maximal_isr = frozenset(self.isr)
        self.propose_after_ms = now_ms + self.replica.config.alter_retry_ms
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
        """Whoever waits learns that the outcome is unknown: the record may still be committed by the next primary."""
        for waiting in self.waiting:
            for entry in sorted(waiting):
                self.replica.out.append(Refuse(entry.token, code, reason, primary, epoch))
            waiting.clear()

    # -- time ---------------------------------------------------------------------------------------

    def tick(self, now_ms: int) -> None:
        self._serve_parked(now_ms)
        self._expire(now_ms)
        handover = self.handover
        if handover is not None and now_ms >= handover.deadline_ms:
            if handover.stopping:
                self._resign(handover, now_ms)
            else:
                self.handover = None  # could not commit in time, or nobody heard: serve on
        self.evaluate_isr(now_ms)
        self.advance(now_ms)

    def _expire(self, now_ms: int) -> None:
        if self.expiry_ms is None or now_ms < self.expiry_ms:
            return
        for log in BOTH_LOGS:
            waiting = self.waiting[log]
            for entry in sorted(waiting):
                if entry.deadline_ms <= now_ms:
                    self._refuse(entry.token, "COMMIT_UNKNOWN", "not committed within the time asked for")
            waiting[:] = [entry for entry in waiting if entry.deadline_ms > now_ms]
            heapq.heapify(waiting)
        self.expiry_ms = min((entry.deadline_ms for waiting in self.waiting for entry in waiting), default=None)

    def next_deadline_ms(self) -> int | None:
        replica, config = self.replica, self.replica.config
        due: list[int] = [] if self.expiry_ms is None or not any(self.waiting) else [self.expiry_ms]
        for member in self.members.values():
            if member.parked is not None:
                stale = member.told_watermark != replica.high_watermark
                due.append(member.parked_ms + (config.watermark_tell_ms if stale else config.fetch_wait_ms))
        if self.proposal is not None:
            due.append(self.proposal.deadline_ms)
        else:
            lags = (self._lag_deadline_ms(b) for b in self.isr if b != replica.broker_id)
            due.extend(max(lag, self.propose_after_ms) for lag in lags if lag is not None)
            if self.propose_after_ms:
                due.append(self.propose_after_ms)
        if self.handover is not None:
            due.append(self.handover.deadline_ms)
        return min(due) if due else None
