"""Follows the access file: read at the start, and again when it has changed or somebody says so."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from ferryline.protocol.access import AccessPolicy
from ferryline_coordinator.access_file import AccessFileError, read_access
from ferryline_service.logs import get_logger

_log = get_logger()


class AccessWatch:
    """``take`` gets what the file says whenever that is not what it said before. A bad file is logged once and changes
    nothing. Raises AccessFileError when it is bad at the start."""

    def __init__(self, path: Path) -> None:
        self.take: Callable[[AccessPolicy], None] = lambda policy: None
        self._path = path
        self._stamp = self._stat()
        self.policy = read_access(path)

    def look(self) -> None:
        """Read the file again if it is not the one that was read last."""
        if self._stat() != self._stamp:
            self.reload()

    def reload(self) -> None:
        """Read the file again."""
        self._stamp = self._stat()
        try:
            policy = read_access(self._path)
        except AccessFileError as error:
            _log.error("the access file is wrong; what it said before stays", error=str(error))
            return
        if policy != self.policy:
            _log.info("the access file has changed", principals=len(policy.principals), rules=len(policy.rules))
            self.policy = policy
            self.take(policy)

    def _stat(self) -> tuple[int, int, int] | None:
        try:
            found = os.stat(self._path)
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino
