"""What a broker forwards: once, to the broker that leads, and with an honest word about what may have come of it."""

from __future__ import annotations

import ipaddress
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from aiohttp import web

from ferryline.protocol.frames import Frame, Kind
from ferryline.protocol.metadata import BrokerMeta
from ferryline_service.metrics import ServiceMetrics
from ferryline_service.session import ServerSession, SessionEndpoint
from unit.broker_world import BrokerWorld, eventually
from unit.test_broker_rest import Curl

STRANGER = 9


class Swallower:
    """A broker that takes PRODUCE frames and is gone before it answers."""

    def __init__(self, world: BrokerWorld, folder: Path) -> None:
        coordinator = world.coordinator
        names = [str(ipaddress.ip_address("127.0.0.1"))]
        self.tls = coordinator.ca.files(folder / "swallower", STRANGER, names)
        self.swallowed = 0
        self.endpoint = SessionEndpoint(
            server="broker",
            cluster_id=coordinator.cluster_id,
            on_frame=self.on_frame,
            metrics=ServiceMetrics("broker"),
            broker_id=STRANGER,
        )
        self.url = ""

    def on_frame(self, session: ServerSession, frame: Frame) -> None:
        if frame.kind == Kind.PRODUCE:
            self.swallowed += 1
            session.abort("swallowed")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Swallower]:
        app = web.Application()
        app.router.add_routes(self.endpoint.routes())
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=self.tls.server)
        await site.start()
        assert site._server is not None
        self.url = f"https://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"  # type: ignore[attr-defined]
        try:
            yield self
        finally:
            await self.endpoint.close()
            await runner.cleanup()


async def test_a_record_whose_answer_is_lost_is_not_sent_again(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world, Swallower(world, tmp_path).running() as swallower:
        broker = await world.broker()
        world.coordinator.brokers[STRANGER] = BrokerMeta(STRANGER, swallower.url, swallower.url, 1, False)
        world.coordinator.create_topic("orders", [(broker.id,), (STRANGER,)])
        await eventually(lambda: broker.broker.view.metadata.topic("orders"), "the metadata arrives")
        await eventually(lambda: broker.broker.partitions.replicas, "the replica is made")
        topic = broker.broker.view.topic_named("orders")
        await eventually(lambda: broker.broker.partitions.replicas[topic.id, 0].core.ready, "it leads")
        curl = Curl(world, broker)
        status, body = await curl.post("/v1/topics/orders/records", {"records": [{"value": "x", "partition": 1}]})
        assert (status, body["code"], body["definite"]) == (503, "CONNECTION_LOST", False)
        assert swallower.swallowed == 1
        both = [{"value": "here", "partition": 0}, {"value": "there", "partition": 1}]
        status, body = await curl.post("/v1/topics/orders/records", {"records": both})
        assert (status, "offset" in body["results"][0], body["results"][1]["error"]["definite"]) == (207, True, False)
        assert swallower.swallowed == 2, "once for each time that somebody asked"
