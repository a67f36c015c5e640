"""Which session speaks for which broker."""

from __future__ import annotations

from ferryline.protocol.errors import StaleBrokerEpoch, UnknownBroker
from ferryline_coordinator.core.change import Change
from ferryline_coordinator.core.records import BrokerRecord


class Sessions:
    """A broker's latest open session is the one that counts. Soft: after a restart brokers connect again."""

    def __init__(self) -> None:
        self._latest: dict[int, int] = {}  # broker -> session
        self._ended: dict[int, int] = {}  # broker -> latest session that ended

    def opened(self, broker_id: int, session: int) -> None:
        if session > self._latest.get(broker_id, 0):
            self._latest[broker_id] = session

    def closed(self, broker_id: int, session: int) -> bool:
        """Whether this was the broker's latest one, so that nobody speaks for it now."""
        self._ended[broker_id] = max(session, self._ended.get(broker_id, 0))
        if self._latest.get(broker_id) != session:
            return False
        del self._latest[broker_id]
        return True

    def speaks_for(self, broker_id: int, session: int) -> bool:
        """Whether this may be the broker's latest session: what an earlier one, or one that ended, says comes late."""
        return session >= self._latest.get(broker_id, 0) and session > self._ended.get(broker_id, 0)

    def known(self, change: Change, broker_id: int) -> BrokerRecord:
        record = change.broker(broker_id)
        if record is None:
            raise UnknownBroker(f"broker {broker_id} is not registered", broker_id=broker_id)
        return record

    def checked(self, change: Change, broker_id: int, broker_epoch: int, session: int) -> BrokerRecord:
        """The record of a broker that may speak: known, present broker epoch, latest session."""
        record = self.known(change, broker_id)
        if not record.meta.broker_epoch or record.meta.broker_epoch != broker_epoch:
            raise StaleBrokerEpoch(
                f"broker {broker_id}: epoch {broker_epoch} is not the present one, {record.meta.broker_epoch}"
            )
        if not self.speaks_for(broker_id, session):
            raise StaleBrokerEpoch(f"broker {broker_id} has a later session")
        return record
