"""What members of log groups ask of a primary, and the entry of the state log that it leads to. Pure."""

from __future__ import annotations

from ferryline.protocol.messages import RECORDS
from ferryline_broker.core.events import BarrierAsked, Claimed, CommitAsked, CommittedAsked, GroupForgotten
from ferryline_broker.core.groups import BarrierEntry, ForgetEntry, GroupTable, Refused, StateEntry
from ferryline_broker.core.replica import Replica

GroupEvent = Claimed | CommitAsked | CommittedAsked | GroupForgotten | BarrierAsked


def decide(groups: GroupTable, event: GroupEvent, replica: Replica) -> StateEntry | Refused | None:
    """None: nothing changes, and the answer is true once all that was appended before is committed."""
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
