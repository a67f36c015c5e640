"""How the proxy comes between the processes of a cluster, and which of its coordinators is active."""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ferryline.cli.chaos.proxy import Link
from ferryline.cli.chaos.schedule import CLIENT
from ferryline.cli.processes import free_port

if TYPE_CHECKING:
    from ferryline.cli.processes import LocalCluster

ASK_S = 0.5


def wire(local: LocalCluster) -> list[Link]:
    """Have everybody name, and call, the others by a port of the proxy. Before anything was started.

    Coordinators and etcd are one link each, whoever calls; a broker has one for other nodes and one for clients.
    """
    taken = {service.port for service in local.services.values()}
    links = _wire_etcd(local, taken) if local.etcd is not None else []
    calls = []
    for name in local.coordinators:
        service = local.services[name]
        link = Link(name, free_port(taken), service.port)
        service.args += ["--advertise", _url(link)]
        calls.append((f"https://127.0.0.1:{service.port}", _url(link)))
        links.append(link)
    for name in local.brokers:
        service = local.services[name]
        inner, outer = (
            Link(name, free_port(taken), service.port),
            Link(name, free_port(taken), service.port, CLIENT),
        )
        links += [inner, outer]
        service.args = _put(service.args, calls)
        service.args += ["--advertise-internal", _url(inner), "--advertise-external", _url(outer)]
    return links


def _wire_etcd(local: LocalCluster, taken: set[int]) -> list[Link]:
    """Members reach each other, and coordinators reach them, through the proxy."""
    etcd = local.etcd
    assert etcd is not None
    taken |= set(etcd.peers)
    clients = [Link(name, free_port(taken), etcd.services[name].port) for name in etcd.services]
    peers = [Link(name, free_port(taken), port) for name, port in zip(etcd.services, etcd.peers, strict=True)]
    advertised = {"--advertise-client-urls": clients, "--initial-advertise-peer-urls": peers}
    initial = ",".join(f"{link.target}={_url(link)}" for link in peers)
    for number, service in enumerate(etcd.services.values()):
        for option, links in advertised.items():
            service.program[service.program.index(option) + 1] = _url(links[number])
        service.program[service.program.index("--initial-cluster") + 1] = initial
    calls = [(f"https://127.0.0.1:{link.target_port}", _url(link)) for link in clients]
    for name in local.coordinators:
        local.services[name].args = _put(local.services[name].args, calls)
    return [*clients, *peers]


def _url(link: Link) -> str:
    return f"https://127.0.0.1:{link.port}"


def _put(args: list[str], calls: list[tuple[str, str]]) -> list[str]:
    """The same arguments with each address behind the proxy in place of the true one."""
    behind = dict(calls)
    return [behind.get(argument, argument) for argument in args]


def active_among(ports: Iterable[tuple[str, int]], ca: Path) -> str:
    """The coordinator that says it is active, of the latest epoch if two do; "" if none does. Blocks for a moment."""
    context = ssl.create_default_context(cafile=str(ca))
    found = []
    for name, port in ports:
        connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=ASK_S, context=context)
        try:
            connection.request("GET", "/healthz")
            told = json.loads(connection.getresponse().read())
            if told.get("active"):
                found.append((int(told["coord_epoch"]), name))
        except (OSError, ValueError, http.client.HTTPException):
            continue
        finally:
            connection.close()
    return max(found, default=(0, ""))[1]
