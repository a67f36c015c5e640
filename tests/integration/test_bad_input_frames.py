"""Nonsense on sessions: each piece gets its documented error, and afterwards the cluster serves as before."""

from __future__ import annotations

import struct
from typing import Any

import msgspec
import pytest

from ferryline.protocol import messages as m
from ferryline.protocol.frames import FLAG_ANSWER, PREFIX, Kind, encode_frame
from ferryline.protocol.limits import FRAME_BYTES_MAX, FRAME_ENTRIES_MAX, OFFSET_MAX
from ferryline.protocol.records import HEADER_BYTES
from tests.integration.bad_input import PARTITIONS, Case, World, batch, case
from tests.integration.wire import CLOSED, Wire, code_of
from tests.polling import poll

pytestmark = pytest.mark.process

TABLE: list[Case] = []
MALFORMED = "MALFORMED_REQUEST"


@pytest.mark.parametrize("row", TABLE, ids=str)
async def test_nonsense_gets_its_error_and_harms_nothing(world: World, row: Case) -> None:
    code = await row.act(world)
    if code == "NOT_PRIMARY" and code not in row.codes:  # a primary moved while we looked: balancing, no answer
        code = await row.act(await World.make(world.cluster))
    assert code in row.codes
    await world.still_serves()
    assert all(service.running for service in world.cluster.local.services.values())


def test_the_table_is_as_long_as_promised() -> None:
    assert len(TABLE) >= 60


# -- the session itself ------------------------------------------------------------------------------


async def greeted(world: World, hello: Any) -> str:
    wire = await Wire.connect(world.urls[world.part().primary], world.cluster.ca, greet=False)
    async with wire:
        return await wire.code(Kind.HELLO, hello)


@case(TABLE, "first frame is not HELLO", MALFORMED)
async def _(world: World) -> str:
    wire = await Wire.connect(world.cluster.url, world.cluster.ca, greet=False)
    async with wire:
        return await wire.code(Kind.METADATA, m.Committed("g", []))


@case(TABLE, "no common version", "UNSUPPORTED_VERSION")
async def _(world: World) -> str:
    return await greeted(world, m.Hello(version_min=90, version_max=99))


@case(TABLE, "version range upside down", "UNSUPPORTED_VERSION", MALFORMED, "INVALID_ARGUMENT")
async def _(world: World) -> str:
    return await greeted(world, m.Hello(version_min=2, version_max=0))


@case(TABLE, "another cluster", "CLUSTER_MISMATCH")
async def _(world: World) -> str:
    return await greeted(world, m.Hello(cluster_id="f" * 32))


@case(TABLE, "a broker without a certificate", "FORBIDDEN")
async def _(world: World) -> str:
    return await greeted(world, m.Hello(role=m.ROLE_BROKER, broker_id=1))


@case(TABLE, "HELLO of the wrong shape", MALFORMED)
async def _(world: World) -> str:
    return await greeted(world, "hello")


@case(TABLE, "HELLO with numbers for texts", MALFORMED)
async def _(world: World) -> str:
    return await greeted(world, ["1", "1", 7, None])


@case(TABLE, "text instead of frames", MALFORMED, CLOSED)
async def _(world: World) -> str:
    async with await world.primary() as wire:
        return await wire.code_of_raw('{"kind": "produce"}')


@case(TABLE, "an empty message", MALFORMED, CLOSED)
async def _(world: World) -> str:
    async with await world.primary() as wire:
        return await wire.code_of_raw(b"")


@case(TABLE, "a prefix cut short", MALFORMED, CLOSED)
async def _(world: World) -> str:
    async with await world.primary() as wire:
        return await wire.code_of_raw(PREFIX.pack(Kind.FETCH, 0, 0, 7, 10)[:7])


@case(TABLE, "a header longer than its frame", MALFORMED, CLOSED)
async def _(world: World) -> str:
    async with await world.primary() as wire:
        return await wire.code_of_raw(PREFIX.pack(Kind.FETCH, 0, 0, 7, 1000) + b"x")


@case(TABLE, "a header of four gigabytes, announced", MALFORMED, CLOSED)
async def _(world: World) -> str:
    async with await world.primary() as wire:
        return await wire.code_of_raw(PREFIX.pack(Kind.FETCH, 0, 0, 7, 2**32 - 1))


@case(TABLE, "a frame over the limit", CLOSED, MALFORMED)
async def _(world: World) -> str:
    async with await world.primary() as wire:
        return await wire.code_of_raw(bytes(FRAME_BYTES_MAX + 1))


