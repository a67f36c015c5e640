"""Every public call of the client, against everything that can be wrong: a value or a typed error within its deadline.

"Recovered" means: within two seconds of the cluster's return a consumer gets the next record.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import ferryline as fl
from ferryline.cli.drill import healed, partitions_of
from ferryline.cli.driver import COORDINATOR, ProcessCluster
from ferryline.protocol import errors
from tests.integration.faults import Ballast, Proxy, free_bytes

pytestmark = pytest.mark.process

TOPIC = "calls"
PARTITIONS = 2
DEADLINE_S = 3.0
AMPLE_S = 10.0  # where some calls must have a value
MARGIN_S = 10.0  # for the machine, not for the client, whose own limits are half a minute
RECOVERY_S = 2.0

Call = Callable[["Bench"], Awaitable[Any]]


class Bench:
    """A client with an open producer and consumers, made while all was well."""

    def __init__(self, cluster: ProcessCluster, deadline_s: float = DEADLINE_S) -> None:
        self.cluster = cluster
        self.deadline_s = deadline_s

    async def start(self, topic_replication: int = 2) -> Bench:
        self.client = fl.connect(self.cluster.urls, ca=self.cluster.ca, timeout=self.deadline_s)
        await self.client.start()
        await self.client.admin.create_topic(
            TOPIC, partitions=PARTITIONS, replication=topic_replication, exist_ok=True, timeout=60
        )
        assert await healed(self.client, TOPIC, PARTITIONS, topic_replication, 60)
        self.producer = self.client.producer(
            linger=0, delivery_timeout=self.deadline_s, request_timeout=self.deadline_s
        )
        await self.producer.start()
        for number in range(20):
            await self.producer.send(TOPIC, b"%d" % number, partition=number % PARTITIONS)
        self.member = self.client.consumer(TOPIC, group="callers", auto_commit=False)
        await self.member.start()
        self.reader = self.client.consumer(TOPIC)
        await self.reader.start()
        for consumer in (self.member, self.reader):
            seen = 0
            while seen < 20:
                batch = await consumer.pull(100, 30.0)
                assert batch
                seen += len(batch)
        self.receiver = self.client.receiver(TOPIC, group="workers", prefetch=1_000)
        await self.receiver.start()
        done = 0
        while done < 20:
            done += len(await self.acknowledged(30.0))
        return self

    async def acknowledged(self, max_wait: float) -> list[fl.QueueMessage[bytes]]:
        """Receive what there is and acknowledge it; whatever could not be acknowledged comes again."""
        batch = await self.receiver.receive(1_000, max_wait)
        await self.receiver.ack_many(batch)
        return batch

    async def close(self) -> None:
        async with asyncio.timeout(30):
            await self.client.close()

    @property
    def place(self) -> fl.TopicPartition:
        return fl.TopicPartition(TOPIC, 0)

    def primary(self) -> str:
        return self.cluster.name_of(partitions_of(self.client, TOPIC)[0].primary)


async def _connect(bench: Bench) -> None:
    async with fl.connect(bench.cluster.urls, ca=bench.cluster.ca, timeout=bench.deadline_s):
        pass


async def _iterate(bench: Bench) -> Any:
    async with asyncio.timeout(DEADLINE_S):
        return await bench.reader.__anext__()


async def _start_reader(bench: Bench) -> None:
    consumer = bench.client.consumer(TOPIC)
    try:
        await consumer.start()
    finally:
        await consumer.close()


async def _start_member(bench: Bench) -> None:
    consumer = bench.client.consumer(TOPIC, group="newcomers")
    try:
        await consumer.start()
    finally:
        await consumer.close()


async def _start_receiver(bench: Bench) -> None:
    receiver = bench.client.receiver(TOPIC, group="late")
    try:
        await receiver.start()
    finally:
        await receiver.close()


async def _nowait(bench: Bench) -> Any:
    return await bench.producer.send_nowait(TOPIC, b"x", partition=0)


CALLS: dict[str, Call] = {
    "connect": _connect,
    "producer.send": lambda b: b.producer.send(TOPIC, b"x", partition=0),
    "producer.send_nowait": _nowait,
    "producer.send_many": lambda b: b.producer.send_many(TOPIC, [b"x", (b"k", b"y")]),
    "producer.flush": lambda b: b.producer.flush(timeout=b.deadline_s),
    "consumer.start": _start_reader,
    "consumer.start, in a group": _start_member,
    "consumer.pull": lambda b: b.reader.pull(10, 1.0),
    "async for": _iterate,
    "consumer.commit": lambda b: b.member.commit({b.place: 3}),
    "consumer.committed": lambda b: b.member.committed(b.place),
    "consumer.seek": lambda b: b.reader.seek(b.place, "end"),
    "consumer.lag": lambda b: b.reader.lag(),
    "receiver.start": _start_receiver,
    "receiver.receive": lambda b: b.receiver.receive(1, 1.0),
    "receiver.flush": lambda b: b.receiver.flush(timeout=b.deadline_s),
    "admin.create_topic": lambda b: b.client.admin.create_topic(f"t{time.monotonic_ns()}", partitions=1),
    "admin.alter_topic": lambda b: b.client.admin.alter_topic(TOPIC, retention_ms=7_200_000),
    "admin.add_partitions": lambda b: b.client.admin.add_partitions("no-such-topic", 5, keys_move=True),
    "admin.delete_topic": lambda b: b.client.admin.delete_topic("no-such-topic"),
    "admin.list_topics": lambda b: b.client.admin.list_topics(),
    "admin.describe_topic": lambda b: b.client.admin.describe_topic(TOPIC),
    "admin.list_groups": lambda b: b.client.admin.list_groups(),
    "admin.describe_group": lambda b: b.client.admin.describe_group("callers"),
    "admin.delete_group": lambda b: b.client.admin.delete_group("no-such-group"),
    "admin.list_brokers": lambda b: b.client.admin.list_brokers(),
    "admin.drain_broker": lambda b: b.client.admin.drain_broker(999),
    "admin.undrain_broker": lambda b: b.client.admin.undrain_broker(999),
    "admin.cluster": lambda b: b.client.admin.cluster(),
    "admin.route": lambda b: b.client.admin.route(TOPIC, "k"),
}
# What a call may end with besides a value. Never a bare TimeoutError, never an InternalError.
ALLOWED = (
    errors.Unavailable,
    errors.ConnectionFailed,
    errors.ConnectionLost,
    errors.RequestTimedOut,
    errors.DeadlineExceeded,
    errors.OutcomeUnknown,
    errors.NotFound,
)


async def outcome(name: str, call: Call, bench: Bench) -> tuple[str, str, float]:
    """(call, what it ended with, seconds). "async for" waits for ever by design: its time-out counts as a value."""
    started = time.monotonic()
    try:
        async with asyncio.timeout(bench.deadline_s + MARGIN_S + 5):
            result = await call(bench)
            found = "value"
            if isinstance(result, list) and any(isinstance(one, Exception) for one in result):
                wrong = [one for one in result if isinstance(one, Exception) and not isinstance(one, ALLOWED)]
                found = f"untyped {wrong[0]!r}" if wrong else "errors"
    except ALLOWED as error:
        found = error.code
    except TimeoutError:
        took = time.monotonic() - started
        found = "value" if name == "async for" and took < DEADLINE_S + MARGIN_S else "TimeoutError"
    except errors.FerrylineError as error:
        found = f"unexpected {error!r}"
    return name, found, time.monotonic() - started


async def all_calls(bench: Bench) -> dict[str, str]:
    """Every call once, all at the same time; returns what each ended with. Asserts deadlines and types."""
    found = await asyncio.gather(*(outcome(name, call, bench) for name, call in CALLS.items()))
    late = [(name, seconds) for name, _, seconds in found if seconds > bench.deadline_s + MARGIN_S]
    assert not late, late
    wrong = [(name, text) for name, text, _ in found if text == "TimeoutError" or text.startswith("un")]
    assert not wrong, wrong
    return {name: text for name, text, _ in found}


async def _failure(call: Awaitable[Any]) -> errors.FerrylineError | None:
    """The typed error that a call ends with, if it does."""
    try:
        await call
    except errors.FerrylineError as error:
        return error
    return None


async def recovers(bench: Bench) -> None:
    """A record sent now reaches both consumers, and a receiver, within RECOVERY_S of the first successful send."""
    value = b"after %d" % time.monotonic_ns()
    end = time.monotonic() + 30
    while (failed := await _failure(bench.producer.send(TOPIC, value, partition=0))) is not None:
        assert time.monotonic() < end, f"sending never recovered: {failed!r}"
        await asyncio.sleep(0.1)
    sent = time.monotonic()
    takes: list[Callable[[], Awaitable[list[Any]]]] = [
        lambda: bench.reader.pull(1_000, 0.2),
        lambda: bench.member.pull(1_000, 0.2),
        lambda: bench.acknowledged(0.2),
    ]
    for take in takes:
        while True:
            try:
                if any(message.raw == value for message in await take()):
                    break
            except errors.FerrylineError:
                await asyncio.sleep(0.05)
            assert time.monotonic() - sent < RECOVERY_S + MARGIN_S, "a consumer did not go on"


@pytest.fixture
async def bench(cluster: ProcessCluster) -> AsyncIterator[Bench]:
    made = await Bench(cluster).start()
    yield made
    await made.close()


async def test_when_all_is_well_every_call_has_a_value_or_says_what_does_not_exist(cluster: ProcessCluster) -> None:
    bench = await Bench(cluster, AMPLE_S).start()
    found = await all_calls(bench)
    await bench.close()
    names = ("add_partitions", "delete_topic", "delete_group", "drain_broker", "undrain_broker")
    expected_not_found = {f"admin.{name}" for name in names}
    assert {name for name, text in found.items() if text != "value"} == expected_not_found, found


async def test_a_dead_coordinator(cluster: ProcessCluster) -> None:
    bench = await Bench(cluster, AMPLE_S).start()
    await bench.cluster.kill(COORDINATOR)
    found = await all_calls(bench)
    data = ("connect", "producer.send", "producer.send_many", "producer.flush", "consumer.start", "consumer.pull")
    data += ("consumer.commit", "consumer.committed", "consumer.seek", "consumer.lag", "admin.list_topics")
    assert {name: found[name] for name in data} == dict.fromkeys(data, "value")
    assert found["admin.create_topic"] != "value"
    await recovers(bench)
    await bench.cluster.restart(COORDINATOR)
    await recovers(bench)
    await bench.close()


async def test_a_dead_primary(bench: Bench) -> None:
    await bench.cluster.kill(bench.primary())
    await all_calls(bench)
    await recovers(bench)


async def test_a_stopped_primary(bench: Bench) -> None:
    victim = bench.primary()
    await bench.cluster.pause(victim)
    try:
        await all_calls(bench)
        await recovers(bench)
    finally:
        await bench.cluster.resume(victim)
    await recovers(bench)


async def test_a_stopped_coordinator(bench: Bench) -> None:
    await bench.cluster.pause(COORDINATOR)
    try:
        found = await all_calls(bench)
        assert found["producer.send"] == "value"
        assert found["admin.create_topic"] != "value"
    finally:
        await bench.cluster.resume(COORDINATOR)
    await recovers(bench)


async def test_everything_dead_and_back(bench: Bench) -> None:
    await bench.cluster.kill_all()
    found = await all_calls(bench)
    assert "value" not in {found[name] for name in ("connect", "producer.send", "consumer.lag", "admin.list_groups")}
    await bench.cluster.start()
    await recovers(bench)


async def test_an_unknown_topic_is_told_at_once(bench: Bench) -> None:
    calls: dict[str, Callable[[], Awaitable[Any]]] = {
        "send": lambda: bench.producer.send("nowhere", b"x"),
        "send_many": lambda: bench.producer.send_many("nowhere", [b"x"]),
        "consumer": lambda: bench.client.consumer("nowhere").start(),
        "member": lambda: bench.client.consumer("nowhere", group="g").start(),
        "describe": lambda: bench.client.admin.describe_topic("nowhere"),
        "alter": lambda: bench.client.admin.alter_topic("nowhere", retention_ms=3_600_000),
        "delete": lambda: bench.client.admin.delete_topic("nowhere"),
        "route": lambda: bench.client.admin.route("nowhere", "k"),
        "commit": lambda: bench.member.commit({fl.TopicPartition("nowhere", 0): 1}),
        "seek": lambda: bench.reader.seek(fl.TopicPartition("nowhere", 0), 0),
    }
    for name, call in calls.items():
        started = time.monotonic()
        with pytest.raises(errors.UnknownTopic):
            await call()
        assert time.monotonic() - started < MARGIN_S, name


async def test_a_half_open_connection(start_cluster: Any) -> None:
    """The network swallows everything, in silence, also on connections that were open."""
    proxy = await Proxy().start()
    try:
        cluster = await start_cluster(
            brokers=1, broker_args=["--advertise-external", f"https://127.0.0.1:{proxy.port}"]
        )
        proxy.target_port = cluster.local.services["broker-1"].port
        bench = await Bench(cluster).start(topic_replication=1)
        proxy.silence()
        found = await all_calls(bench)
        assert found["producer.send"] != "value"
        proxy.speak()
        await recovers(bench)
        await bench.close()
    finally:
        await proxy.close()


async def test_an_address_that_accepts_and_never_answers() -> None:
    proxy = await Proxy().start()
    proxy.silence()
    try:
        started = time.monotonic()
        with pytest.raises(errors.ConnectionFailed):
            await fl.connect(f"https://127.0.0.1:{proxy.port}", timeout=DEADLINE_S).start()
        assert time.monotonic() - started < DEADLINE_S + MARGIN_S
    finally:
        await proxy.close()


async def test_a_full_disk_refuses_records_for_certain_and_recovers_without_a_restart(
    start_cluster: Any, tmp_path: Path
) -> None:
    """Produces are refused definitely, reads and commits go on, and so does everything once there is room again."""
    free = free_bytes(tmp_path)
    reserve = int(free * 0.92)  # a broker takes records again when 5 % more than the reserve is free
    cluster = await start_cluster(
        brokers=2,
        broker_args=["--disk-reserve-bytes", str(reserve), "--disk-reserve-percent", "0", "--disk-check-ms", "100"],
    )
    bench = await Bench(cluster, AMPLE_S).start()
    ballast = Ballast(tmp_path / "ballast")
    try:
        ballast.take(int(free * 0.1))
        end = time.monotonic() + 60
        while (refusal := await _failure(bench.producer.send(TOPIC, b"x", partition=0))) is None:
            assert time.monotonic() < end, "the full disk was never noticed"
            await asyncio.sleep(0.05)
        assert isinstance(refusal, errors.StorageFull | errors.DeadlineExceeded), refusal
        assert refusal.definite, refusal
        found = await all_calls(bench)
        reads = ("consumer.start", "consumer.pull", "consumer.commit", "consumer.committed", "consumer.seek")
        assert {name: found[name] for name in reads} == dict.fromkeys(reads, "value")
        assert found["producer.send"] != "value"
    finally:
        ballast.give_back()
    await recovers(bench)
    await bench.close()
