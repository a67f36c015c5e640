"""TLS 1.3 contexts of a service and the identity that a peer's certificate proves.

Nodes (coordinator, brokers) verify one another by the cluster's private CA plus the role in the certificate: a DNS name
``broker-<id>.<cluster_id>`` or ``coordinator.<cluster_id>``. Host names are not checked between nodes, because a node
is known by its role and not by where it runs. Clients verify CA and host name as usual.
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

_BROKER_NAME = re.compile(r"\Abroker-([1-9][0-9]{0,9})\Z")


def server_context(cert: Path, key: Path, ca: Path) -> ssl.SSLContext:
    """Accepts clients without a certificate and nodes with one; a certificate of another CA is refused."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(cert, key)
    context.load_verify_locations(ca)
    context.verify_mode = ssl.CERT_OPTIONAL
    return context


def node_client_context(ca: Path, cert: Path | None = None, key: Path | None = None) -> ssl.SSLContext:
    """For connections between nodes: CA checked, host name not; the caller checks the role with `node_identity`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.load_verify_locations(ca)
    if cert is not None:
        context.load_cert_chain(cert, key)
    return context


def node_names(cluster_id: str, broker_id: int | None) -> list[str]:
    """The names that give a certificate its role. ``broker_id`` None: the coordinator."""
    role = "coordinator" if broker_id is None else f"broker-{broker_id}"
    return [f"{role}.{cluster_id}"]


def node_identity(peer_cert: Mapping[str, Any] | None, cluster_id: str) -> str | None:
    """Role proved by a verified certificate: ``"coordinator"``, ``"broker-<id>"`` or None (a client).

    ``peer_cert`` is what ``transport.get_extra_info("peercert")`` gives; the chain was checked by the handshake.
    """
    if not peer_cert or not cluster_id:
        return None
    suffix = f".{cluster_id}"
    for kind, name in peer_cert.get("subjectAltName", ()):
        if kind != "DNS" or not name.endswith(suffix):
            continue
        role: str = name[: -len(suffix)]
        if role == "coordinator" or _BROKER_NAME.match(role):
            return role
    return None


def identity_broker_id(identity: str | None) -> int:
    """Broker id of ``"broker-<id>"``; 0 for everybody else."""
    match = _BROKER_NAME.match(identity) if identity else None
    return int(match.group(1)) if match else 0


def knows_node(brokers: Container[int], identity: str) -> bool:
    """Whether a role is that of a coordinator, or of one of these brokers."""
    broker_id = identity_broker_id(identity)
    return not broker_id or broker_id in brokers


class TlsFiles:
    """The certificate, key and CA of one node, and the contexts made from them.

    ``server`` is for listening, for good; ``client`` is to be asked for at each connection. After `reload` new
    handshakes use the new files and trust nothing else; open sessions go on.
    """

    def __init__(self, cert: Path, key: Path, ca: Path) -> None:
        self.cert, self.key, self.ca = cert, key, ca
        self.client = node_client_context(ca, cert, key)
        self._now = server_context(cert, key, ca)
        # A listening socket keeps its context. This one hands every handshake to the present one.
        self.server = server_context(cert, key, ca)
        self.server.sni_callback = self._hand_on
        self._given = (self.server, self.client)
        self._seen = self._stamp()

    def reload(self) -> bool:
        """Take over changed files; returns whether there were any. Raises ssl.SSLError and keeps the old ones."""
        stamp = self._stamp()
        if stamp == self._seen:
            return False
        client = node_client_context(self.ca, self.cert, self.key)  # a broken file must not get half-way
        self._now, self.client = server_context(self.cert, self.key, self.ca), client
        for context in self._given:  # whoever still holds one is not left behind, though it forgets no CA
            context.load_verify_locations(self.ca)
            context.load_cert_chain(self.cert, self.key)
        self._seen = stamp
        return True

    def _hand_on(self, handshake: ssl.SSLSocket | ssl.SSLObject, _: str | None, __: ssl.SSLContext) -> None:
        handshake.context = self._now

    def _stamp(self) -> tuple[tuple[int, int, int], ...]:
        stats = [os.stat(path) for path in (self.cert, self.key, self.ca)]
        return tuple((s.st_mtime_ns, s.st_size, s.st_ino) for s in stats)
