"""Until when the certificates of a service hold, told to whoever watches: nobody looks into the files by himself."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping
from pathlib import Path

from cryptography import x509


class Expiry:
    """Seconds until the end of each certificate, by name; of a file with several, of the one that ends first.

    A file is read again only when it has changed. One that cannot be read is left out: who serves TLS has it.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files
        self._known: dict[str, tuple[tuple[int, int], datetime.datetime]] = {}

    def seconds(self) -> dict[str, float]:
        now = datetime.datetime.now(datetime.UTC)
        found: dict[str, float] = {}
        for name, path in self._files.items():
            try:
                ends = self._ends(name, path)
            except (OSError, ValueError):
                continue
            found[name] = (ends - now).total_seconds()
        return found

    def _ends(self, name: str, path: Path) -> datetime.datetime:
        stat = os.stat(path)
        stamp = (stat.st_mtime_ns, stat.st_ino)
        known = self._known.get(name)
        if known is None or known[0] != stamp:
            certificates = x509.load_pem_x509_certificates(path.read_bytes())
            known = self._known[name] = (stamp, min(one.not_valid_after_utc for one in certificates))
        return known[1]
