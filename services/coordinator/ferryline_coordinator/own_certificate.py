"""The coordinator's own certificate while it runs: renewed before it ends, when its CA changes, and on request."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ferryline_coordinator.authority import Authority
from ferryline_service.certificates import of_file
from ferryline_service.tls import TlsFiles


class OwnCertificate:
    """``files`` holds what is in use, ``shown`` says it to whoever asks. ``hosts``: under which it is reached."""

    def __init__(self, authority: Authority, cluster_id: str, hosts: Iterable[str]) -> None:
        self._authority = authority
        self._cluster_id = cluster_id
        self._hosts = list(hosts)
        cert, key = authority.coordinator_files(cluster_id, self._hosts)
        self.files = TlsFiles(cert, key, authority.ca_path)
        self.shown = self._described()

    def renew(self, anew: bool = False) -> Path:
        """Make another one if it is due, or if told to, and take over whatever has changed on disk; its path.

        Open sessions go on; new ones get the new certificate.
        """
        cert, _ = self._authority.coordinator_files(self._cluster_id, self._hosts, anew=anew)
        if self.files.reload():
            self.shown = self._described()
        return cert

    def _described(self) -> dict[str, Any]:
        return {"node": of_file(self.files.cert)[0], "authorities": of_file(self.files.ca)}
