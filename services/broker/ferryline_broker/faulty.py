"""Faults that a test switches on in a running broker by writing a small file: a full or failing disk, a clock that
jumps, and a power cut that the restarted broker knows to have been one.

Off unless FERRYLINE_TEST_FAULTS names that file and FERRYLINE_ALLOW_SABOTAGE=1. The file holds a `Switches` as JSON,
replaced by renaming; none means no fault. With FERRYLINE_TEST_LOSSY_STORAGE=1 unsynced bytes die with the process, see
`lossy.py`; each start then counts as another boot of the kernel, as it would be after a power cut.
"""

from __future__ import annotations

import errno
import os
import time
import uuid
from collections.abc import Callable

import msgspec

from ferryline_broker.log.files import FileStorage
from ferryline_broker.log.interface import Bytes, FileHandle, translated
from ferryline_broker.log.storage import Storage
from ferryline_broker.lossy import LossyStorage
from ferryline_broker.sabotage import check_allowed, lossy_storage
from ferryline_service.logs import get_logger

VARIABLE = "FERRYLINE_TEST_FAULTS"
_LOOK_S = 0.02  # how long a look at the file is good for
_log = get_logger()


class Switches(msgspec.Struct, frozen=True):
    """What is wrong now: ``write`` and ``sync`` are errno names or "" and hold for files with ``path`` in their
    path; ``sync_ms`` is how long a sync takes longer; ``free_bytes``, if not negative, is what the disk has left;
    ``wall_ms`` is added to the wall clock."""

    write: str = ""
    sync: str = ""
    path: str = ""
    wall_ms: int = 0
    sync_ms: int = 0
    free_bytes: int = -1

    def of(self, path: str) -> Switches:
        """What is wrong with the file at ``path``."""
        return self if self.path in path else Switches()


class FaultFile:
    """The switches, read again when the file has changed."""

    def __init__(self, path: str, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._monotonic = monotonic
        self._looked = -_LOOK_S
        self._stamp = 0
        self._switches = Switches()

    def now(self) -> Switches:
        """The switches as they are now; a file that is missing or half written means none."""
        at = self._monotonic()
        if at - self._looked < _LOOK_S:
            return self._switches
        self._looked = at
        try:
            stamp = os.stat(self._path).st_mtime_ns
            if stamp != self._stamp:
                with open(self._path, "rb") as file:
                    self._switches = msgspec.json.decode(file.read(), type=Switches)
                self._stamp = stamp
        except (OSError, msgspec.DecodeError):
            self._stamp, self._switches = 0, Switches()
        return self._switches

    def check(self, failing: str, what: str) -> None:
        """Raise the failure that ``failing`` names, as the storage would."""
        if failing:
            number = getattr(errno, failing)
            raise translated(OSError(number, f"{os.strerror(number)} (injected)"), what)


class _FaultyFile:
    """A file handle that fails when it is told to."""

    def __init__(self, faults: FaultFile, path: str, real: FileHandle) -> None:
        self._faults = faults
        self._path = path
        self._real = real
        self.pread = real.pread
        self.size = real.size
        self.set_idle = real.set_idle
        self.close = real.close

    def pwrite(self, data: Bytes, position: int) -> None:
        failing = self._faults.now().of(self._path).write
        if failing and len(data) > 1:  # a disk that fills up takes the beginning of a write
            self._real.pwrite(bytes(data[: len(data) // 2]), position)
        self._faults.check(failing, f"write {self._path}")
        self._real.pwrite(data, position)

    def fdatasync(self) -> None:
        now = self._faults.now().of(self._path)
        time.sleep(now.sync_ms / 1000)
        self._faults.check(now.sync, f"fdatasync {self._path}")
        self._real.fdatasync()

    def truncate(self, size: int) -> None:
        self._real.truncate(size)


class FaultyStorage(LossyStorage):
    """The disk of a broker under test. ``lossy``: unsynced bytes die with the process."""

    def __init__(self, root: str, faults: FaultFile, *, lossy: bool) -> None:
        super().__init__(root)
        self._faults = faults
        self._lossy = lossy

    def open(self, path: str, *, create: bool = False) -> FileHandle:
        real = super().open(path, create=create) if self._lossy else FileStorage.open(self, path, create=create)
        return _FaultyFile(self._faults, path, real)

    def usage(self) -> tuple[int, int]:
        free, total = super().usage()
        now = self._faults.now()
        left = now.free_bytes if now.free_bytes >= 0 else free
        return (0 if now.write == "ENOSPC" else left), total

    def write_small_atomic(self, path: str, data: bytes, *, sync: bool = True) -> None:
        now = self._faults.now().of(path)
        self._faults.check(now.write or now.sync, f"write {path}")
        super().write_small_atomic(path, data, sync=sync)


def open_storage(root: str) -> tuple[Storage, str | None]:
    """The disk of this broker, and the boot id to use instead of the kernel's, if any.

    Raises ValueError when a fault is asked for and not allowed.
    """
    lossy, path = lossy_storage(), os.environ.get(VARIABLE, "")
    if not path:
        return LossyStorage(root) if lossy else FileStorage(root), None
    check_allowed(VARIABLE)
    _log.critical("TEST FAULTS: this broker's disk and clock fail when a file says so", file=path)
    faults = FaultFile(path)
    shift_clock(faults)
    return FaultyStorage(root, faults, lossy=lossy), uuid.uuid4().hex if lossy else None


def shift_clock(faults: FaultFile) -> None:
    """Let the wall clock of this process, whoever asks, be off by what the switches say."""
    real, real_ns = time.time, time.time_ns
    time.time = lambda: real() + faults.now().wall_ms / 1000
    time.time_ns = lambda: real_ns() + faults.now().wall_ms * 1_000_000
