"""MetaStore in one SQLite file: nothing to install, one coordinator.

* WAL with ``synchronous=FULL``: NORMAL may take back a committed transaction after a power cut.
* One writer thread; the connection never leaves it.
* The directory is locked for the life of the process: two coordinators on one file cannot happen.
* I/O error, full disk, corruption: `StoreFailed`, and the process exits. Going on with a connection in doubt could
  answer for a commit that is not there.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from ferryline_coordinator.store.interface import Committed, Outcome, Primaryship, Row, StoreFailed

FORMAT = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS records (key TEXT PRIMARY KEY, value BLOB NOT NULL, version INTEGER NOT NULL) WITHOUT ROWID;
"""
T = TypeVar("T")


class StoreLocked(StoreFailed):
    """Another process uses this directory."""


class SqliteStore:
    """`MetaStore` on ``<directory>/coordinator.sqlite3``."""

    def __init__(self, directory: Path) -> None:
        """Raises StoreLocked if another process has the directory, StoreFailed if the file is damaged."""
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(directory / "coordinator.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise StoreLocked(f"{directory} is in use by another coordinator") from None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._path = directory / "coordinator.sqlite3"
        self._epoch = 0  # of the primaryship held, 0: none
        self._failed = ""
        try:
            self._db = self._thread.submit(self._open).result()
        except Exception:
            self._thread.shutdown()
            os.close(self._lock)
            raise

    def _open(self) -> sqlite3.Connection:
        try:
            db = sqlite3.connect(self._path, isolation_level=None, timeout=5.0)
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=FULL")
            found = db.execute("PRAGMA quick_check(1)").fetchone()[0]
            if found != "ok":
                raise StoreFailed(f"{self._path}: {found}")
            db.executescript(_SCHEMA)
            version = _counter(db, "format")
            if version not in (0, FORMAT):
                raise StoreFailed(f"{self._path}: format {version}, this release reads {FORMAT}")
            _set_counter(db, "format", FORMAT)
        except sqlite3.Error as error:
            raise StoreFailed(f"{self._path}: {error}") from error
        return db

    async def campaign(self, floor: int = 0) -> Primaryship:
        """There is nobody to wait for: the lock was taken at the start."""

        def work(db: sqlite3.Connection) -> int:
            epoch = max(_counter(db, "coord_epoch") + 1, floor)
            _set_counter(db, "coord_epoch", epoch)
            return epoch

        self._epoch = await self._transaction(work)
        return Primaryship(self._epoch)

    async def load(self, at_least: int = 0) -> list[Row]:
        def work(db: sqlite3.Connection) -> list[Row]:
            revision = _counter(db, "revision")
            if revision < at_least:
                raise StoreFailed(f"{self._path}: revision {revision} is below {at_least}")
            return [Row(*row) for row in db.execute("SELECT key, value, version FROM records ORDER BY key")]

        return await self._transaction(work)

    async def commit(
        self, puts: Mapping[str, bytes], deletes: Iterable[str] = (), guards: Iterable[tuple[str, int]] = ()
    ) -> Committed:
        epoch, gone, held = self._epoch, list(deletes), list(guards)

        def work(db: sqlite3.Connection) -> Committed:
            if not epoch or _counter(db, "coord_epoch") != epoch:
                return Committed(Outcome.LOST)
            for key, version in held:
                row = db.execute("SELECT version FROM records WHERE key = ?", (key,)).fetchone()
                if (row[0] if row else 0) != version:
                    return Committed(Outcome.CONFLICT)
            revision = _counter(db, "revision") + 1
            _set_counter(db, "revision", revision)
            db.executemany("DELETE FROM records WHERE key = ?", [(key,) for key in gone])
            db.executemany(
                "INSERT INTO records VALUES (?1, ?2, ?3) ON CONFLICT (key) DO UPDATE SET value = ?2, version = ?3",
                [(key, value, revision) for key, value in puts.items()],
            )
            return Committed(Outcome.OK, revision)

        return await self._transaction(work)

    async def resign(self) -> None:
        self._epoch = 0

    async def changed(self, timeout_s: float) -> bool:
        """Never: nobody else can hold the file."""
        await asyncio.sleep(timeout_s)
        return False

    async def close(self) -> None:
        self._epoch = 0
        if self._lock < 0:
            return
        await asyncio.get_running_loop().run_in_executor(self._thread, self._db.close)
        self._thread.shutdown()
        os.close(self._lock)
        self._lock = -1

    async def _transaction(self, work: Callable[[sqlite3.Connection], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, work)

    def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        if self._failed:
            raise StoreFailed(self._failed)
        db = self._db
        try:
            db.execute("BEGIN IMMEDIATE")
            try:
                result = work(db)
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
            return result
        except sqlite3.Error as error:
            self._failed = f"{self._path}: {error}"
            raise StoreFailed(self._failed) from error


def _counter(db: sqlite3.Connection, name: str) -> int:
    row = db.execute("SELECT value FROM counters WHERE name = ?", (name,)).fetchone()
    return int(row[0]) if row else 0


def _set_counter(db: sqlite3.Connection, name: str, value: int) -> None:
    db.execute("INSERT INTO counters VALUES (?1, ?2) ON CONFLICT (name) DO UPDATE SET value = ?2", (name, value))
