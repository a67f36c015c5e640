"""The REST surface: for people, scripts and whoever does not speak frames. One short handler for each route.

Reads wait until what they show is durable. Everything else is a question to the core.
"""

from __future__ import annotations

import uuid
from typing import Any

from aiohttp import web

from ferryline.protocol.access import GROUP, READ, TOPIC
from ferryline.protocol.errors import (
    InvalidArgument,
    UnknownGroup,
    UnknownTopic,
)
from ferryline.protocol.limits import WAIT_MS_MAX, check_name, check_range
from ferryline.protocol.messages import GroupAssignment
from ferryline.protocol.metadata import NO_BROKER, MetadataRequest, PartitionMeta, TopicMeta
from ferryline.protocol.partitioner import partition_of
from ferryline_coordinator.access_rules import check_dead_letters, check_member
from ferryline_coordinator.core import events as ev
from ferryline_coordinator.core.tags import topic_tag
from ferryline_coordinator.driver import Driver
from ferryline_coordinator.models import (
    AddPartitions,
    AlterTopic,
    CreateTopic,
    MemberHeartbeat,
    Recover,
    as_json,
    assignment_json,
)
from ferryline_coordinator.views import broker_json, cluster_json, group_json, partition_json, topic_json
from ferryline_service.access.gate import CALLER
from ferryline_service.conditions import digest_of, expected, tagged
from ferryline_service.errors import read_json
from ferryline_service.paging import page


def number(request: web.Request, name: str, low: int, high: int, default: int) -> int:
    """An integer of the query string. Raises InvalidArgument naming it and its limits."""
    text = request.query.get(name)
    if text is None:
        return default
    if not text.removeprefix("-").isascii() or not text.removeprefix("-").isdigit() or len(text) > 20:
        raise InvalidArgument(f"{name}: expected an integer, got {text[:40]!r}", field=name)
    return check_range(int(text), name, low, high)


async def durable_state(driver: Driver) -> Any:
    """The state, with everything in it durable."""
    if not driver.serving:
        raise driver.not_serving()
    await driver.settled()
    if not driver.serving:  # what was waited for was given up
        raise driver.not_serving()
    return driver.state


def _seen(request: web.Request) -> tuple[str, ...]:
    """Tags of the config that the caller has seen: what ETags of topics begin with."""
    return tuple(".".join(tag.split(".")[:2]) for tag in expected(request))