@case(TABLE, "an answer that nobody asked for", MALFORMED, "UNKNOWN_KIND", CLOSED)
async def _(world: World) -> str:
    async with await world.primary() as wire:
        return await wire.code_of_raw(encode_frame(Kind.FETCH, 9, m.FetchAnswer([]), flags=FLAG_ANSWER))


for number in (0, 2, 99, 255):

    @case(TABLE, f"unknown kind {number}", "UNKNOWN_KIND", MALFORMED)
    async def _(world: World, number: int = number) -> str:
        async with await world.primary() as wire:
            return await wire.code(number, [])


@case(TABLE, "a second HELLO", "UNKNOWN_KIND", MALFORMED)
async def _(world: World) -> str:
    async with await world.primary() as wire:
        return await wire.code(Kind.HELLO, m.Hello())


@case(TABLE, "a header that is no MessagePack", MALFORMED)
async def _(world: World) -> str:
    async with await world.primary() as wire:
        return await wire.code_of_raw(PREFIX.pack(Kind.FETCH, 0, 0, 7, 3) + b"\xc1\xc1\xc1")


@case(TABLE, "a header nested a hundred thousand deep", MALFORMED)
async def _(world: World) -> str:
    deep = b"\x91" * 100_000 + b"\x90"
    async with await world.primary() as wire:
        return await wire.code_of_raw(PREFIX.pack(Kind.FETCH, 0, 0, 7, len(deep)) + deep)


@case(TABLE, "a list that announces four billion entries", MALFORMED)
async def _(world: World) -> str:
    bomb = b"\xdd\xff\xff\xff\xff"
    async with await world.primary() as wire:
        return await wire.code_of_raw(PREFIX.pack(Kind.PRODUCE, 0, 0, 7, len(bomb)) + bomb)


for kind, header in (
    (Kind.REPLICA_FETCH, m.ReplicaFetches(1, 1, [])),
    (Kind.REPLICA_PROGRESS, m.ReplicaProgresses(1, 1, [])),
    (Kind.REPLICA_DATA, m.ReplicaDatas(1, [])),
):

    @case(TABLE, f"{kind.name} from a client", "FORBIDDEN", "UNKNOWN_KIND")
    async def _(world: World, kind: Kind = kind, header: Any = header) -> str:
        async with await world.primary() as wire:
            return await wire.code(kind, header)


for kind, header in (
    (Kind.REGISTER, m.Register(1, "s", 1, m.RESTART_CLEAN, "https://x", "https://x", 0)),
    (Kind.HEARTBEAT, m.Heartbeat(1, 1, 1)),
    (Kind.ALTER_ISR, m.AlterIsrs([m.AlterIsr("t" * 32, 0, 1, 1, 1, 1, 1, 1, [m.IsrMember(1, 1)])])),
    (Kind.RESIGN, m.Resign(1, 1, [])),
    (Kind.REPORT, m.Report(1, 1, [])),
):

    @case(TABLE, f"{kind.name} from a client", "FORBIDDEN")
    async def _(world: World, kind: Kind = kind, header: Any = header) -> str:
        async with await world.coordinator() as wire:
            return await wire.code(kind, header)


@case(TABLE, "PRODUCE to the coordinator", "UNKNOWN_KIND")
async def _(world: World) -> str:
    async with await world.coordinator() as wire:
        return await world.send(wire, batch())


@case(TABLE, "GROUP_HEARTBEAT to a broker", "UNKNOWN_KIND")
async def _(world: World) -> str:
    async with await world.primary() as wire:
        return await wire.code(Kind.GROUP_HEARTBEAT, m.GroupHeartbeat("g", "m", ["victim"]))


# -- produce -----------------------------------------------------------------------------------------


def refused(name: str, code: str, data: bytes, **changes: Any) -> None:
    @case(TABLE, f"produce: {name}", code)
    async def _(world: World) -> str:
        async with await world.primary() as wire:
            return await world.send(wire, data, **changes)


def patched(at: int, form: str, value: int, data: bytes | None = None) -> bytes:
    """A batch with one field of its header changed; its CRC is not."""
    out = bytearray(data or batch())
    struct.pack_into(form, out, at, value)
    return bytes(out)


