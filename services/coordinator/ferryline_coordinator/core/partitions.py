"""What primaries ask for: changes of the in-sync set (C6), resignation (C10), reports of damage."""

from __future__ import annotations

from ferryline.protocol.errors import InvalidArgument
from ferryline.protocol.limits import FRAME_ENTRIES_MAX
from ferryline.protocol.messages import AlterIsr, AlterIsrResult, AlterIsrsAnswer, Done
from ferryline.protocol.metadata import PartitionMeta
from ferryline_coordinator.core.change import Change
from ferryline_coordinator.core.elections import alter_isr, exclude, resign
from ferryline_coordinator.core.events import AlterIsrsReceived, ReportReceived, ResignReceived
from ferryline_coordinator.core.fencing import is_draining, note_elected
from ferryline_coordinator.core.records import PartRecord
from ferryline_coordinator.core.registration import Registration
from ferryline_coordinator.core.sessions import Sessions
from ferryline_coordinator.core.state import Key

DAMAGED = "damaged"


class Partitions:
    """``_answered`` is soft: after a restart the coordinator's epoch refuses whatever was asked before it."""

    def __init__(self, sessions: Sessions, registration: Registration) -> None:
        self._sessions = sessions
        self._registration = registration
        self._answered: dict[Key, tuple[int, int]] = {}  # -> of its primary: (broker epoch, highest id answered)

    def alter(self, change: Change, event: AlterIsrsReceived) -> None:
        proposals = event.message.proposals
        if len(proposals) > FRAME_ENTRIES_MAX:
            raise InvalidArgument(f"proposals: {len(proposals)} are more than {FRAME_ENTRIES_MAX}", field="proposals")
        errors = []
        for proposal in proposals:
            error = self._refusal(change, event.session, proposal)
            if not error:
                self._accept(change, proposal)
            errors.append(error)

        def result(proposal: AlterIsr, error: str) -> AlterIsrResult:
            record = change.part((proposal.topic_id, proposal.partition))
            part = record.meta if record is not None else None
            key = (proposal.topic_id, proposal.partition, proposal.request_id)
            return AlterIsrResult(*key, not error, change.coord_epoch, part, error)

        change.reply_at_end(
            event.reply, lambda: AlterIsrsAnswer([result(*pair) for pair in zip(proposals, errors, strict=True)])
        )

    def _refusal(self, change: Change, session: int, proposal: AlterIsr) -> str:
        """Code of the guard of C6 that says no, "" if none does. A refusal is definite: nothing was changed."""
        key = (proposal.topic_id, proposal.partition)
        broker, record = change.broker(proposal.broker_id), change.part(key)
        if proposal.coord_epoch != change.coord_epoch:
            return "STALE_COORDINATOR"
        if (
            broker is None
            or broker.meta.broker_epoch != proposal.broker_epoch
            or not self._sessions.speaks_for(proposal.broker_id, session)
        ):
            return "STALE_BROKER_EPOCH"
        if record is None:
            return "UNKNOWN_PARTITION"
        part = record.meta
        if part.primary != proposal.broker_id:
            return "NOT_PRIMARY"
        if part.epoch != proposal.epoch:
            return "STALE_EPOCH"
        if part.version != proposal.version:
            return "VERSION_CONFLICT"
        # So far every refusal stands for good. From here on the answer may be another one the next time, so each id is
        # answered once: a copy of a refused proposal could be accepted later, when its primary has long gone on without
        # that replica. Only the present primary comes this far: nobody else can make us forget its ids.
        epoch, highest = self._answered.get(key, (0, -1))
        if epoch == proposal.broker_epoch and proposal.request_id <= highest:
            return "VERSION_CONFLICT"
        self._answered[key] = (proposal.broker_epoch, proposal.request_id)
        new = [member.broker_id for member in proposal.new_isr]
        if part.primary not in new or len(set(new)) != len(new) or not set(new) <= set(part.replicas):
            return "INVALID_ARGUMENT"
        added = [member for member in proposal.new_isr if member.broker_id not in part.isr]
        for member in added:
            joining = change.broker(member.broker_id)
            if joining is None or not change.electable(member.broker_id):
                return "NOT_READY"
            if joining.meta.broker_epoch != member.broker_epoch:
                return "STALE_BROKER_EPOCH"
        return ""

    def _accept(self, change: Change, proposal: AlterIsr) -> None:
        record = change.part((proposal.topic_id, proposal.partition))
        assert record is not None
        before = record.meta
        stored = change.put_part(alter_isr(before, [member.broker_id for member in proposal.new_isr]))
        change.note(
            "isr_changed",
            topic_id=stored.topic_id,
            partition=stored.partition,
            before=list(before.isr),
            after=list(stored.isr),
        )

    def resign(self, change: Change, event: ResignReceived) -> None:
        """C10, and L10 for storage that failed. Entries that do not name the present primaryship change nothing."""
        message = event.message
        self._sessions.checked(change, message.broker_id, message.broker_epoch, event.session)
        elected: list[PartitionMeta] = []
        for entry in message.entries[:FRAME_ENTRIES_MAX]:
            record = change.part((entry.topic_id, entry.partition))
            if record is None or record.meta.primary != message.broker_id or record.meta.epoch != entry.epoch:
                continue
            elected.append(self._resigned(change, record, entry.reason == DAMAGED))
        note_elected(change, elected)
        change.reply(event.reply, Done(change.coord_epoch))

    def _resigned(self, change: Change, record: PartRecord, damaged: bool) -> PartitionMeta:
        def reluctant(broker_id: int) -> bool:
            return is_draining(change, broker_id)

        part, electable, frozen = record.meta, change.electable, record.frozen
        if damaged:
            return change.put_part(exclude(part, part.primary, electable, reluctant, frozen=frozen))
        return change.put_part(resign(part, electable, reluctant, frozen=frozen))

    def report(self, change: Change, event: ReportReceived) -> None:
        message = event.message
        self._sessions.checked(change, message.broker_id, message.broker_epoch, event.session)
        self._registration.take_reports(change, message.broker_id, message.replicas[:FRAME_ENTRIES_MAX])
        change.reply(event.reply, Done(change.coord_epoch))

    def forget(self, key: Key) -> None:
        self._answered.pop(key, None)
