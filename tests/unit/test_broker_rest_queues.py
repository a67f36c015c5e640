"""Queues over a broker's REST: what a person with curl, or a program without a client, gets and may do."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

from ferryline.protocol.frames import Kind
from ferryline.protocol.messages import ProduceEntry
from ferryline.protocol.metadata import RetryPolicy, TopicMeta
from ferryline.protocol.queue_messages import Receive
from ferryline.protocol.records import encode_batch
from ferryline_broker.receipts import Named, named_by
from tests.polling import SOON_S
from unit.broker_world import BrokerWorld, RawClient, RunningBroker, eventually
from unit.test_broker_rest import Curl


class Queue(Curl):
    """One group at one broker."""

    def __init__(self, world: BrokerWorld, broker: RunningBroker, topic: str = "jobs", group: str = "g") -> None:
        super().__init__(world, broker)
        self.path = f"/v1/queues/{topic}/{group}"

    async def ask(self, what: str, **body: Any) -> tuple[int, Any]:
        return await self.post(f"{self.path}/{what}", body)

    async def look(self, what: str) -> tuple[int, Any]:
        return await self.get(f"{self.path}/{what}")

    async def receive(self, **body: Any) -> list[Any]:
        status, answer = await self.ask("receive", **{"wait_ms": 5_000, **body})
        assert status == 200, answer
        return answer["records"]  # type: ignore[no-any-return]

    async def settle(self, action: str, *records: Any, **fields: Any) -> list[str]:
        entries = [{"receipt": record["receipt"], "action": action, **fields} for record in records]
        _, answer = await self.ask("settle", entries=entries)
        return [result["outcome"] for result in answer["results"]]

    async def delete(self) -> tuple[int, Any]:
        async with self._http.delete(self._url + self.path, ssl=self._ssl) as response:
            return response.status, await self._body(response)


def values(records: list[Any]) -> list[Any]:
    return [record["value"] for record in records]


async def produce(client: RawClient, topic: TopicMeta, partition: int, *rows: tuple[str | None, bytes]) -> None:
    data = bytes(encode_batch([(key.encode() if key else None, value, []) for key, value in rows]))
    entry = ProduceEntry(topic.id, partition, topic.config.partitions, len(data))
    assert (await client.produce_raw([(entry, data)]))[0].error is None


@pytest.fixture
async def world(tmp_path: Path) -> Any:
    async with BrokerWorld(tmp_path) as made:
        yield made


async def test_a_record_is_leased_settled_and_told_so_again(world: BrokerWorld) -> None:
    broker = await world.broker()
    topic = await world.topic("jobs", [(broker.id,)])
    await produce(await world.client(broker.url), topic, 0, ("a", "grüße".encode()), ("a", b"a2"), ("b", b"\xff\x00"))
    queue = Queue(world, broker)
    first = await queue.receive()
    assert values(first) == ["grüße", {"base64": "/wA="}], "a2 waits behind the first of its lane"
    assert [(record["partition"], record["key"], record["attempts"]) for record in first] == [(0, "a", 1), (0, "b", 1)]
    assert await queue.settle("ack", first[0]) == ["done"]
    assert await queue.settle("ack", first[0]) == ["settled"]
    assert values(await queue.receive()) == ["a2"]
    assert await queue.settle("nack", first[1], delay_ms=0, reason="busy") == ["done"]
    again = await queue.receive()
    assert [(record["value"], record["attempts"]) for record in again] == [({"base64": "/wA="}, 2)]
    assert await queue.settle("ack", first[1]) == ["stale"], "it was leased again since"
    assert await queue.settle("release", *again) == ["done"]
    assert [record["attempts"] for record in await queue.receive()] == [2], "a release does not count"


async def test_a_long_poll_ends_with_the_record_or_with_its_time_or_with_the_broker(world: BrokerWorld) -> None:
    broker = await world.broker()
    topic = await world.topic("jobs", [(broker.id,)])
    client, queue, handler = await world.client(broker.url), Queue(world, broker), broker.broker.frames.queues
    assert await queue.receive(wait_ms=50) == []
    waiting = asyncio.ensure_future(queue.receive(wait_ms=20_000))
    await eventually(lambda: handler._parked, "it is parked")
    await produce(client, topic, 0, (None, b"late"))
    assert values(await waiting) == ["late"]
    await eventually(lambda: not handler._parked and len(handler._askers) == 0, "nothing is left of those requests")
    parked = asyncio.ensure_future(queue.ask("receive", wait_ms=60_000))
    await eventually(lambda: handler._parked, "it is parked")
    stopping = asyncio.ensure_future(broker.stop())
    status, problem = await asyncio.wait_for(parked, SOON_S)
    assert (status, problem["code"]) == (503, "PRIMARY_NOT_AVAILABLE")
    assert await stopping == 0


async def test_what_was_leased_for_a_caller_that_left_goes_to_another(world: BrokerWorld) -> None:
    broker = await world.broker()
    topic = await world.topic("jobs", [(broker.id,)])
    client, queue, handler = await world.client(broker.url), Queue(world, broker), broker.broker.frames.queues
    left = asyncio.ensure_future(queue.receive(wait_ms=60_000))
    await eventually(lambda: handler._parked, "it is parked")
    asker = next(iter(handler._askers))
    left.cancel()
    await eventually(lambda: asker.closed, "the broker saw it leave")
    other = asyncio.ensure_future(queue.receive(wait_ms=20_000))
    await eventually(lambda: len(handler._askers) == 2, "the other is parked behind it")
    await produce(client, topic, 0, (None, b"for whoever listens"))
    found = await other
    assert [(record["value"], record["attempts"]) for record in found] == [("for whoever listens", 1)]
    await eventually(lambda: not handler._askers, "who has left is forgotten")


async def test_a_broker_answers_for_what_it_leads_and_names_the_others(world: BrokerWorld) -> None:
    first, second = await world.broker(), await world.broker()
    topic = await world.topic("jobs", [(first.id,), (second.id,)])
    await produce(await world.client(first.url), topic, 0, (None, b"here"))
    await produce(await world.client(second.url), topic, 1, (None, b"there"))
    await eventually(lambda: len(first.broker.view.metadata.brokers) == 2, "the first knows the second")
    queue = Queue(world, first)
    status, answer = await queue.ask("receive", wait_ms=5_000)
    assert (status, values(answer["records"])) == (200, ["here"])
    there = {"partition": 1, "code": "NOT_PRIMARY", "primary": second.id, "primary_url": second.url}
    assert answer["elsewhere"] == [there]
    for what in ("receive", "pause", "purge", "redrive", "keep"):
        status, problem = await queue.ask(what, partition=1)
        assert (status, problem["details"]["primary_url"]) == (421, second.url), what
    for what in ("stats?partition=1", "peek?partition=1", "explain?partition=1&offset=0"):
        status, problem = await queue.look(what)
        assert (status, problem["details"]["primary_url"]) == (421, second.url), what
    status, answer = await queue.look("stats")
    assert (status, [part["partition"] for part in answer["partitions"]]) == (200, [0])
    assert answer["elsewhere"] == [there]
    (record,) = await Queue(world, second).receive()
    status, answer = await queue.ask("settle", entries=[{"receipt": record["receipt"], "action": "ack"}])
    assert (status, answer["results"][0]["outcome"]) == (207, "error")
    assert answer["results"][0]["error"]["details"]["primary_url"] == second.url
    await world.topic("afar", [(second.id,), (second.id,)])
    await eventually(lambda: first.broker.view.metadata.topic("afar"), "the first knows the topic")
    status, problem = await Queue(world, first, "afar").ask("receive")
    assert (status, len(problem["details"]["elsewhere"])) == (421, 2)


async def test_a_fail_over_leaves_receipts_good(world: BrokerWorld) -> None:
    first, second = await world.broker(), await world.broker()
    topic = await world.topic("jobs", [(first.id, second.id)])
    await produce(await world.client(first.url), topic, 0, ("a", b"a1"), ("a", b"a2"))
    held = await Queue(world, first).receive()
    assert values(held) == ["a1"]
    await first.crash()
    world.coordinator.fence(first.id)
    await eventually(lambda: world.primary(topic.id) is second, "the secondary leads")
    queue = Queue(world, second)
    assert await queue.settle("ack", *held) == ["done"]
    assert values(await queue.receive()) == ["a2"]


async def test_keep_frees_what_never_arrived(world: BrokerWorld) -> None:
    broker = await world.broker()
    topic = await world.topic("jobs", [(broker.id,)])
    await produce(await world.client(broker.url), topic, 0, ("a", b"a"), ("b", b"b"))
    queue = Queue(world, broker)
    (held,) = await queue.receive(records=1, member="one")
    await queue.receive(records=1, member="one")
    status, answer = await queue.ask("keep", member="one", receipts=[held["receipt"]])
    assert (status, answer["partitions"]) == (200, [{"partition": 0, "kept": 1}])
    found = await queue.receive(member="two")
    assert [(record["value"], record["attempts"]) for record in found] == [("b", 1)]
    status, problem = await queue.ask("keep", member="two", receipts=[held["receipt"]])
    assert (status, problem["code"]) == (400, "INVALID_ARGUMENT")
    await queue.ask("keep", member="one")
    assert values(await queue.receive(member="three")) == ["a"]


async def test_a_queue_is_looked_at_paused_purged_and_deleted(world: BrokerWorld) -> None:
    broker = await world.broker()
    topic = await world.topic("jobs", [(broker.id,)])
    queue = Queue(world, broker)
    status, problem = await queue.look("stats")
    assert (status, problem["code"]) == (404, "UNKNOWN_GROUP")
    await produce(await world.client(broker.url), topic, 0, ("a", b"a1"), ("a", b"a2"), ("b", b"\xff"))
    (held,) = await queue.receive(records=1, member="me")
    stats = (await queue.look("stats"))[1]["partitions"][0]
    assert (stats["leased"], stats["ready"], stats["waiting"], stats["members"]) == (1, 1, 1, {"me": 1})
    status, answer = await queue.look(f"explain?partition=0&offset={held['offset']}")
    assert (answer["partitions"][0]["state"], answer["partitions"][0]["member"]) == ("leased", "me")
    peeked = (await queue.look("peek"))[1]["partitions"][0]["records"]
    assert values(peeked) == ["a1", "a2", {"base64": "/w=="}]
    status, answer = await queue.look(f"peek?offset={peeked[1]['offset']}&count=1")
    assert values(answer["partitions"][0]["records"]) == ["a2"]
    assert (await queue.ask("pause"))[1]["partitions"] == [{"partition": 0, "paused": True}]
    assert await queue.receive(wait_ms=50) == []
    await queue.ask("resume", partition=0)
    assert (await queue.ask("purge", dry_run=True))[1]["partitions"][0]["purged"] == 3
    assert len((await queue.look("peek"))[1]["partitions"][0]["records"]) == 3, "it was a dry run"
    await queue.ask("purge")
    assert (await queue.look("peek"))[1]["partitions"][0]["records"] == []
    assert await queue.settle("ack", held) == ["settled"]
    assert (await queue.delete())[0] == 200
    assert (await queue.look("stats"))[0] == 404


async def test_a_parked_record_is_redriven_in_place(world: BrokerWorld) -> None:
    broker = await world.broker()
    topic = await world.topic("jobs", [(broker.id,)], retry=RetryPolicy(on_dead="park"))
    await produce(await world.client(broker.url), topic, 0, ("a", b"a1"), ("a", b"a2"), ("b", b"b1"))
    queue = Queue(world, broker)
    bad, other = await queue.receive()
    assert await queue.settle("reject", bad, other, reason="broken") == ["done", "done"]
    assert (await queue.look("stats"))[1]["partitions"][0]["parked"] == 2
    assert (await queue.ask("redrive", reason="whole"))[1]["partitions"][0]["offsets"] == []
    found = (await queue.ask("redrive", key="a", dry_run=True))[1]["partitions"][0]["offsets"]
    assert found == [bad["offset"]]
    assert (await queue.ask("redrive", key="a"))[1]["partitions"][0]["offsets"] == [bad["offset"]]
    again = await queue.receive()
    assert [(record["value"], record["attempts"]) for record in again] == [("a1", 1)]


async def test_sessions_and_rest_share_a_queue(world: BrokerWorld) -> None:
    broker = await world.broker()
    topic = await world.topic("jobs", [(broker.id,)])
    client, queue = await world.client(broker.url), Queue(world, broker)
    await produce(client, topic, 0, ("a", b"a1"), ("a", b"a2"))
    held = await queue.receive()
    parked = client.send(Kind.RECEIVE, Receive("g", "session", [(topic.id, 0)], wait_ms=10_000))
    await queue.settle("ack", *held)
    frame = await client.answer(parked)
    assert b"a2" in bytes(frame.payload)


async def test_a_receipt_is_refused_by_its_own_entry_and_the_others_are_settled(world: BrokerWorld) -> None:
    broker = await world.broker()
    topic = await world.topic("jobs", [(broker.id,)])
    await world.topic("others", [(broker.id,)])
    await produce(await world.client(broker.url), topic, 0, ("a", b"a1"), ("b", b"b1"))
    queue = Queue(world, broker)
    one, two = await queue.receive()
    named = named_by(one["receipt"])
    assert named is not None
    forged = two["receipt"][:-4] + ("AAAA" if two["receipt"][-4:] != "AAAA" else "BBBB")
    entries = [
        {"receipt": one["receipt"], "action": "ack"},
        {"receipt": forged, "action": "ack"},
        {"receipt": "nonsense", "action": "ack"},
        {"receipt": "\u00e4", "action": "ack"},
        {"receipt": two["receipt"], "action": "forget"},
    ]
    status, answer = await queue.ask("settle", entries=entries)
    outcomes = [result["outcome"] for result in answer["results"]]
    assert status == 207
    assert outcomes[0] == "done"
    assert outcomes[2:] == ["error", "error", "error"]
    assert outcomes[1] in ("error", "stale"), "it names another offset, or another lease"
    codes = [result["error"]["code"] for result in answer["results"][2:]]
    assert codes == ["INVALID_ARGUMENT"] * 3
    status, answer = await Queue(world, broker, group="h").ask("settle", entries=[entries[0]])
    assert answer["results"][0]["error"]["code"] == "FORBIDDEN", "the receipt is of another group"
    status, answer = await Queue(world, broker, "others").ask("settle", entries=[entries[0]])
    assert "not of this topic" in answer["results"][0]["error"]["detail"]
    assert (await queue.look("stats"))[1]["partitions"][0]["leased"] == 1, "b1 is still leased"


@pytest.mark.parametrize(
    ("what", "body", "named"),
    [
        ("receive", {"records": 0}, "records"),
        ("receive", {"records": 10_001}, "10000"),
        ("receive", {"wait_ms": 60_001}, "60000"),
        ("receive", {"lease_ms": 999}, "1000"),
        ("receive", {"lease_ms": 12 * 3_600_000 + 1}, "43200000"),
        ("receive", {"member": "m" * 257}, "256"),
        ("receive", {"member": "\ud800"}, "member"),
        ("receive", {"ordering": "chaos"}, "ordering"),
        ("receive", {"start": "middle"}, "start"),
        ("receive", {"partition": 9}, "0..0"),
        ("receive", {"partition": -1}, "partition"),
        ("receive", {"speed": 1}, "speed"),
        ("settle", {}, "entries"),
        ("settle", {"entries": []}, "entries"),
        ("settle", {"entries": [{"receipt": "x"}]}, "entries.0.action"),
        ("settle", {"entries": [{"receipt": "x" * 2_049, "action": "ack"}]}, "2048"),
        ("settle", {"entries": [{"receipt": "x", "action": "ack", "delay_ms": -2}]}, "delay_ms"),
        ("settle", {"entries": [{"receipt": "x", "action": "nack", "reason": "r" * 257}]}, "256"),
        ("keep", {"receipts": ["x"]}, "receipts.0"),
        ("purge", {"dry_run": "perhaps"}, "dry_run"),
        ("redrive", {"count": -1}, "count"),
        ("redrive", {"key": {"hex": "00"}}, "key"),
    ],
)
async def test_nonsense_is_refused_by_field_and_limit(
    world: BrokerWorld, what: str, body: dict[str, Any], named: str
) -> None:
    broker = await world.broker()
    await world.topic("jobs", [(broker.id,)])
    status, problem = await Queue(world, broker).ask(what, **body)
    assert (status, problem["code"]) == (400, "INVALID_ARGUMENT")
    assert named in problem["detail"]


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/v1/queues/none/g/stats", 404, "UNKNOWN_TOPIC"),
        ("/v1/queues/jobs/a%20b/stats", 400, "INVALID_NAME"),
        ("/v1/queues/jobs/g/stats?partition=1", 400, "INVALID_ARGUMENT"),
        ("/v1/queues/jobs/g/stats?partition=x", 400, "INVALID_ARGUMENT"),
        ("/v1/queues/jobs/g/peek?count=1001", 400, "INVALID_ARGUMENT"),
        ("/v1/queues/jobs/g/explain?partition=0", 400, "INVALID_ARGUMENT"),
        ("/v1/queues/jobs/g/explain?offset=0", 400, "INVALID_ARGUMENT"),
        ("/v1/queues/jobs/g/nonsense", 404, "NOT_FOUND"),
    ],
)
async def test_bad_paths_and_queries_are_refused(world: BrokerWorld, path: str, status: int, code: str) -> None:
    broker = await world.broker()
    await world.topic("jobs", [(broker.id,)])
    got, problem = await Queue(world, broker).get(path)
    assert (got, problem["code"]) == (status, code)


async def test_the_answer_to_a_peek_is_bounded_in_bytes(world: BrokerWorld) -> None:
    broker = await world.broker()
    topic = await world.topic("jobs", [(broker.id,)])
    client, queue = await world.client(broker.url), Queue(world, broker)
    await queue.receive(wait_ms=0)
    for _ in range(5):
        await produce(client, topic, 0, *[(None, b"x" * 1_000_000)] * 2)
    status, answer = await queue.look("peek")
    records = answer["partitions"][0]["records"]
    assert (status, len(records)) == (200, 9), "8 MiB, and the record that goes beyond"


async def test_a_body_that_is_too_large_is_refused(world: BrokerWorld) -> None:
    broker = await world.broker()
    await world.topic("jobs", [(broker.id,)])
    queue = Queue(world, broker)
    status, problem = await queue.post(f"{queue.path}/settle", b'{"entries": "' + b"x" * (8 * 1024 * 1024) + b'"}')
    assert status == 413
    assert problem["status"] == 413


async def test_the_openapi_document_names_every_route_and_resolves(world: BrokerWorld) -> None:
    broker = await world.broker()
    _, api = await Queue(world, broker).get("/openapi.json")
    queue = "/v1/queues/{topic}/{group}"
    served = {path.removeprefix(queue): sorted(methods) for path, methods in api["paths"].items() if queue in path}
    posts = {key: ["post"] for key in ("/receive", "/settle", "/keep", "/purge", "/pause", "/resume", "/redrive")}
    assert served == {"": ["delete"], "/stats": ["get"], "/peek": ["get"], "/explain": ["get"], **posts}
    for what in posts:
        assert "requestBody" in api["paths"][queue + what]["post"], what
    schemas = api["components"]["schemas"]
    for name in re.findall(r"#/components/schemas/(\w+)", str(api)):
        assert name in schemas, name
    assert schemas["ReceiveIn"]["properties"]["records"]["maximum"] == 10_000


def test_a_receipt_as_text_survives_and_nonsense_is_none() -> None:
    named = Named("t" * 32, 3, 7, 12, b"m" * 16, "müller", 99)
    from ferryline.protocol.queue_messages import Delivery
    from ferryline_broker.receipts import receipt_of

    text = receipt_of(Delivery("t" * 32, 3, 7, 12, b"m" * 16), "müller", 99)
    assert re.fullmatch(r"[A-Za-z0-9_-]+", text)
    assert named_by(text) == named
    for bad in ("", "x", "ä", "\ud800", text[:-3], text + "AAAA", text[:5] * 100):
        assert named_by(bad) is None, bad
