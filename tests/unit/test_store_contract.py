"""One suite for every MetaStore back-end."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from ferryline_coordinator.store.interface import MetaStore, Outcome, StoreFailed
from ferryline_coordinator.store.memory import MemoryBacking, MemoryStore
from ferryline_coordinator.store.sqlite import SqliteStore, StoreLocked

Reopen = Callable[[], Awaitable[MetaStore]]


@pytest.fixture(params=["memory", "sqlite"])
async def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Reopen]:
    """Calling it closes the store, as a crash would, and opens it again."""
    backing, opened = MemoryBacking(), list[MetaStore]()

    async def again() -> MetaStore:
        for store in opened:
            await store.close()
        opened.clear()
        opened.append(MemoryStore(backing) if request.param == "memory" else SqliteStore(tmp_path))
        return opened[0]

    yield again
    for store in opened:
        await store.close()


async def test_what_was_committed_is_there_after_a_restart(reopen: Reopen) -> None:
    store = await reopen()
    await store.campaign()
    first = await store.commit({"a": b"1", "b": b"2"})
    second = await store.commit({"a": b"3"}, ["b"])
    assert (first.outcome, second.outcome) == (Outcome.OK, Outcome.OK)
    store = await reopen()
    rows = await store.load(second.revision)
    assert [(row.key, row.value, row.version) for row in rows] == [("a", b"3", second.revision)]


async def test_every_campaign_has_a_higher_epoch_and_honours_the_floor(reopen: Reopen) -> None:
    epochs = []
    for floor in (0, 0, 40, 0):
        store = await reopen()
        epochs.append((await store.campaign(floor)).coord_epoch)
    assert epochs == sorted(set(epochs))
    assert epochs[2:] == [40, 41]


async def test_a_guard_that_does_not_hold_writes_nothing(reopen: Reopen) -> None:
    store = await reopen()
    await store.campaign()
    version = (await store.commit({"a": b"1"})).revision
    assert (await store.commit({"a": b"x", "b": b"x"}, (), [("a", version + 7)])).outcome is Outcome.CONFLICT
    assert (await store.commit({"c": b"x"}, (), [("nothing", 1)])).outcome is Outcome.CONFLICT
    assert (await store.commit({"a": b"2"}, (), [("a", version), ("nothing", 0)])).outcome is Outcome.OK
    assert [(row.key, row.value) for row in await store.load()] == [("a", b"2")]


async def test_nobody_commits_without_primaryship(reopen: Reopen) -> None:
    store = await reopen()
    assert (await store.commit({"a": b"1"})).outcome is Outcome.LOST
    await store.campaign()
    await store.resign()
    assert (await store.commit({"a": b"1"})).outcome is Outcome.LOST
    assert await store.load() == []


async def test_a_replaced_coordinator_cannot_commit() -> None:
    backing = MemoryBacking()
    old, new = MemoryStore(backing), MemoryStore(backing)
    await old.campaign()
    await new.campaign()
    assert (await old.commit({"a": b"old"})).outcome is Outcome.LOST
    assert (await new.commit({"a": b"new"})).outcome is Outcome.OK


async def test_an_unknown_outcome_may_or_may_not_have_been_written() -> None:
    store = MemoryStore()
    await store.campaign()
    store.backing.spoil.extend(["unknown-not-written", "unknown-written"])
    assert (await store.commit({"a": b"1"})).outcome is Outcome.UNKNOWN
    assert await store.load() == []
    assert (await store.commit({"a": b"2"})).outcome is Outcome.UNKNOWN
    assert [row.value for row in await store.load()] == [b"2"]


async def test_a_directory_belongs_to_one_process(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    with pytest.raises(StoreLocked):
        SqliteStore(tmp_path)
    await store.close()
    again = SqliteStore(tmp_path)
    await again.close()


async def test_a_damaged_file_is_refused_at_the_start(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    await store.campaign()
    await store.commit({f"key/{n}": bytes(200) for n in range(500)})
    await store.close()
    path = tmp_path / "coordinator.sqlite3"
    data = bytearray(path.read_bytes())
    data[4096 * 3 : 4096 * 3 + 2000] = bytes(range(250)) * 8
    path.write_bytes(data)
    with pytest.raises(StoreFailed):
        SqliteStore(tmp_path)


async def test_a_store_that_failed_once_is_not_trusted_again(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    await store.campaign()
    store._db = _Broken()  # type: ignore[assignment]
    with pytest.raises(StoreFailed):
        await store.commit({"a": b"1"})
    with pytest.raises(StoreFailed):
        await store.load()
    await store.close()


class _Broken:
    in_transaction = False

    def execute(self, *_: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    def close(self) -> None:
        pass


@pytest.mark.parametrize("sync", ["FULL"])
async def test_commits_survive_power_loss_settings(tmp_path: Path, sync: str) -> None:
    store = SqliteStore(tmp_path)
    level = store._thread.submit(lambda: store._db.execute("PRAGMA synchronous").fetchone()[0]).result()
    mode = store._thread.submit(lambda: store._db.execute("PRAGMA journal_mode").fetchone()[0]).result()
    assert (level, mode) == (2, "wal"), f"synchronous={sync} is 2"
    await store.close()
