"""Brokers that are registered: heartbeats, unfencing (rule C5), leaving, draining."""

from __future__ import annotations

from msgspec.structs import replace

from ferryline.protocol.errors import (
    Conflict,
    NotReady,
    StaleBrokerEpoch,
)
from ferryline.protocol.messages import (
    Heartbeat,
    HeartbeatOk,
)
from ferryline_coordinator.core.change import Change
from ferryline_coordinator.core.config import CoreConfig
from ferryline_coordinator.core.elections import can_elect, elect
from ferryline_coordinator.core.events import (
    BrokerForgotten,
    DrainSet,
    HeartbeatReceived,
)
from ferryline_coordinator.core.fencing import STOPPING, Fencing, is_draining, note_elected
from ferryline_coordinator.core.records import BrokerRecord, broker_key
from ferryline_coordinator.core.recovery import Reports
from ferryline_coordinator.core.sessions import Sessions


class Membership:
    """What a registered broker's heartbeats and its operator's commands lead to."""

    def __init__(self, config: CoreConfig, fencing: Fencing, reports: Reports, sessions: Sessions) -> None:
        self._config = config
        self._fencing = fencing
        self._reports = reports
        self._sessions = sessions

    def session_closed(self, change: Change, broker_id: int, session: int) -> None:
        """The fast path begins when nobody speaks for a broker any more."""
        if self._sessions.closed(broker_id, session):
            self._fencing.session_closed(change, broker_id)

    def heartbeat(self, change: Change, event: HeartbeatReceived) -> None:
        message = event.message
        broker_id = message.broker_id
        record = self._sessions.checked(change, broker_id, message.broker_epoch, event.session)
        if self._reports.wants(broker_id):
            # Registering again is idempotent and brings fresh reports of all replicas.
            raise StaleBrokerEpoch("register again: recovery needs a report of your replicas")
        self._fencing.heard(broker_id, change.now_ms)
        if message.want == "stop":
            self._stopping(change, record)
        elif record.meta.fenced and self._caught_up(change, message):
            self._unfence(change, record)
        current = change.broker(broker_id)
        assert current is not None
        meta = current.meta
        change.reply(
            event.reply,
            HeartbeatOk(
                meta.fenced,
                change.coord_epoch,
                change.next_revision(),
                stop_allowed=meta.stopping and meta.fenced and not self._leads(change, broker_id),
            ),
        )

    def _caught_up(self, change: Change, message: Heartbeat) -> bool:
        gate = self._fencing.gate.get(message.broker_id, 0)
        record = change.broker(message.broker_id)
        return (
            message.coord_epoch == change.coord_epoch
            and message.revision >= gate
            and message.broker_id not in self._fencing.suspects
            and record is not None
            and not record.meta.stopping
        )

    def _unfence(self, change: Change, record: BrokerRecord) -> None:
        """C5: it knows the present picture. Partitions that waited for it get their primary."""
        broker_id = record.meta.id
        change.put_broker(replace(record, meta=replace(record.meta, fenced=False)))
        change.note("unfenced", broker=broker_id)
        elected = [
            change.put_part(elect(part.meta, change.electable, lambda b: is_draining(change, b)))
            for part in change.parts_held(broker_id)
            if can_elect(part.meta, change.electable) and not part.frozen
        ]
        note_elected(change, elected)

    def _stopping(self, change: Change, record: BrokerRecord) -> None:
        """A broker wants to leave: no primaries for it from now on; it is fenced once it leads nothing any more."""
        meta = record.meta
        if not meta.stopping:
            change.put_broker(replace(record, meta=replace(meta, stopping=True)))
            change.note("stopping", broker=meta.id)
        if not meta.fenced and not self._leads(change, meta.id):
            self._fencing.suspect(change, meta.id, STOPPING)

    def _leads(self, change: Change, broker_id: int) -> bool:
        if not change.writes_parts:  # asked with every heartbeat of a broker that stops
            return change.state.led.get(broker_id, 0) > 0
        return any(record.meta.primary == broker_id for record in change.parts_held(broker_id))

    # -- commands of operators ----------------------------------------------------------------------

    def drain(self, change: Change, event: DrainSet) -> None:
        record = self._sessions.known(change, event.broker_id)
        if record.meta.draining != event.draining:
            record = replace(record, meta=replace(record.meta, draining=event.draining))
            change.put_broker(record)
        change.reply(event.reply, record.meta)

    def forget(self, change: Change, event: BrokerForgotten) -> None:
        record = self._sessions.known(change, event.broker_id)
        held = len(change.parts_held(event.broker_id))
        if held:
            raise Conflict(f"broker {event.broker_id} still holds {held} replicas: drain it first", replicas=held)
        if not record.meta.fenced:
            raise NotReady(f"broker {event.broker_id} is serving: stop it first")
        change.delete(broker_key(event.broker_id))
        change.reply(event.reply, record.meta)