refused("unknown topic id", "UNKNOWN_TOPIC", batch(), topic_id="0" * 32)
refused("topic id that is a path", "UNKNOWN_TOPIC", batch(), topic_id="../../etc/passwd")
refused("topic id of a megabyte", "UNKNOWN_TOPIC", batch(), topic_id="x" * 1_000_000)
refused("partition over the count", "UNKNOWN_PARTITION", batch(), partition=PARTITIONS)
refused("partition -1", "UNKNOWN_PARTITION", batch(), partition=-1)
refused("partition 2**40", "UNKNOWN_PARTITION", batch(), partition=2**40)
refused("hashed with another count", "STALE_PARTITIONING", batch(), partitions=PARTITIONS + 1)
refused("no batch", "CORRUPT_BATCH", b"")
refused("a batch cut in its header", "CORRUPT_BATCH", batch()[:40])
refused("a batch cut in its records", "CORRUPT_BATCH", batch(b"x" * 100)[:-7])
refused("two batches in one entry", "CORRUPT_BATCH", batch() + batch())
refused("a flipped bit in a value", "CORRUPT_BATCH", batch(b"x" * 100)[:-20] + b"\x00" + batch(b"x" * 100)[-19:])
refused("magic 1", "CORRUPT_BATCH", patched(16, ">b", 1))
refused("magic 127", "CORRUPT_BATCH", patched(16, ">b", 127))
refused("length -1", "CORRUPT_BATCH", patched(8, ">i", -1))
refused("length of two gigabytes", "CORRUPT_BATCH", patched(8, ">i", 2**31 - 1))
refused("record count 0", "CORRUPT_BATCH", patched(57, ">i", 0))
refused("record count -5", "CORRUPT_BATCH", patched(57, ">i", -5))
refused("record count that its offsets deny", "CORRUPT_BATCH", patched(57, ">i", 500))
refused("record count of two billion", "CORRUPT_BATCH", patched(23, ">i", 2**31 - 2, patched(57, ">i", 2**31 - 1)))
refused("base offset -1", "CORRUPT_BATCH", patched(0, ">q", -1))
refused("codec 7", "CORRUPT_BATCH", patched(21, ">h", 7))
refused("a record over the limit", "RECORD_TOO_LARGE", batch(b"x" * (1024 * 1024 + 10)))
refused("a batch over the limit", "RECORD_TOO_LARGE", batch(b"x" * (11 * 1024 * 1024)))
refused("producer id -7", "INVALID_ARGUMENT", batch(producer=(-7, 0, 0)))
refused("sequence -1 of a real producer", "INVALID_ARGUMENT", batch(producer=(77, 0, -1)))
refused("unknown producer that does not begin at 0", "UNKNOWN_PRODUCER", batch(producer=(2**61, 0, 5)))


@case(TABLE, "produce: a control batch", "INVALID_ARGUMENT")
async def _(world: World) -> str:
    from ferryline.protocol.records import epoch_start_batch

    async with await world.primary() as wire:
        return await world.send(wire, bytes(epoch_start_batch(0, 1, 1)))


@case(TABLE, "produce: to a secondary", "NOT_PRIMARY")
async def _(world: World) -> str:
    async with await world.secondary() as wire:
        return await world.send(wire, batch())


@case(TABLE, "produce: a gap in the sequence", "OUT_OF_ORDER_SEQUENCE")
async def _(world: World) -> str:
    pid = next(world.pids)
    async with await world.primary() as wire:
        assert await world.send(wire, batch(producer=(pid, 0, 0))) == ""
        return await world.send(wire, batch(producer=(pid, 0, 9)))


@case(TABLE, "produce: an old producer epoch", "PRODUCER_FENCED")
async def _(world: World) -> str:
    pid = next(world.pids)
    async with await world.primary() as wire:
        assert await world.send(wire, batch(producer=(pid, 3, 0))) == ""
        return await world.send(wire, batch(producer=(pid, 2, 0)))


@case(TABLE, "produce: a sequence of long ago", "OUT_OF_ORDER_SEQUENCE")
async def _(world: World) -> str:
    pid = next(world.pids)
    async with await world.primary() as wire:
        for sequence in range(8):
            assert await world.send(wire, batch(producer=(pid, 0, sequence))) == ""
        return await world.send(wire, batch(producer=(pid, 0, 0)))


@case(TABLE, "produce: the same batch twice is one batch", "")
async def _(world: World) -> str:
    data = batch(producer=(next(world.pids), 0, 0))
    async with await world.primary() as wire:
        first = await wire.produce(world.topic.id, 0, PARTITIONS, data)
        again = await wire.produce(world.topic.id, 0, PARTITIONS, data)
        assert first.error is None
        assert again.error is None
        assert again.base_offset == first.base_offset
    return ""


