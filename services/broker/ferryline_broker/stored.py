"""What the partitions hold that this broker leads, by the principal that owns their topic: told to the coordinator,
which knows what the others hold and who may not write any more."""

from __future__ import annotations

import asyncio

from ferryline.protocol.access import StoredBytes
from ferryline.protocol.errors import FerrylineError
from ferryline.protocol.messages import RECORDS, STATE
from ferryline_broker.background import Background
from ferryline_broker.coordinator import CoordinatorLink
from ferryline_broker.core.node import NodeCore
from ferryline_broker.driver import PartitionDriver
from ferryline_broker.view import ClusterView
from ferryline_service.access.gate import Gate
from ferryline_service.logs import get_logger

EVERY_S = 2.0  # how late a quota of stored bytes may be noticed
_log = get_logger()


class StoredTeller(Background):
    """Tells while access is on, when something has changed; a new coordinator or a new life is told everything."""

    def __init__(
        self,
        partitions: PartitionDriver,
        view: ClusterView,
        node: NodeCore,
        link: CoordinatorLink,
        gate: Gate,
    ) -> None:
        self._partitions = partitions
        self._view = view
        self._node = node
        self._link = link
        self._gate = gate
        self._told: StoredBytes | None = None
        self._told_to = 0  # coordinator epoch

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(EVERY_S)
            policy = self._gate.policy
            if policy is not None and policy.enabled and self._link.connected and not self._node.fenced:
                try:
                    await self._tell()
                except FerrylineError as error:
                    _log.warning("what topics hold could not be told", error=str(error))
                except Exception:
                    _log.exception("what topics hold could not be told")

    async def _tell(self) -> None:
        coord_epoch = self._view.metadata.coord_epoch
        held = StoredBytes(self._node.broker_id, self._node.broker_epoch, self.held())
        if (held, coord_epoch) == (self._told, self._told_to):
            return
        if self._told is None and not held.owners:
            return
        await self._link.tell_stored(held)
        self._told, self._told_to = held, coord_epoch

    def held(self) -> list[tuple[str, int]]:
        """Bytes of both logs by owner, of what is led here."""
        found: dict[str, int] = {}
        for key, hosted in self._partitions.replicas.items():
            topic = self._view.topic(key[0])
            if topic is not None and topic.owner and hosted.core.role == "primary":
                size = hosted.logs[RECORDS].size_bytes + hosted.logs[STATE].size_bytes
                found[topic.owner] = found.get(topic.owner, 0) + size
        return sorted(found.items())
