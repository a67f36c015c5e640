"""What a broker tells of its copies: digests of what is on disk, damage by place, and copies set aside on request."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ferryline.protocol.messages import FetchEntry
from ferryline.protocol.records import split_batches
from ferryline_broker.digests import BLOCK_BYTES, Walk
from ferryline_broker.log.partition_log import PartitionLog
from ferryline_broker.log.storage import LogDamaged, MemoryStorage
from ferryline_broker.opening import replay_state
from unit.broker_world import BrokerWorld, RunningBroker, eventually
from unit.log_builders import SMALL, append, contents, fill
from unit.test_broker_rest import Curl

MIB = 1024 * 1024


def opened(disk: MemoryStorage) -> PartitionLog:
    return PartitionLog.open(disk, "records", SMALL)


@pytest.fixture
def log() -> PartitionLog:
    return opened(MemoryStorage())


def walked(log: PartitionLog, start: int = -1, below: int = 2**40, **options: Any) -> Any:
    walk = Walk(log, log.log_start if start < 0 else start, below, options.pop("bytes_max", 2**40), **options)
    for _ in walk.steps():
        pass
    return walk.found


# -- the walk ----------------------------------------------------------------------------------------


def test_equal_logs_have_equal_blocks_however_their_segments_lie(log: PartitionLog) -> None:
    other = PartitionLog.open(MemoryStorage(), "records", replace(SMALL, segment_bytes=100_000))
    for _ in range(60):
        data = bytearray(append(log))
        other.append(data, split_batches(data))
    assert len(log.segments) > 3 > len(other.segments)
    assert walked(log).blocks == walked(other).blocks
    assert walked(log).next == log.log_end


def test_a_walk_ends_where_it_is_told_and_goes_on_from_there(log: PartitionLog) -> None:
    fill(log, 40)
    found, at, seen = None, log.log_start, 0
    while at < log.log_end:
        found = walked(log, at, bytes_max=500)
        assert found.next > at
        seen += sum(block.batches for block in found.blocks)
        at = found.next
    assert seen == 40
    assert walked(log, below=30).next == 30
    assert walked(log, below=31).next == 30, "a batch that is not wholly below is left out"
    assert [h.base_offset for h in walked(log, below=9, producer=Walk.ALL).batches] == [0, 3, 6]


def test_headers_of_one_producer_can_be_asked_for(log: PartitionLog) -> None:
    for producer in (5, 6, 5, -1):
        append(log, producer=producer)
    assert [h.base_offset for h in walked(log, producer=5).batches] == [0, 6]
    assert walked(log).batches == []


@pytest.mark.parametrize("at", range(0, 75, 2))
def test_a_flip_of_any_byte_is_named_by_its_batch(at: int) -> None:
    disk = MemoryStorage()
    log = opened(disk)
    fill(log, 40)
    segment = log.segments[1]
    position, header = split_batches(disk.contents(f"{segment.stem}.log"))[2]
    disk.flip(f"{segment.stem}.log", position + at)
    wrong = walked(log).wrong
    assert wrong is not None
    assert wrong.offset == header.base_offset
    assert (wrong.file, wrong.position) == (f"{segment.stem}.log", position)


def test_a_file_that_is_missing_or_cut_short_is_found_while_it_is_open() -> None:
    for spoil in ("unlink", "truncate"):
        disk = MemoryStorage()
        log = opened(disk)
        fill(log, 40)
        name = f"{log.segments[1].stem}.log"
        if spoil == "unlink":
            disk.unlink(name)
        else:
            disk.replace(name, disk.contents(name)[:-30])
        assert walked(log).wrong is not None, spoil


def test_retention_under_a_walk_is_no_damage(log: PartitionLog) -> None:
    fill(log, 60)
    walk = Walk(log, log.log_start, log.log_end, 2**40)
    steps = walk.steps()
    next(steps)
    log.advance_start(log.segments[3].next_offset)
    for _ in steps:
        pass
    assert walk.found.wrong is None
    assert walk.found.gone
    assert walked(log).next == log.log_end


def test_a_walk_over_what_grows_ends_at_what_it_was_asked_for(log: PartitionLog) -> None:
    fill(log, 20)
    walk = Walk(log, 0, log.log_end, 2**40)
    for _ in walk.steps():
        append(log, epoch=2)
    assert walk.found.next == 60
    assert walk.found.wrong is None
    assert len(contents(log)) > 20


def test_blocks_are_of_bounded_size(log: PartitionLog) -> None:
    for _ in range(12):
        append(log, value=b"x" * 400_000)
    sizes = [block.bytes for block in walked(log).blocks]
    assert len(sizes) > 1
    assert all(size < BLOCK_BYTES + 2 * MIB for size in sizes)


# -- the routes --------------------------------------------------------------------------------------


def path_of(topic: Any) -> str:
    return f"/v1/replicas/{topic.id}/0"


def file_of(world_folder: Path, broker: RunningBroker, topic: Any) -> Path:
    hosted = broker.broker.partitions.replicas[topic.id, 0]
    folder = world_folder / "brokers" / broker.broker.store.directory / hosted.store.path.split("/", 1)[1]
    return sorted((folder / "records").glob("*.log"))[0]


async def test_copies_have_equal_digests_up_to_the_watermark_and_nothing_above_it_is_told(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        first, second = await world.broker(), await world.broker()
        topic = await world.topic("orders", [(first.id, second.id)])
        client = await world.client(first.url)
        for value in range(5):
            await client.produce(topic, 0, [b"%d" % value])
        hosted = second.broker.partitions.replicas[topic.id, 0]
        await eventually(lambda: hosted.core.high_watermark[0] == 6, "the secondary knows the watermark")
        answers = [await Curl(world, one).get(f"{path_of(topic)}/digests") for one in (first, second)]
        assert [status for status, _ in answers] == [200, 200]
        assert answers[0][1]["blocks"] == answers[1][1]["blocks"]
        assert answers[0][1]["next"] == 6
        assert [body["role"] for _, body in answers] == ["primary", "secondary"]
        _, state = await Curl(world, first).get(f"{path_of(topic)}/digests?log=state&batches=true")
        assert state["batches"], "the state log has its epoch start"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/replicas/{}/7", 404),
        ("/v1/replicas/{}/x", 400),
        ("/v1/replicas/nothing/0", 404),
        ("/v1/replicas/{}/0/digests?log=other", 400),
        ("/v1/replicas/{}/0/digests?from=-1", 400),
        ("/v1/replicas/{}/0/digests?limit=0", 400),
        ("/v1/replicas/{}/0/digests?below=99999999999999999999", 400),
    ],
)
async def test_wrong_questions_are_refused(tmp_path: Path, path: str, status: int) -> None:
    async with BrokerWorld(tmp_path) as world:
        broker = await world.broker()
        topic = await world.topic("orders", [(broker.id,)])
        assert (await Curl(world, broker).get(path.format(topic.id)))[0] == status


async def test_the_only_copy_in_sync_is_not_set_aside(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        first, second = await world.broker(), await world.broker()
        topic = await world.topic("orders", [(first.id, second.id)])
        world.coordinator.lead((topic.id, 0), first.id, (first.id,))
        await eventually(lambda: world.primary(topic.id) is first, "alone")
        status, body = await Curl(world, first).post(f"{path_of(topic)}/repair", {"reason": "test"})
        assert (status, body["code"]) == (409, "CONFLICT")
        assert first.broker.partitions.replicas[topic.id, 0].core.role == "primary"


async def test_a_copy_set_aside_on_request_is_fetched_again(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        first, second = await world.broker(), await world.broker()
        topic = await world.topic("orders", [(first.id, second.id)])
        client = await world.client(first.url)
        for value in range(5):
            await client.produce(topic, 0, [b"%d" % value])
        log = file_of(tmp_path, second, topic)
        status, _ = await Curl(world, second).post(f"{path_of(topic)}/repair", {"reason": "test"})
        assert status == 202
        await eventually(lambda: world.coordinator.reports, "the coordinator hears of it")
        world.coordinator.lead((topic.id, 0), first.id, (first.id,))  # as a coordinator excludes a damaged copy
        hosted = second.broker.partitions.replicas
        await eventually(
            lambda: hosted[topic.id, 0].core.role == "secondary" and hosted[topic.id, 0].core.log_end[0] >= 6,
            "everything is there again",
        )
        assert (log.parent.parent / "damaged-1" / "records" / log.name).exists()


async def test_a_read_that_meets_damage_is_remembered_and_mended_without_a_restart(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        first, second = await world.broker(), await world.broker()
        topic = await world.topic("orders", [(first.id, second.id)], segment_bytes=MIB)
        client = await world.client(first.url)
        for _ in range(8):
            await client.produce(topic, 0, [b"x" * 300_000])
        hosted = first.broker.partitions.replicas[topic.id, 0]
        hosted.logs[0].segments[0].trusted_from = 2**40  # as after a start: not checked yet by this process
        with file_of(tmp_path, first, topic).open("r+b") as file:
            file.seek(400_000)
            file.write(b"rot")
        answer, _ = await client.fetch([FetchEntry(topic.id, 0, 1)])
        assert answer.results[0].error is not None, "wrong bytes are not served"
        assert hosted.store.recovery.log_state == "damaged", "a restart would know"
        world.coordinator.lead((topic.id, 0), second.id, (second.id,))

        def whole() -> bool:
            copy = first.broker.partitions.replicas[topic.id, 0]
            end = second.broker.partitions.replicas[topic.id, 0].core.log_end[0]
            return copy is not hosted and copy.core.role == "secondary" and copy.core.log_end[0] == end

        await eventually(whole, "fetched again", within_s=15)


async def test_rest_never_shows_a_record_whose_bytes_were_changed_on_disk(tmp_path: Path) -> None:
    async with BrokerWorld(tmp_path) as world:
        first, second = await world.broker(), await world.broker()
        topic = await world.topic("orders", [(first.id, second.id)])
        curl = Curl(world, first)
        for value in ("one", "two", "three"):
            await curl.post("/v1/topics/orders/records", {"records": [{"value": value}]})
        path = file_of(tmp_path, first, topic)
        data = path.read_bytes()
        with path.open("r+b") as file:
            file.seek(data.index(b"two"))
            file.write(b"TWO")
        status, body = await curl.get("/v1/topics/orders/partitions/0/records?offset=0&limit=10")
        assert status == 500, body
        assert body["code"] == "STORAGE_FAILED"
        assert first.broker.partitions.replicas[topic.id, 0].core.role == "stopped", "another copy shall lead"


async def test_a_state_log_that_rotted_is_not_replayed(tmp_path: Path) -> None:
    """A flipped bit in a commit would move a group."""
    log = PartitionLog.open(MemoryStorage(), "state", SMALL)
    fill(log, 5)
    store = SimpleNamespace(state=log)
    assert len(replay_state(store)) == 15  # type: ignore[arg-type]
    disk: Any = log.segments[0].storage
    disk.flip(f"{log.segments[0].stem}.log", 200)
    with pytest.raises(LogDamaged):
        replay_state(store)  # type: ignore[arg-type]
