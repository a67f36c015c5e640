"""Feeding secondaries: take note of what they have, find where logs part, answer or park their fetches. Pure."""

from __future__ import annotations

from ferryline.protocol.messages import RECORDS, STATE, LogData, ReplicaData, ReplicaFetch
from ferryline_broker.core.events import FetchReceived, ProgressReceived, SendData
from ferryline_broker.core.insync import InSyncSet, Member
from ferryline_broker.core.replica import BOTH_LOGS, Replica

_TOGETHER: list[tuple[int, int] | None] = [None, None]  # nothing diverges, in either log


class Feeder:
    """The primary's side of replication in one epoch (rule L3). Changes only `Member`s and sends answers."""

    def __init__(self, replica: Replica, sync: InSyncSet) -> None:
        self.replica = replica
        self.sync = sync

    def fetch(self, event: FetchReceived, now_ms: int) -> bool:
        """Both sides are in this epoch. Returns whether the fetch counted (it was not overtaken or doubled); then it is
        parked, unless the logs diverge: that is answered at once."""
        fetch, replica = event.fetch, self.replica
        member = self.sync.members.get(event.sender)
        if member is not None and event.sender_epoch < member.broker_epoch:
            return False
        if member is None or event.sender_epoch > member.broker_epoch:
            member = self.sync.members[event.sender] = Member(event.sender_epoch, self.sync.began_ms)
        if (fetch.version, fetch.fetch_id) <= (member.version, member.fetch_id):
            return False  # overtaken or doubled; ids rise over all sessions, and begin again only with a new copy
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
        if _reaches(member.fetched, replica.log_end):
            member.caught_up_ms = now_ms
        elif _reaches(member.fetched, member.end_then):
            member.caught_up_ms = max(member.caught_up_ms, member.last_fetch_ms)
        member.last_fetch_ms = now_ms
        self.sync.marked(event.sender, member, now_ms)
        member.end_then = list(replica.log_end)
        member.parked = fetch
        member.parked_ms = now_ms
        if diverging != _TOGETHER:
            self._answer(event.sender, member, diverging)
        return True

    def progress(self, event: ProgressReceived, now_ms: int) -> bool:
        """A flush ended at a secondary. Counts per log, and only behind a fetch of this session that passed."""
        member, progress = self.sync.members.get(event.sender), event.progress
        if member is None or event.session != member.session or event.sender_epoch != member.broker_epoch:
            return False
        if progress.epoch != self.sync.epoch or progress.version < member.version:
            return False
        for log in BOTH_LOGS:
            if member.fetched[log] >= 0:
                told = min(progress.flushed[log], member.fetched[log])
                member.flushed[log] = max(member.flushed[log], told)
        self.sync.marked(event.sender, member, now_ms)
        return True

    def peer_down(self, peer: int) -> None:
        member = self.sync.members.get(peer)
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

    def serve(self, broker_id: int, now_ms: int) -> None:
        """Answer a parked fetch if there is something to say; otherwise leave it parked."""
        member = self.sync.members[broker_id]
        fetch, replica, config = member.parked, self.replica, self.replica.config
        if fetch is None:
            return
        records, state = fetch.positions
        news = [records.fetch_offset, state.fetch_offset] != replica.log_end
        waited = now_ms - member.parked_ms
        stale = member.told_watermark != replica.high_watermark and waited >= config.watermark_tell_ms
        if not news:
            member.caught_up_ms = now_ms  # it had everything until now, however long its fetch was parked
        if news or stale or waited >= config.fetch_wait_ms:
            self._answer(broker_id, member, _TOGETHER)

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
                    start_epoch=replica.epochs[log].before,
                )
            )
            due = diverging[log] is None and start <= position.fetch_offset < end
            reads.append((position.fetch_offset, end, replica.config.fetch_bytes_max) if due else None)
        version = replica.part.version if replica.part else 0
        data = ReplicaData(*replica.key, self.sync.epoch, fetch.fetch_id, (logs[RECORDS], logs[STATE]), version=version)
        replica.out.append(SendData(member.session, to, data, (reads[RECORDS], reads[STATE])))

    @property
    def anybody_waits(self) -> bool:
        return any(member.parked is not None for member in self.sync.members.values())

    def all_wait_at(self, offset: int) -> bool:
        """Whether all records before ``offset`` are committed, and every secondary that counts waits for that one."""
        sync, high = self.sync, self.replica.high_watermark
        if high[RECORDS] != offset:
            return False
        for broker_id in sync.maximal_isr:
            if broker_id != self.replica.broker_id:
                member = sync.members.get(broker_id)
                if member is None or member.parked is None or member.fetched[RECORDS] != offset:
                    return False
        return True

    def serve_parked(self, now_ms: int) -> None:
        """There may be news for whoever waits."""
        for broker_id in self.sync.members:
            self.serve(broker_id, now_ms)

    def appending(self, log: int, now_ms: int) -> None:
        """Something is about to be appended: whoever waits at the log end was caught up until now."""
        for member in self.sync.members.values():
            if member.parked is not None and member.fetched[log] == self.replica.log_end[log]:
                member.caught_up_ms = now_ms

    def next_deadline_ms(self) -> int | None:
        replica, earliest = self.replica, None
        for member in self.sync.members.values():
            if member.parked is not None:
                stale = member.told_watermark != replica.high_watermark
                due = member.parked_ms + (replica.config.watermark_tell_ms if stale else replica.config.fetch_wait_ms)
                if earliest is None or due < earliest:
                    earliest = due
        return earliest


def _reaches(have: list[int], ends: list[int]) -> bool:
    """In both logs."""
    return have[RECORDS] >= ends[RECORDS] and have[STATE] >= ends[STATE]