class Rest:
    """Handlers by name of what they do; `routes` is the table of contents."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/topics", self.create_topic),
            web.get("/v1/topics", self.list_topics),
            web.get("/v1/topics/{topic}", self.get_topic),
            web.patch("/v1/topics/{topic}", self.alter_topic),
            web.delete("/v1/topics/{topic}", self.delete_topic),
            web.post("/v1/topics/{topic}/partitions", self.add_partitions),
            web.get("/v1/topics/{topic}/route", self.route_key),
            web.get("/v1/cluster", self.get_cluster),
            web.get("/v1/brokers", self.list_brokers),
            web.post("/v1/brokers/{broker}/drain", self.drain_broker),
            web.post("/v1/brokers/{broker}/undrain", self.undrain_broker),
            web.delete("/v1/brokers/{broker}", self.forget_broker),
            web.get("/v1/partitions", self.list_partitions),
            web.post("/v1/partitions/recover", self.recover_partition),
            web.get("/v1/groups", self.list_groups),
            web.get("/v1/groups/{group}", self.get_group),
            web.delete("/v1/groups/{group}", self.delete_group),
            web.post("/v1/groups/{group}/heartbeat", self.heartbeat),
            web.get("/v1/metadata", self.get_metadata),
        ]

    async def _state(self) -> Any:
        return await durable_state(self._driver)

    # -- topics -------------------------------------------------------------------------------------

    async def create_topic(self, request: web.Request) -> web.Response:
        body = CreateTopic.model_validate(await read_json(request))
        topic_id, settings = uuid.uuid4().hex, body.config.given()
        owner = request[CALLER].owner
        self._check_settings(request, body.name, settings)
        topic = await self._driver.ask(lambda reply: ev.TopicCreated(reply, body.name, topic_id, settings, owner))
        return self._topic(topic, 201)

    async def list_topics(self, request: web.Request) -> web.Response:
        """Those that the caller may read."""
        state, caller = await self._state(), request[CALLER]
        found = [topic for topic in state.topics.values() if caller.may(READ, TOPIC, topic.name)]
        topics = {topic.name: topic for topic in found}
        names, following = page(request, "topics", sorted(topics))
        shown = [topic_json(state, topics[name]) for name in names]
        return web.json_response({"topics": shown, "next_cursor": following})

    async def get_topic(self, request: web.Request) -> web.Response:
        """A topic with its partitions. The ETag changes with everything that is shown; If-Match looks at the config."""
        state = await self._state()
        topic = self._known(state, request)
        parts = [partition_json(state, part) for part in self._parts(state, topic)]
        shown = {**topic_json(state, topic), "partitions": parts}
        return tagged(request, shown, f"{topic_tag(topic)}.{digest_of(shown)}")

    async def alter_topic(self, request: web.Request) -> web.Response:
        name = request.match_info["topic"]
        settings = AlterTopic.model_validate(await read_json(request)).config.given()
        seen = _seen(request)
        self._check_settings(request, name, settings)
        return self._topic(await self._driver.ask(lambda reply: ev.TopicAltered(reply, name, settings, seen)))

    async def delete_topic(self, request: web.Request) -> web.Response:
        name, seen = request.match_info["topic"], _seen(request)
        return self._topic(await self._driver.ask(lambda reply: ev.TopicDeleted(reply, name, seen)))

    async def add_partitions(self, request: web.Request) -> web.Response:
        name = request.match_info["topic"]
        body, seen = AddPartitions.model_validate(await read_json(request)), _seen(request)
        return self._topic(
            await self._driver.ask(lambda reply: ev.PartitionsAdded(reply, name, body.partitions, body.keys_move, seen))
        )

    async def route_key(self, request: web.Request) -> web.Response:
        """Where a key goes: its partition, and who leads that."""
        state = await self._state()
        topic = self._known(state, request)
        key = request.query.get("key")
        if key is None:
            raise InvalidArgument("key: the query parameter is missing", field="key")
        partition = partition_of(key.encode("utf-8", "surrogateescape"), topic.config.partitions)
        part = state.part(topic.id, partition).meta
        leader = state.brokers.get(part.primary)
        return web.json_response(
            {
                "topic": topic.name,
                "topic_id": topic.id,
                "partition": partition,
                "partitions": topic.config.partitions,
                "primary": part.primary or None,
                "epoch": part.epoch,
                "url": leader.meta.external if leader is not None else None,
            }
        )

    def _check_settings(self, request: web.Request, name: str, settings: dict[str, Any]) -> None:
        """Raises Forbidden where they would reach beyond the topic itself."""
        if not self._driver.serving:
            raise self._driver.not_serving()
        check_dead_letters(request[CALLER], self._driver.state, name, settings)

    def _topic(self, topic: TopicMeta, status: int = 200) -> web.Response:
        headers = {"ETag": f'"{topic_tag(topic)}"'}
        return web.json_response(topic_json(self._driver.state, topic), status=status, headers=headers)

    def _known(self, state: Any, request: web.Request) -> TopicMeta:
        name = check_name(request.match_info["topic"])
        topic: TopicMeta | None = state.topic(name)
        if topic is None:
            raise UnknownTopic(f"topic {name} does not exist", topic=name)
        return topic

    def _parts(self, state: Any, topic: TopicMeta) -> list[PartitionMeta]:
        found = (state.part(topic.id, partition) for partition in range(topic.config.partitions))
        return [record.meta for record in found if record is not None]

    # -- cluster, brokers, partitions ---------------------------------------------------------------

    async def get_cluster(self, _: web.Request) -> web.Response:
        await self._state()
        return web.json_response(cluster_json(self._driver.core))

    async def list_brokers(self, _: web.Request) -> web.Response:
        state = await self._state()
        return web.json_response({"brokers": [broker_json(state, meta) for meta in state.broker_metas()]})

    async def drain_broker(self, request: web.Request) -> web.Response:
        return await self._drain(request, True)

    async def undrain_broker(self, request: web.Request) -> web.Response:
        return await self._drain(request, False)

    async def _drain(self, request: web.Request, draining: bool) -> web.Response:
        broker_id = self._broker(request)
        meta = await self._driver.ask(lambda reply: ev.DrainSet(reply, broker_id, draining))
        return web.json_response(broker_json(self._driver.state, meta))

    async def forget_broker(self, request: web.Request) -> web.Response:
        broker_id = self._broker(request)
        meta = await self._driver.ask(lambda reply: ev.BrokerForgotten(reply, broker_id))
        return web.json_response(broker_json(self._driver.state, meta))

    def _broker(self, request: web.Request) -> int:
        text = request.match_info["broker"]
        if not text.isascii() or not text.isdigit() or len(text) > 10:
            raise InvalidArgument(f"broker: expected a number, got {text[:40]!r}", field="broker")
        return int(text)

    async def list_partitions(self, request: web.Request) -> web.Response:
        """All partitions; ``state=offline|under_replicated|moving`` and ``topic=`` choose among them."""
        state = await self._state()
        wanted, name = request.query.get("state", ""), request.query.get("topic")
        if wanted not in ("", "offline", "under_replicated", "moving"):
            raise InvalidArgument("state: expected offline, under_replicated or moving", field="state")
        parts = [state.parts[key].meta for key in sorted(state.parts)]
        if name is not None:
            topic = state.topic(check_name(name))
            parts = [part for part in parts if topic is not None and part.topic_id == topic.id]
        if wanted == "offline":
            parts = [part for part in parts if part.primary == NO_BROKER]
        elif wanted == "under_replicated":
            parts = [part for part in parts if len(part.isr) < len(part.replicas) - len(part.adding)]
        elif wanted == "moving":
            parts = [part for part in parts if part.adding or part.removing]
        return web.json_response({"partitions": [partition_json(state, part) for part in parts]})

    async def recover_partition(self, request: web.Request) -> web.Response:
        body = Recover.model_validate(await read_json(request))
        part = await self._driver.ask(
            lambda reply: ev.RecoveryAsked(reply, body.topic, body.partition, body.accept_data_loss)
        )
        return web.json_response(partition_json(self._driver.state, part))

    # -- groups -------------------------------------------------------------------------------------

    async def list_groups(self, request: web.Request) -> web.Response:
        """Those that the caller may read."""
        state, caller = await self._state(), request[CALLER]
        known = [name for name in sorted(state.groups) if caller.may(READ, GROUP, name)]
        names, following = page(request, "groups", known)
        groups = [group_json(self._driver.core, state.groups[name]) for name in names]
        return web.json_response({"groups": groups, "next_cursor": following})

    async def get_group(self, request: web.Request) -> web.Response:
        state = await self._state()
        name = check_name(request.match_info["group"], "group")
        record = state.groups.get(name)
        if record is None:
            raise UnknownGroup(f"group {name} does not exist", group=name)
        return web.json_response(group_json(self._driver.core, record))

    async def delete_group(self, request: web.Request) -> web.Response:
        name = request.match_info["group"]
        record = await self._driver.ask(lambda reply: ev.GroupDeleted(reply, name))
        return web.json_response({"group": record.group, "deleted": True})

    async def heartbeat(self, request: web.Request) -> web.Response:
        message = MemberHeartbeat.model_validate(await read_json(request)).message(request.match_info["group"])
        check_member(request[CALLER], message)
        answer = await self._driver.ask(lambda reply: ev.GroupHeartbeatReceived(reply, message))
        assert isinstance(answer, GroupAssignment)
        return web.json_response(assignment_json(answer))

    # -- metadata -----------------------------------------------------------------------------------

    async def get_metadata(self, request: web.Request) -> web.Response:
        """What changed after ``since`` (under the coordinator epoch ``coord_epoch``), waiting up to ``wait_ms``."""
        since = number(request, "since", -1, 2**62, -1)
        wait_ms = number(request, "wait_ms", 0, WAIT_MS_MAX, 0)
        epoch = number(request, "coord_epoch", 0, 2**62, self._driver.core.coord_epoch)
        asked = MetadataRequest(request.query.get("cluster_id", ""), epoch, since, wait_ms)
        answer = await self._driver.ask(lambda reply: ev.MetadataAsked(reply, asked))
        return web.json_response(as_json(answer))
