"""The coordinator's own certificate while it runs: renewed before it ends, when its CA changes, and on request."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ferryline_coordinator.authority import Authority
from ferryline_service.tls import TlsFiles


class OwnCertificate:
    """``files`` holds what is in use. ``hosts``: under which it is reached."""

    def __init__(self, authority: Authority, cluster_id: str, hosts: Iterable[str]) -> None:
        self._authority = authority
        self._cluster_id = cluster_id
        self._hosts = list(hosts)
        cert, key = authority.coordinator_files(cluster_id, self._hosts)
        self.files = TlsFiles(cert, key, authority.ca_path)

    def renew(self, anew: bool = False) -> Path:
        """Make another one if it is due, or if told to, and take over whatever has changed on disk; its path.

        Open sessions go on; new ones get the new certificate.
        """
        cert, _ = self._authority.coordinator_files(self._cluster_id, self._hosts, anew=anew)
        self.files.reload()
        return cert
