"""The REST surface of backups: records out, and into an empty cluster. Logs go from and to the brokers.

``GET  /v1/backup``         {cluster_id, revision, feature_level, records: {key: base64}}
``POST /v1/restore``        {records, epochs: {topic id/partition: epoch}}: which broker takes what
``POST /v1/restore/finish`` {topic_id, partition, broker}: it holds the logs; let it lead
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

from aiohttp import web
from pydantic import Field

from ferryline.protocol.errors import InvalidArgument
from ferryline.protocol.limits import check_range
from ferryline_coordinator.core import events as ev
from ferryline_coordinator.core.records import encode_record, record_key
from ferryline_coordinator.core.restoring import is_backed_up
from ferryline_coordinator.driver import Driver
from ferryline_coordinator.models import Body
from ferryline_coordinator.rest import durable_state
from ferryline_coordinator.views import partition_json
from ferryline_service.errors import read_json


class Restore(Body):
    """``records``: as a backup has them. ``epochs``: highest epoch of the logs of ``<topic id>/<partition>``."""

    records: dict[str, str] = Field(max_length=10_000)
    epochs: dict[str, int] = Field({}, max_length=100_000)


class Finish(Body):
    topic_id: str = Field(max_length=64)
    partition: int
    broker: int


class BackupRest:
    """Handlers by name of what they do; `routes` is the table of contents."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/backup", self.backup),
            web.post("/v1/restore", self.restore),
            web.post("/v1/restore/finish", self.finish),
        ]

    async def backup(self, _: web.Request) -> web.Response:
        """What is durable now, in one piece."""
        state = await durable_state(self._driver)
        records = {
            key: base64.b64encode(encode_record(record)).decode()
            for record in state.records()
            if is_backed_up(key := record_key(record))
        }
        cluster = state.cluster
        return web.json_response(
            {
                "cluster_id": cluster.cluster_id,
                "revision": cluster.revision,
                "feature_level": cluster.feature_level,
                "records": records,
            }
        )

    async def restore(self, request: web.Request) -> web.Response:
        body = Restore.model_validate(await read_json(request))
        try:
            records = {key: base64.b64decode(value, validate=True) for key, value in body.records.items()}
        except (binascii.Error, ValueError):  # ValueError: no ASCII
            raise InvalidArgument("records: expected base64", field="records") from None
        epochs = {_key(name): check_range(epoch, "epochs", 0, 2**31 - 2) for name, epoch in body.epochs.items()}
        taken: Any = await self._driver.ask(lambda reply: ev.RestoreBegun(reply, records, epochs))
        return web.json_response({"partitions": [list(row) for row in taken]})

    async def finish(self, request: web.Request) -> web.Response:
        body = Finish.model_validate(await read_json(request))
        part = await self._driver.ask(lambda reply: ev.RestoreEnded(reply, body.topic_id, body.partition, body.broker))
        return web.json_response(partition_json(self._driver.state, part))


def _key(name: str) -> tuple[str, int]:
    topic_id, _, number = name.partition("/")
    if not (number.isascii() and number.isdigit() and len(number) <= 10):
        raise InvalidArgument(f"epochs: {name[:80]!r} is not <topic id>/<partition>", field="epochs")
    return topic_id, int(number)