for label, sizes in (("more than was sent", [500]), ("less than was sent", [3]), ("a negative size", [-5])):

    @case(TABLE, f"produce: sizes that announce {label}", MALFORMED)
    async def _(world: World, sizes: list[int] = sizes) -> str:
        entries = [m.ProduceEntry(world.topic.id, 0, PARTITIONS, size) for size in sizes]
        async with await world.primary() as wire:
            return await wire.code(Kind.PRODUCE, m.Produce(1000, entries), batch())


@case(TABLE, "produce: no entries", MALFORMED)
async def _(world: World) -> str:
    async with await world.primary() as wire:
        return await wire.code(Kind.PRODUCE, m.Produce(1000, []))


@case(TABLE, "produce: too many entries", MALFORMED)
async def _(world: World) -> str:
    entries = [m.ProduceEntry(world.topic.id, 0, PARTITIONS, 0)] * (FRAME_ENTRIES_MAX + 1)
    async with await world.primary() as wire:
        return await wire.code(Kind.PRODUCE, m.Produce(1000, entries))


for wait in (0, -1, 10**9):

    @case(TABLE, f"produce: timeout_ms {wait}", "INVALID_ARGUMENT")
    async def _(world: World, wait: int = wait) -> str:
        data = batch()
        entries = [m.ProduceEntry(world.topic.id, 0, PARTITIONS, len(data))]
        async with await world.primary() as wire:
            return await wire.code(Kind.PRODUCE, m.Produce(wait, entries), data)


@case(TABLE, "produce: one bad entry does not spoil the good one", "CORRUPT_BATCH")
async def _(world: World) -> str:
    good, bad = batch(), patched(16, ">b", 9)
    entries = [m.ProduceEntry(world.topic.id, 0, PARTITIONS, len(data)) for data in (bad, good)]
    async with await world.primary() as wire:
        frame = await wire.ask(Kind.PRODUCE, m.Produce(5000, entries), bad + good)
        code = code_of(frame)
        results = list(msgspec.msgpack.decode(frame.header, type=m.ProduceAnswer).results)
        while len(results) < 2:
            results += msgspec.msgpack.decode((await wire.answer()).header, type=m.ProduceAnswer).results
        by_index = {result.index: result for result in results}
        assert by_index[1].error is None
        assert by_index[1].base_offset >= 0
        return code or (by_index[0].error.code if by_index[0].error else "")


# -- fetch and offsets -------------------------------------------------------------------------------


def fetch_refused(
    name: str, codes: tuple[str, ...], *, wait_ms: int = 0, bytes_max: int = 1 << 20, **change: Any
) -> None:
    @case(TABLE, f"fetch: {name}", *codes)
    async def _(world: World) -> str:
        fields = {"topic_id": world.topic.id, "partition": 0, "offset": 0, **change}
        async with await world.primary() as wire:

            async def refused() -> str:  # a primary that has not committed the start of its epoch cannot say yet
                code = await wire.code(Kind.FETCH, m.Fetch(wait_ms, bytes_max, [m.FetchEntry(**fields)]))
                return "" if code == "NOT_READY" else code

            found: str = await poll(refused, what=f"fetch: {name} is refused")
            return found


fetch_refused("unknown topic", ("UNKNOWN_TOPIC",), topic_id="f" * 32)
fetch_refused("unknown partition", ("UNKNOWN_PARTITION",), partition=PARTITIONS)
fetch_refused("offset -1", ("INVALID_ARGUMENT",), offset=-1)
fetch_refused("offset far beyond the end", ("OFFSET_OUT_OF_RANGE", "LOG_TRUNCATED"), offset=10**15)
fetch_refused("offset at the last number", ("OFFSET_OUT_OF_RANGE", "LOG_TRUNCATED"), offset=OFFSET_MAX)
fetch_refused("offset beyond all numbers", ("INVALID_ARGUMENT", MALFORMED), offset=2**63 - 1)
fetch_refused("an epoch that never was", ("LOG_TRUNCATED", "STALE_EPOCH", "NOT_PRIMARY"), offset=1, offset_epoch=10**6)
fetch_refused("bytes_max 0", ("INVALID_ARGUMENT",), bytes_max=0)
fetch_refused("wait of a year", ("INVALID_ARGUMENT",), wait_ms=31_536_000_000)
fetch_refused("wait -1", ("INVALID_ARGUMENT",), wait_ms=-1)


@case(TABLE, "fetch: from a secondary, without leave", "NOT_PRIMARY")
async def _(world: World) -> str:
    async with await world.secondary() as wire:
        return await wire.code(Kind.FETCH, m.Fetch(0, 1 << 20, [m.FetchEntry(world.topic.id, 0, 0)]))


