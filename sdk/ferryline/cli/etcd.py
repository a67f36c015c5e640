"""etcd members on this machine, for `LocalCluster` with several coordinators. It starts Debian's ``etcd`` program.

TLS both ways with certificates of their own, so that nobody else on this machine can read or write the records.
"""

from __future__ import annotations

import http.client
import json
import shutil
import ssl
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ferryline.cli.service import NotInstalled, ProcessFailed, Service, free_port

PREFIX = "etcd-"
REMEDY = "Debian: apt-get install etcd-server."


def etcd_program() -> str | None:
    """Path of etcd on this machine."""
    return shutil.which("etcd")


@dataclass
class EtcdMember(Service):
    """One etcd process; ready when it says that it is healthy, which takes a majority."""

    tls: Path = field(default_factory=Path)

    def read_ready(self) -> bool:
        if self.ready:
            return True
        if not self.running:
            code = self.process.returncode if self.process is not None else None
            raise ProcessFailed(f"{self.name} ended with status {code}\n{self.log_tail()}")
        context = ssl.create_default_context(cafile=str(self.tls / "ca.crt"))
        context.load_cert_chain(self.tls / "client.crt", self.tls / "client.key")
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=1.0, context=context)
        try:
            connection.request("GET", "/health")
            if b"true" in connection.getresponse().read():
                self.ready = {"url": f"https://127.0.0.1:{self.port}", "pid": self.pid}
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
        return bool(self.ready)


class LocalEtcd:
    """``members`` etcd processes below ``root``. `services` are started and stopped by whoever owns this."""

    def __init__(self, root: Path, *, members: int, ports: set[int]) -> None:
        program = etcd_program()
        if program is None:
            raise NotInstalled(f"etcd: not installed. {REMEDY}")
        self.tls = root / "etcd-tls"
        clients, peers = _ports(root / "etcd-ports.json", members, ports)
        names = [f"{PREFIX}{number}" for number in range(1, members + 1)]
        initial = ",".join(f"{name}=https://127.0.0.1:{port}" for name, port in zip(names, peers, strict=True))
        self.endpoints = [f"https://127.0.0.1:{port}" for port in clients]
        self.peers = peers  # ports at which members reach each other
        self.services: dict[str, Service] = {}
        for name, client, peer in zip(names, clients, peers, strict=True):
            command = [program, "--name", name, "--data-dir", str(root / name / "data")]
            command += ["--listen-client-urls", f"https://127.0.0.1:{client}"]
            command += ["--advertise-client-urls", f"https://127.0.0.1:{client}"]
            command += ["--listen-peer-urls", f"https://127.0.0.1:{peer}"]
            command += ["--initial-advertise-peer-urls", f"https://127.0.0.1:{peer}"]
            command += ["--initial-cluster", initial, "--initial-cluster-token", f"ferryline-{root}"]
            for kind in ("", "peer-"):
                command += [f"--{kind}client-cert-auth", f"--{kind}trusted-ca-file", str(self.tls / "ca.crt")]
                command += [f"--{kind}cert-file", str(self.tls / "etcd.crt")]
                command += [f"--{kind}key-file", str(self.tls / "etcd.key")]
            self.services[name] = EtcdMember(name, "", root / name, client, [], program=command, tls=self.tls)

    def prepare(self, env: Mapping[str, str]) -> None:
        """Make the certificates, unless they are there."""
        if not (self.tls / "client.crt").exists():
            run_coordinator(["certs", "etcd", "--data-dir", str(self.tls)], env)

    def coordinator_args(self) -> list[str]:
        """What a coordinator has to be told."""
        args = [argument for endpoint in self.endpoints for argument in ("--etcd-endpoints", endpoint)]
        args += ["--etcd-ca", str(self.tls / "ca.crt"), "--etcd-cert", str(self.tls / "client.crt")]
        return [*args, "--etcd-key", str(self.tls / "client.key")]


def _ports(path: Path, members: int, taken: set[int]) -> tuple[list[int], list[int]]:
    """Ports for clients and peers; the same at each start, because members remember one another's."""
    if path.exists():
        known = json.loads(path.read_text())
        if len(known["clients"]) == members:
            return known["clients"], known["peers"]
        raise ProcessFailed(f"{path}: made for {len(known['clients'])} etcd members, not for {members}")
    chosen = {kind: [free_port(taken) for _ in range(members)] for kind in ("clients", "peers")}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(chosen))
    return chosen["clients"], chosen["peers"]


def run_coordinator(arguments: list[str], env: Mapping[str, str]) -> None:
    """One of the coordinator program's own commands. Raises ProcessFailed."""
    command = [sys.executable, "-m", "ferryline_coordinator", *arguments]
    ended = subprocess.run(command, env=dict(env), capture_output=True, text=True, timeout=180, check=False)
    if ended.returncode != 0:
        raise ProcessFailed(f"{' '.join(arguments[:2])}: status {ended.returncode}\n{ended.stderr[-2000:]}")
