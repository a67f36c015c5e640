"""A broker under faults: failing disks, broken invariants, a full disk, corrupt peers, lies on the wire."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from ferryline.protocol.errors import Forbidden, StorageFailed, UnknownKind
from ferryline.protocol.frames import Kind, decode_header
from ferryline.protocol.messages import (
    Done,
    FetchEntry,
    Heartbeat,
    Hello,
    ProduceEntry,
    ReplicaData,
    ReplicaFetches,
    ReplicaProgresses,
    Report,
)
from ferryline.protocol.records import encode_batch
from ferryline_broker.core import events as ev
from ferryline_broker.hosted import HostedReplica
from ferryline_broker.log.files import FileStorage
from unit.broker_world import BrokerWorld, RawClient, RunningBroker, eventually


class FailingStorage(FileStorage):
    """A real disk whose fdatasync fails from some moment on, for paths that contain ``match``."""

    failing = False
    match = ".log"

    def open(self, path: str, *, create: bool = False) -> Any:
        return _Failing(self, path, super().open(path, create=create))

    def sync_all(self) -> bool:
        return False


class _Failing:
    def __init__(self, storage: FailingStorage, path: str, real: Any) -> None:
        self._storage, self._path, self._real = storage, path, real

    def fdatasync(self) -> None:
        if self._storage.failing and self._storage.match in self._path:
            raise StorageFailed(f"fdatasync {self._path}: Input/output error")
        self._real.fdatasync()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


async def test_a_failed_flush_ends_the_process_and_nothing_of_it_was_acknowledged(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        storage = FailingStorage(str(tmp_path / "brokers"))
        broker = await world.broker(storage=storage)
        topic = await world.topic("orders", [(broker.id,)])
        client = await world.client(broker.url)
        assert (await client.produce(topic, 0, [b"kept"])).error is None
        storage.failing = True
        result = await client.produce(topic, 0, [b"lost"])
        assert result.error is not None
        assert not result.error.definite, "the record is in the page cache; nobody may call it refused"
        assert await asyncio.wait_for(broker._task, 10) == 1
        reports = [decode_header(frame.header, Report) for frame in world.coordinator.reports]
        states = {report.log_state for told in reports for report in told.replicas}
        assert states == {"damaged"}


async def test_a_broken_invariant_stops_one_partition_and_tells_its_story(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("orders", [(broker.id,), (broker.id,)])
        client = await world.client(broker.url)
        hosted = broker.broker.partitions.replicas[topic.id, 0]
        hosted.core.replica.high_watermark[0] = 10**6  # what only a bug could do
        result = await client.produce(topic, 0, [b"a"])
        assert result.error is not None
        assert hosted.broken
        assert (await client.produce(topic, 1, [b"a"])).error is None, "the other partition does not notice"
        again = await client.produce(topic, 0, [b"a"])
        assert again.error is not None
        await eventually(lambda: world.coordinator.resigned, "another replica may lead")
        assert world.coordinator.resigned[0].entries[0].reason == "damaged"
        reports = [decode_header(frame.header, Report) for frame in world.coordinator.reports]
        assert {report.log_state for told in reports for report in told.replicas} == {"conflict"}


async def test_a_full_disk_refuses_records_definitely_and_recovers_without_a_restart(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker(disk_check_ms=50)
        topic = await world.topic("orders", [(broker.id,)])
        client = await world.client(broker.url)
        assert (await client.produce(topic, 0, [b"a"])).error is None
        broker.broker.upkeep._config = world.config(disk_reserve_bytes=2**62)
        await eventually(lambda: broker.broker.upkeep.disk_full, "noticed")
        refused = await client.produce(topic, 0, [b"b"])
        assert refused.error is not None
        assert (refused.error.code, refused.error.definite) == ("STORAGE_FULL", True)
        answer, _ = await client.fetch([FetchEntry(topic.id, 0, 0)])
        assert answer.results[0].error is None, "reads go on"
        broker.broker.upkeep._config = world.config()
        await eventually(lambda: not broker.broker.upkeep.disk_full, "space is back")
        assert (await client.produce(topic, 0, [b"c"])).error is None


async def test_corrupt_bytes_from_a_primary_are_not_appended_and_are_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with BrokerWorld(tmp_path) as world:
        first, second = await world.broker(), await world.broker()
        topic = await world.topic("orders", [(first.id, second.id)])
        read = HostedReplica.read_for_secondary
        spoiled: list[ev.SendData] = []

        def spoiling(self: HostedReplica, effect: ev.SendData, room: int) -> tuple[ReplicaData, list[ev.Bytes]]:
            data, parts = read(self, effect, room)
            if len(spoiled) < 3 and parts and len(parts[0]) > 80:
                spoiled.append(effect)
                parts = [bytes(parts[0][:-1]) + bytes([parts[0][-1] ^ 1])]
            return data, parts

        monkeypatch.setattr(HostedReplica, "read_for_secondary", spoiling)
        client = await world.client(first.url)
        result = await client.produce(topic, 0, [b"x" * 100])
        assert result.error is None, "the fourth reading was good"
        assert len(spoiled) == 3
        copies = [running.broker.partitions.replicas[topic.id, 0].logs[0] for running in (first, second)]
        assert copies[0].read(result.base_offset, 2**20, 2**60) == copies[1].read(result.base_offset, 2**20, 2**60)


@pytest.mark.parametrize(
    ("kind", "header"),
    [
        (Kind.REPLICA_FETCH, ReplicaFetches(2, 1, [])),
        (Kind.REPLICA_PROGRESS, ReplicaProgresses(2, 1, [])),
    ],
)
async def test_replication_frames_from_a_client_are_forbidden(tmp_path: Path, kind: Kind, header: Any) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        client = await world.client(broker.url)
        with pytest.raises(Forbidden):
            await client.call(kind, header, Done)


async def test_the_role_of_a_broker_needs_its_certificate(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        hello = Hello(role="broker", cluster_id=world.coordinator.cluster_id, broker_id=2)
        with pytest.raises(Forbidden, match="certificate of broker 2"):
            await RawClient.open(world.http, broker.url, world.coordinator.tls, hello)


async def test_kinds_that_a_broker_does_not_serve_are_refused_by_name(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        client = await world.client(broker.url)
        for kind in (Kind.HEARTBEAT, Kind.GROUP_HEARTBEAT, Kind.REPLICA_DATA, Kind.HELLO, 99):
            with pytest.raises(UnknownKind):
                await client.call(kind, Heartbeat(1, 1, 1), Done)


async def test_a_broker_whose_coordinator_is_gone_stops_at_once_and_cleanly(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("orders", [(broker.id,)])
        client = await world.client(broker.url)
        assert (await client.produce(topic, 0, [b"a"])).error is None
        await world.coordinator.stop()
        await eventually(lambda: not broker.broker.link.connected, "the link is down")
        assert (await client.produce(topic, 0, [b"b"])).error is None, "traffic goes on without a coordinator"
        began = asyncio.get_running_loop().time()
        assert await broker.stop() == 0
        assert asyncio.get_running_loop().time() - began < 20


async def test_a_mistake_after_a_flush_of_one_partition_keeps_no_other_waiting(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        one, two = [await world.topic(name, [(broker.id,)]) for name in ("one", "two")]
        client = await world.client(broker.url)
        driver = broker.broker.partitions
        feed, mistakes = driver.feed, [ValueError("a mistake of ours")]

        def mistaken(hosted: HostedReplica, event: ev.Event) -> None:
            if isinstance(event, ev.Flushed) and hosted.topic_name == "one" and mistakes:
                raise mistakes.pop()
            feed(hosted, event)

        driver.feed = mistaken  # type: ignore[method-assign]
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        waiting = asyncio.create_task(client.produce(one, 0, [b"a"]))
        await eventually(lambda: not mistakes, "the mistake")
        assert (await asyncio.wait_for(client.produce(two, 0, [b"b"]), 5)).error is None
        assert (await client.produce(one, 0, [b"c"])).error is None
        assert (await waiting).error is None


async def test_a_deadline_that_is_not_cleared_does_not_spin_the_loop(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("orders", [(broker.id,)])
        hosted = broker.broker.partitions.replicas[topic.id, 0]
        ticks: list[ev.Event] = []
        handle = hosted.core.handle

        def counting(event: ev.Event, now_ms: int) -> list[ev.Effect]:
            if isinstance(event, ev.Tick):
                ticks.append(event)
            return handle(event, now_ms)

        hosted.core.handle = counting  # type: ignore[method-assign]
        hosted.core.next_deadline_ms = lambda: 1  # type: ignore[method-assign]
        client = await world.client(broker.url)
        started = time.monotonic()
        assert (await client.produce(topic, 0, [b"a"])).error is None
        await asyncio.sleep(0.1)
        passed_ms = (time.monotonic() - started) * 1000
        assert 1 <= len(ticks) <= passed_ms + 20, "about one a millisecond"


async def test_acknowledgements_survive_kill_of_both_and_a_restart_of_both(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        first, second = await world.broker(), await world.broker()
        topic = await world.topic("orders", [(first.id, second.id), (second.id, first.id)])
        clients = {running.id: await world.client(running.url) for running in (first, second)}
        acked: dict[int, int] = {}
        for value in range(10):
            for number, running in ((0, first), (1, second)):
                result = await clients[running.id].produce(topic, number, [b"%d" % value])
                assert result.error is None
                acked[number] = result.base_offset
        await first.crash()
        await second.crash()
        world.coordinator.fence(first.id)
        world.coordinator.fence(second.id)
        back = [await world.broker(), await world.broker()]
        assert {running.id for running in back} == {first.id, second.id}
        await eventually(lambda: all(world.primary(topic.id, n) for n in (0, 1)), "primaries are back")
        for number in (0, 1):
            running = world.primary(topic.id, number)
            assert isinstance(running, RunningBroker)
            assert running.broker.partitions.replicas[topic.id, number].core.high_watermark[0] > acked[number]


async def test_a_duplicate_batch_is_answered_with_the_offset_of_the_first_after_a_restart_too(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("orders", [(broker.id,)])
        data = bytes(encode_batch([(None, b"a", []), (None, b"b", [])], producer=(77, 0, 0)))
        entry = ProduceEntry(topic.id, 0, 1, len(data))
        first = (await (await world.client(broker.url)).produce_raw([(entry, data)]))[0]
        await broker.crash()
        world.coordinator.fence(broker.id)
        back = await world.broker()
        await eventually(lambda: world.primary(topic.id) is back, "it leads again")
        again = (await (await world.client(back.url)).produce_raw([(entry, data)]))[0]
        assert again.error is None
        assert again.base_offset == first.base_offset


async def test_rot_that_shows_at_the_start_stops_that_replica_and_not_the_broker(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        rotten = await world.topic("rotten", [(broker.id,)])
        sound = await world.topic("sound", [(broker.id,)])
        client = await world.client(broker.url)
        for topic in (rotten, sound):
            assert (await client.produce(topic, 0, [b"a" * 500])).error is None
        store = broker.broker.partitions.replicas[rotten.id, 0].store
        await eventually(lambda: store._meta.checkpoints[0].offset >= 2, "a restart need not read it for recovery")
        folder = tmp_path / "brokers" / broker.broker.store.directory / store.path.split("/", 1)[1]
        await broker.crash()
        (segment,) = (folder / "records").glob("*.log")
        with segment.open("r+b") as file:
            file.seek(-20, 2)
            file.write(b"rot")
        world.coordinator.fence(broker.id)
        back = await world.broker()
        await eventually(lambda: world.primary(sound.id) is back, "the others go on")
        assert back.broker.partitions.replicas[rotten.id, 0].store.recovery.log_state == "damaged"
        assert (await (await world.client(back.url)).produce(sound, 0, [b"b"])).error is None