@case(TABLE, "fetch: too many entries", MALFORMED)
async def _(world: World) -> str:
    entries = [m.FetchEntry(world.topic.id, 0, 0)] * (FRAME_ENTRIES_MAX + 1)
    async with await world.primary() as wire:
        return await wire.code(Kind.FETCH, m.Fetch(0, 1 << 20, entries))


@case(TABLE, "offsets: a place that does not exist", "INVALID_ARGUMENT")
async def _(world: World) -> str:
    async with await world.primary() as wire:
        return await wire.code(Kind.OFFSETS, m.Offsets([m.OffsetsEntry(world.topic.id, 0, "middle")]))


@case(TABLE, "offsets: unknown topic", "UNKNOWN_TOPIC")
async def _(world: World) -> str:
    async with await world.primary() as wire:
        return await wire.code(Kind.OFFSETS, m.Offsets([m.OffsetsEntry("e" * 32, 0, "end")]))


# -- groups ------------------------------------------------------------------------------------------


def claim_refused(name: str, *codes: str, token: bytes = b"x" * 32, generation: int = 1, group: str = "g") -> None:
    @case(TABLE, f"claim: {name}", *codes)
    async def _(world: World) -> str:
        entry = m.ClaimEntry(world.topic.id, 0, generation, token)
        async with await world.primary() as wire:
            return await wire.code(Kind.CLAIM, m.Claim(group, "member", [entry]))


claim_refused("a token of nobody", "FORBIDDEN", "BAD_CREDENTIALS")
claim_refused("an empty token", "FORBIDDEN", "BAD_CREDENTIALS", token=b"")
claim_refused("a token of a megabyte", "FORBIDDEN", "BAD_CREDENTIALS", "INVALID_ARGUMENT", token=b"x" * 1_000_000)
claim_refused("generation 0", "FORBIDDEN", "BAD_CREDENTIALS", "INVALID_ARGUMENT", generation=0)
claim_refused("a group name with a slash", "INVALID_NAME", group="../g")
claim_refused("a group name of nothing", "INVALID_NAME", group="")


def commit_refused(name: str, *codes: str, group: str = "g", member: str = "m", **change: Any) -> None:
    @case(TABLE, f"commit: {name}", *codes)
    async def _(world: World) -> str:
        fields = {"topic_id": world.topic.id, "partition": 0, "generation": 0, "offset": 0, **change}
        async with await world.primary() as wire:
            return await wire.code(Kind.COMMIT, m.Commit(group, member, [m.CommitEntry(**fields)]))


commit_refused("a generation that nobody was given", "STALE_MEMBER", "UNKNOWN_MEMBER", generation=7)
commit_refused("offset -5", "INVALID_ARGUMENT", offset=-5)
commit_refused("offset beyond the log", "INVALID_ARGUMENT", "OFFSET_OUT_OF_RANGE", offset=10**15)
commit_refused("metadata over the limit", "INVALID_ARGUMENT", metadata="x" * 5_000)
commit_refused("a reserved group name", "INVALID_NAME", group="__state")
commit_refused("unknown topic", "UNKNOWN_TOPIC", topic_id="d" * 32)


def heartbeat_refused(name: str, *codes: str, **change: Any) -> None:
    @case(TABLE, f"group heartbeat: {name}", *codes)
    async def _(world: World) -> str:
        fields: dict[str, Any] = {"group": "g", "member": "m", "topics": ["victim"], **change}
        async with await world.coordinator() as wire:
            return await wire.code(Kind.GROUP_HEARTBEAT, m.GroupHeartbeat(**fields))


heartbeat_refused("a group name with a newline", "INVALID_NAME", group="a\nb")
heartbeat_refused("a group name of 201 letters", "INVALID_NAME", group="g" * 201)
heartbeat_refused("a topic name that cannot be", "INVALID_NAME", "UNKNOWN_TOPIC", topics=["no such/topic"])
heartbeat_refused("a member without a name", "INVALID_NAME", "INVALID_ARGUMENT", member="")
heartbeat_refused("a session of a millisecond", "INVALID_ARGUMENT", session_ms=1)
heartbeat_refused("a session of a year", "INVALID_ARGUMENT", session_ms=31_536_000_000)


def test_headers_are_where_the_patches_expect_them() -> None:
    """The offsets in this table are those of the format; a wrong one would test nothing."""
    data = batch(b"x", producer=(7, 1, 0))
    assert struct.unpack_from(">b", data, 16) == (2,)
    assert struct.unpack_from(">i", data, 57) == (1,)
    assert struct.unpack_from(">q", data, 43) == (7,)
    assert struct.unpack_from(">i", data, 23) == (0,)
    assert len(data) > HEADER_BYTES
