"""The in-sync set as one primaryship sees it: who counts, who is proposed to join or leave (rules L4, L6 to L8). Pure.

The rule behind all others: the high watermark counts the *union* of the in-sync set that the coordinator committed and
every set proposed since (``maximal_isr``). Otherwise a broker elected from the set we had not heard of yet could miss a
record we acknowledged.
"""

from __future__ import annotations

import msgspec

from ferryline.protocol.messages import RECORDS, STATE, AlterIsr, AlterIsrResult, IsrMember, ReplicaFetch
from ferryline.protocol.metadata import PartitionMeta
from ferryline_broker.core.events import SendAlterIsr
from ferryline_broker.core.replica import BOTH_LOGS, Replica


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
        "mark",
        "marked_ms",
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
        self.mark: tuple[int, ...] = (0, 0)  # our log ends at marked_ms: it has to pass them within lag_max_ms
        self.marked_ms = now_ms


class Proposal(msgspec.Struct, frozen=True):
    request_id: int
    deadline_ms: int


class InSyncSet:
    """Invariants: isr is a subset of maximal_isr; this broker is in both; maximal_isr shrinks only by a newer record or
    by a definite refusal of the latest proposal."""

    def __init__(self, replica: Replica, part: PartitionMeta, now_ms: int) -> None:
        self.replica = replica
        self.epoch = part.epoch
        self.isr: tuple[int, ...] = part.isr
        self.maximal_isr: frozenset[int] = frozenset(part.isr)
        self.members: dict[int, Member] = {}
        self.proposal: Proposal | None = None
        self.propose_after_ms = 0
        self.began_ms = now_ms
        self.leso = tuple(replica.log_end)  # log ends at the start of the epoch

    def progress(self, broker_id: int, log: int) -> int:
        """How far a member counts; -1, which blocks, until it has fetched in this epoch."""
        member = self.members.get(broker_id)
        if member is None:
            return -1
        return member.flushed[log] if self.replica.fsync else member.fetched[log]

    def marked(self, broker_id: int, member: Member, now_ms: int) -> None:
        """The member said how far it is: once it has passed its mark, the present log end becomes the next one.

        Having fetched is not enough to stay (rule L6): a secondary whose flush hangs goes on asking for more, and the
        high watermark would stand still for as long as it does.
        """
        records, state = member.mark
        if self.progress(broker_id, RECORDS) >= records and self.progress(broker_id, STATE) >= state:
            member.mark, member.marked_ms = tuple(self.replica.log_end), now_ms

    def committable(self, log: int) -> int:
        replica = self.replica
        solo = len(self.maximal_isr) == 1  # rule L9: alone, nothing but the own disk holds the record
        lowest = replica.flushed[log] if replica.fsync or solo else replica.log_end[log]
        for broker_id in self.maximal_isr:
            if broker_id != replica.broker_id:
                lowest = min(lowest, self.progress(broker_id, log))
        return lowest

    def evaluate(self, now_ms: int) -> None:
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
        if self.proposal is None and tuple(wanted) == self.isr:
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
        records, state = member.flushed if replica.fsync else member.fetched
        if member.parked is not None and records >= replica.log_end[RECORDS] and state >= replica.log_end[STATE]:
            return None
        reached = records >= member.mark[RECORDS] and state >= member.mark[STATE]
        since_ms = member.caught_up_ms if reached else min(member.caught_up_ms, member.marked_ms)
        return since_ms + replica.config.lag_max_ms

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
            self.progress(broker_id, log) >= max(replica.high_watermark[log], self.leso[log]) for log in BOTH_LOGS
        )

    def committed(self, part: PartitionMeta) -> None:
        """A newer record of this epoch: proposals made against older versions can never be accepted any more."""
        assert part.epoch == self.epoch, part
        assert self.replica.broker_id in part.isr, part
        self.isr = part.isr
        self.maximal_isr = frozenset(part.isr)
        self.proposal = None
        self.propose_after_ms = 0

    def refused(self, result: AlterIsrResult, now_ms: int) -> None:
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

    # -- questions ----------------------------------------------------------------------------------

    def retained_from(self) -> int:
        """The lowest record offset that a member of the in-sync set still has to fetch, or the high watermark."""
        fetched = [self.members[b].fetched[RECORDS] if b in self.members else 0 for b in self._others()]
        return max(0, min([self.replica.high_watermark[RECORDS], *fetched]))

    def lags(self) -> dict[int, int]:
        """Records that each known secondary is behind the log end."""
        end = self.replica.log_end[RECORDS]
        return {b: end - max(m.fetched[RECORDS], 0) for b, m in sorted(self.members.items())}

    def _others(self) -> list[int]:
        return [b for b in self.isr if b != self.replica.broker_id]

    def next_deadline_ms(self) -> int | None:
        if self.proposal is not None:
            return self.proposal.deadline_ms
        if self.propose_after_ms:
            return self.propose_after_ms
        earliest = None
        for broker_id in self._others():
            lag = self._lag_deadline_ms(broker_id)
            if lag is not None and (earliest is None or lag < earliest):
                earliest = lag
        return earliest
