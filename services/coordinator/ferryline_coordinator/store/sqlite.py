"""`MetaStore` in one SQLite file, for one coordinator on one machine.

WAL with ``synchronous=FULL``: a commit that was reported is on disk (NORMAL can take one back on power loss). One
writer thread; an exclusive lock on the directory keeps a second process out. Whatever the disk refuses (I/O error,
full, corrupt) ends the process: `StoreUnusable`.

    record(key TEXT PRIMARY KEY, value BLOB, version INTEGER)
    meta(name TEXT PRIMARY KEY, number INTEGER)        format, revision, coord_epoch
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import queue
import sqlite3
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ferryline_coordinator.store.interface import Committed, Loaded, Outcome, Primaryship, StoreUnusable

FORMAT = 1
_BUSY_MS = 2_000
T = TypeVar("T")


class SqliteStore:
    """Opens on first use. Every call runs on the store's own thread, in order."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._database: sqlite3.Connection | None = None
        self._lock: int | None = None
        self._coord_epoch = 0
        self._failed = ""
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], asyncio.Future[Any], asyncio.AbstractEventLoop] | None]
        self._jobs = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._resigned = asyncio.Event()

    # -- MetaStore ----------------------------------------------------------------------------------

    async def campaign(self, at_least: int = 0) -> Primaryship:
        self._resigned.clear()
        return await self._run(lambda: self._campaign(at_least))

    async def load(self, at_least: int) -> Loaded:
        loaded = await self._run(self._load)
        assert loaded.revision >= at_least, (loaded.revision, at_least)
        return loaded

    async def commit(
        self, puts: Mapping[str, bytes], deletes: Sequence[str], guards: Sequence[tuple[str, int]] = ()
    ) -> Committed:
        return await self._run(lambda: self._commit(puts, deletes, guards))

    def holds(self) -> bool:
        return self._coord_epoch != 0

    def active(self) -> str:
        return ""

    async def members(self) -> list[str] | None:
        return None

    async def resign(self) -> None:
        self._coord_epoch = 0
        self._resigned.set()

    async def watch(self) -> None:
        await self._resigned.wait()  # the lock on the directory keeps everybody else out

    async def close(self) -> None:
        await self.resign()
        if self._thread is not None:
            thread, self._thread = self._thread, None
            await self._submit(self._shut)
            self._jobs.put(None)
            thread.join()  # its last job is done

    # -- the thread ---------------------------------------------------------------------------------

    async def _run(self, job: Callable[[], T]) -> T:
        if self._failed:
            raise StoreUnusable(self._failed)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="meta-store", daemon=True)
            self._thread.start()
        return await self._submit(job)

    async def _submit(self, job: Callable[[], T]) -> T:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()
        self._jobs.put((job, done, loop))
        return await asyncio.shield(done)

    def _work(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, done, loop = item
            try:
                result, error = job(), None
            except StoreUnusable as unusable:
                result, error = None, unusable
            except (sqlite3.Error, OSError) as failed:
                self._failed = f"{self._directory}: {type(failed).__name__}: {failed}"
                result, error = None, StoreUnusable(self._failed)
            except Exception as unexpected:
                result, error = None, StoreUnusable(f"{self._directory}: {unexpected!r}")
            try:
                loop.call_soon_threadsafe(_resolve, done, result, error)
            except RuntimeError:
                return  # the loop is closed: nobody waits any more

    # -- on the thread ------------------------------------------------------------------------------

    def _open(self) -> sqlite3.Connection:
        if self._database is not None:
            return self._database
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            self._lock = None
            raise StoreUnusable(f"{self._directory} is in use by another coordinator") from None
        database = sqlite3.connect(
            self._directory / "meta.sqlite", isolation_level=None, check_same_thread=False, timeout=_BUSY_MS / 1000
        )
        try:
            self._prepare(database)
        except BaseException:
            database.close()
            raise
        self._database = database
        return database

    def _prepare(self, database: sqlite3.Connection) -> None:
        found = database.execute("PRAGMA quick_check(1)").fetchone()
        if found != ("ok",):
            raise StoreUnusable(f"{self._directory}: damaged: {found}")
        mode = database.execute("PRAGMA journal_mode=WAL").fetchone()
        if mode != ("wal",):
            raise StoreUnusable(f"{self._directory}: no write-ahead log on this file system ({mode})")
        database.execute("PRAGMA synchronous=FULL")
        database.execute("PRAGMA wal_autocheckpoint=1000")
        database.execute("BEGIN IMMEDIATE")
        database.execute("CREATE TABLE IF NOT EXISTS meta(name TEXT PRIMARY KEY, number INTEGER NOT NULL) STRICT")
        database.execute(
            "CREATE TABLE IF NOT EXISTS record(key TEXT PRIMARY KEY, value BLOB NOT NULL, version INTEGER NOT NULL) "
            "STRICT, WITHOUT ROWID"
        )
        for name, number in (("format", FORMAT), ("revision", 0), ("coord_epoch", 0)):
            database.execute("INSERT OR IGNORE INTO meta VALUES (?, ?)", (name, number))
        database.execute("COMMIT")
        made = self._number(database, "format")
        if made != FORMAT:
            raise StoreUnusable(f"{self._directory}: format {made}, this release knows {FORMAT}")
        _sync_directory(self._directory)

    def _campaign(self, at_least: int) -> Primaryship:
        database = self._open()
        database.execute("BEGIN IMMEDIATE")
        coord_epoch = max(self._number(database, "coord_epoch") + 1, at_least)
        revision = self._number(database, "revision") + 1
        self._set(database, "coord_epoch", coord_epoch)
        self._set(database, "revision", revision)
        database.execute("COMMIT")
        self._coord_epoch = coord_epoch
        return Primaryship(coord_epoch, revision)

    def _load(self) -> Loaded:
        database = self._open()
        database.execute("BEGIN")
        revision = self._number(database, "revision")
        rows = database.execute("SELECT key, value, version FROM record ORDER BY key").fetchall()
        database.execute("COMMIT")
        return Loaded(revision, {key: (value, version) for key, value, version in rows})

    def _commit(
        self, puts: Mapping[str, bytes], deletes: Sequence[str], guards: Sequence[tuple[str, int]]
    ) -> Committed:
        database = self._open()
        if not self._coord_epoch:
            return Committed(Outcome.LOST)
        database.execute("BEGIN IMMEDIATE")
        try:
            refused = self._refusal(database, guards)
            if refused is not None:
                database.execute("ROLLBACK")
                return Committed(refused)
            revision = self._number(database, "revision") + 1
            self._set(database, "revision", revision)
            database.executemany("DELETE FROM record WHERE key = ?", [(key,) for key in deletes])
            database.executemany(
                "INSERT INTO record VALUES (?, ?, ?) "
                "ON CONFLICT (key) DO UPDATE SET value = excluded.value, version = excluded.version",
                [(key, value, revision) for key, value in puts.items()],
            )
            database.execute("COMMIT")
        except sqlite3.Error:
            if database.in_transaction:
                database.execute("ROLLBACK")
            raise
        return Committed(Outcome.OK, revision)

    def _refusal(self, database: sqlite3.Connection, guards: Sequence[tuple[str, int]]) -> Outcome | None:
        if self._number(database, "coord_epoch") != self._coord_epoch:
            return Outcome.LOST
        for key, version in guards:
            row = database.execute("SELECT version FROM record WHERE key = ?", (key,)).fetchone()
            if (row[0] if row is not None else 0) != version:
                return Outcome.CONFLICT
        return None

    def _shut(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @staticmethod
    def _number(database: sqlite3.Connection, name: str) -> int:
        return int(database.execute("SELECT number FROM meta WHERE name = ?", (name,)).fetchone()[0])

    @staticmethod
    def _set(database: sqlite3.Connection, name: str, number: int) -> None:
        database.execute("UPDATE meta SET number = ? WHERE name = ?", (number, name))


def _resolve(done: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if done.done():
        return
    if error is not None:
        done.set_exception(error)
    else:
        done.set_result(result)


def _sync_directory(directory: Path) -> None:
    """A new file is only there after a power cut if its directory was synced."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
