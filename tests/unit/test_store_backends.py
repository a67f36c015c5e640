"""One suite for every `MetaStore`; what only SQLite promises (locks, damage, power) comes after it."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from ferryline_coordinator.store.interface import Committed, MetaStore, Outcome, StoreUnusable
from ferryline_coordinator.store.memory import Crashed, MemoryDisk, MemoryStore
from ferryline_coordinator.store.sqlite import SqliteStore

Reopen = Callable[[], Awaitable[MetaStore]]


@pytest.fixture(params=["memory", "sqlite"])
async def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Reopen]:
    """Closes the store of the last life and opens one of the next."""
    disk = MemoryDisk()
    opened: list[MetaStore] = []

    async def again() -> MetaStore:
        if opened:
            await opened.pop().close()
        opened.append(MemoryStore(disk) if request.param == "memory" else SqliteStore(tmp_path / "meta"))
        return opened[0]

    yield again
    for store in opened:
        await store.close()


async def values(store: MetaStore) -> dict[str, bytes]:
    return {key: value for key, (value, _) in (await store.load(0)).records.items()}


async def test_an_empty_store_gives_the_first_epoch_and_no_records(reopen: Reopen) -> None:
    store = await reopen()
    primaryship = await store.campaign()
    assert primaryship.coord_epoch == 1
    assert (await store.load(primaryship.revision)).records == {}


async def test_each_campaign_has_a_higher_epoch_also_after_reopening(reopen: Reopen) -> None:
    epochs = []
    for _ in range(3):
        store = await reopen()
        epochs += [(await store.campaign()).coord_epoch, (await store.campaign()).coord_epoch]
    assert epochs == [1, 2, 3, 4, 5, 6]


async def test_a_campaign_can_ask_for_a_floor(reopen: Reopen) -> None:
    store = await reopen()
    assert (await store.campaign(at_least=9)).coord_epoch == 9
    assert (await store.campaign(at_least=5)).coord_epoch == 10


async def test_what_was_committed_is_there_after_reopening(reopen: Reopen) -> None:
    store = await reopen()
    await store.campaign()
    first = await store.commit({"a": b"1", "b": b"2"}, [])
    second = await store.commit({"b": b"3", "c": b"\x00\xff"}, ["a", "never"])
    assert (first.outcome, second.outcome) == (Outcome.OK, Outcome.OK)
    assert second.revision > first.revision
    store = await reopen()
    await store.campaign()
    loaded = await store.load(second.revision)
    assert loaded.records == {"b": (b"3", second.revision), "c": (b"\x00\xff", second.revision)}


async def test_guards_hold_all_or_nothing_is_written(reopen: Reopen) -> None:
    store = await reopen()
    await store.campaign()
    made = await store.commit({"a": b"1"}, [], [("a", 0)])
    assert made.outcome is Outcome.OK
    assert (await store.commit({"a": b"x", "b": b"x"}, [], [("a", 0)])) == Committed(Outcome.CONFLICT)
    assert (await store.commit({"b": b"x"}, ["a"], [("a", made.revision), ("b", 7)])) == Committed(Outcome.CONFLICT)
    assert await values(store) == {"a": b"1"}
    after = await store.commit({"a": b"2"}, [], [("a", made.revision)])
    assert after.outcome is Outcome.OK
    assert (await store.commit({}, ["a"], [("a", made.revision)])).outcome is Outcome.CONFLICT
    assert (await store.commit({}, ["a"], [("a", after.revision)])).outcome is Outcome.OK
    assert (await store.commit({"a": b"new"}, [], [("a", 0)])).outcome is Outcome.OK


async def test_nobody_commits_without_or_after_primaryship(reopen: Reopen) -> None:
    store = await reopen()
    assert (await store.commit({"a": b"1"}, [])).outcome is Outcome.LOST
    await store.campaign()
    await store.resign()
    assert (await store.commit({"a": b"1"}, [])).outcome is Outcome.LOST
    await store.campaign()
    assert await values(store) == {}


async def test_watch_returns_when_primaryship_is_given_up(reopen: Reopen) -> None:
    store = await reopen()
    await store.campaign()
    watching = asyncio.create_task(store.watch())
    await asyncio.sleep(0)
    assert not watching.done()
    await store.resign()
    if isinstance(store, MemoryStore):
        await MemoryStore(store.disk).campaign()
    await asyncio.wait_for(watching, 2)


async def test_a_thousand_records_are_one_commit(reopen: Reopen) -> None:
    store = await reopen()
    await store.campaign()
    many = {f"part/t/{number}": b"x" * 100 for number in range(1000)}
    assert (await store.commit(many, [])).outcome is Outcome.OK
    assert await values(await reopen_primary(reopen)) == many


async def reopen_primary(reopen: Reopen) -> MetaStore:
    store = await reopen()
    await store.campaign()
    return store


# -- memory: rivals and faults ----------------------------------------------------------------------


async def test_a_zombie_never_commits() -> None:
    disk = MemoryDisk()
    zombie, successor = MemoryStore(disk), MemoryStore(disk)
    await zombie.campaign()
    await successor.campaign()
    assert (await zombie.commit({"a": b"zombie"}, [])).outcome is Outcome.LOST
    assert (await successor.commit({"a": b"1"}, [])).outcome is Outcome.OK
    assert await values(successor) == {"a": b"1"}


@pytest.mark.parametrize(("fault", "written"), [("unknown-before", False), ("unknown-after", True)])
async def test_an_unknown_outcome_is_either(fault: str, written: bool) -> None:
    store = MemoryStore(fault=lambda: fault)
    await store.campaign()
    assert (await store.commit({"a": b"1"}, [])).outcome is Outcome.UNKNOWN
    assert bool(await values(store)) is written


@pytest.mark.parametrize(("fault", "written"), [("crash-before", False), ("crash-after", True)])
async def test_a_crash_is_on_either_side_of_a_commit(fault: str, written: bool) -> None:
    store = MemoryStore(fault=lambda: fault)
    await store.campaign()
    with pytest.raises(Crashed):
        await store.commit({"a": b"1"}, [])
    assert bool(await values(store)) is written


# -- SQLite -----------------------------------------------------------------------------------------


async def test_a_second_coordinator_on_the_same_directory_is_kept_out(tmp_path: Path) -> None:
    first, second = SqliteStore(tmp_path), SqliteStore(tmp_path)
    await first.campaign()
    try:
        with pytest.raises(StoreUnusable, match="in use"):
            await second.campaign()
        assert (await first.commit({"a": b"1"}, [])).outcome is Outcome.OK
        await first.close()
        assert (await second.campaign()).coord_epoch == 2
    finally:
        await first.close()
        await second.close()


async def test_a_takeover_past_the_lock_is_noticed_at_the_next_commit(tmp_path: Path) -> None:
    """A directory on a file system that loses locks."""
    store = SqliteStore(tmp_path)
    await store.campaign()
    database = sqlite3.connect(tmp_path / "meta.sqlite")
    database.execute("UPDATE meta SET number = number + 1 WHERE name = 'coord_epoch'")
    database.commit()
    database.close()
    assert (await store.commit({"a": b"zombie"}, [])).outcome is Outcome.LOST
    assert await values(store) == {}
    await store.close()


async def test_commits_are_synced_in_full_and_logged_ahead(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    await store.campaign()
    database = store._database
    assert database is not None
    assert database.execute("PRAGMA synchronous").fetchone() == (2,)
    assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    await store.close()


async def test_a_copy_taken_at_any_moment_holds_every_reported_commit(tmp_path: Path) -> None:
    """What kill -9 leaves behind: the files as they are, without a clean close."""
    store = SqliteStore(tmp_path / "live")
    await store.campaign()
    for number in range(20):
        assert (await store.commit({f"k{number}": b"v"}, [])).outcome is Outcome.OK
        copy = tmp_path / f"copy-{number}"
        copy.mkdir()
        for file in (tmp_path / "live").iterdir():
            if file.name != "lock" and not file.name.endswith("-shm"):
                (copy / file.name).write_bytes(file.read_bytes())
        restored = SqliteStore(copy)
        await restored.campaign()
        assert len(await values(restored)) == number + 1
        await restored.close()
    await store.close()


async def test_damage_is_told_and_never_guessed_at(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    await store.campaign()
    await store.commit({f"k{number}": bytes(500) for number in range(200)}, [])
    await store.close()
    file = tmp_path / "meta.sqlite"
    content = bytearray(file.read_bytes())
    content[4096 * 3 : 4096 * 9] = bytes([0xA5]) * (4096 * 6)
    file.write_bytes(content)
    damaged = SqliteStore(tmp_path)
    with pytest.raises(StoreUnusable):
        await damaged.campaign()
    await damaged.close()


async def test_a_format_of_a_later_release_is_refused(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    await store.campaign()
    await store.close()
    database = sqlite3.connect(tmp_path / "meta.sqlite")
    database.execute("UPDATE meta SET number = 99 WHERE name = 'format'")
    database.commit()
    database.close()
    later = SqliteStore(tmp_path)
    with pytest.raises(StoreUnusable, match="format 99"):
        await later.campaign()
    await later.close()


async def test_a_store_whose_disk_failed_stays_failed(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    await store.campaign()
    assert store._database is not None
    store._database.execute("PRAGMA max_page_count=4")  # a full disk
    with pytest.raises(StoreUnusable, match="full"):
        await store.commit({f"k{number}": bytes(4000) for number in range(50)}, [])
    with pytest.raises(StoreUnusable):
        await store.commit({"a": b"1"}, [])
    await store.close()
