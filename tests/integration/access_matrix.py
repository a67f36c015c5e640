"""Everything that the services of a running cluster serve, asked as each of six callers.

    python -m tests.integration.access_matrix [--write]     # prints the matrix; --write: docs/access-matrix.md

What must come of it stands in docs/access.md, as tables; nothing here reads the rules of the services but to know what
there is to ask. A route or kind that the tables do not name is an error, and so is one in them that nobody serves.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import ssl
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from ferryline.cli.driver import ProcessCluster
from ferryline.protocol.frames import Frame, Kind, decode_frame, encode_frame
from ferryline.protocol.limits import FRAME_BYTES_MAX
from ferryline.protocol.messages import ROLE_BROKER, Hello
from ferryline.protocol.metadata import MetadataRequest
from ferryline_broker.access_rules import FRAMES as BROKER_FRAMES
from ferryline_broker.access_rules import ROUTES as BROKER_ROUTES
from ferryline_coordinator.access_rules import FRAMES as COORDINATOR_FRAMES
from ferryline_coordinator.access_rules import ROUTES as COORDINATOR_ROUTES
from ferryline_service.access.keys import ID_BYTES, SECRET_BYTES, make_key
from ferryline_service.tls import node_client_context
from tests.integration.access_frames import (
    GROUP,
    UNKNOWN,
    YES,
    Question,
    broker_questions,
    coordinator_questions,
    outcome_of,
)
from tests.integration.wire import Wire
from tests.polling import poll

ROOT = Path(__file__).resolve().parents[2]
EXPECTED, MATRIX = ROOT / "docs/access.md", ROOT / "docs/access-matrix.md"
ANONYMOUS, STRANGER, READER, WRITER, MANAGER, NODE = CALLERS = (
    "anonymous", "stranger", "reader", "writer", "manager", "node",
)  # fmt: skip
COORDINATOR, BROKER = "coordinator", "broker"
TOPIC, EXCHANGE, MISSING = "matrix", "matrix", "matrix.missing"
OPEN = ("/healthz", "/readyz", "/metrics", "/openapi.json")  # served beside /v1, which the document tells of
ASK_S = 20.0
_WRONG: Any = {"matrix": True}  # a body that no handler takes: nothing happens, but the gate was passed
_BODIES: dict[tuple[str, str], Any] = {
    ("POST", "/v1/topics"): {"name": MISSING, "config": {"partitions": 0}},
    ("POST", "/v1/exchanges"): {"name": MISSING, "type": "none"},
    ("PUT", "/v1/definitions"): {"topics": [{"name": MISSING}]},
    ("POST", "/v1/exchanges/{exchange}/publish"): {"records": [{"value": "v"}]},
}
_QUERIES = {
    ("PUT", "/v1/definitions"): {"dry_run": "true"},
    ("GET", "/v1/groups/{group}/offsets"): {"topic": TOPIC},
}

Key = tuple[str, str]  # (coordinator or broker, route or frame)
Matrix = dict[Key, dict[str, str]]  # -> outcome by caller


@dataclass(frozen=True)
class Bed:
    """A cluster with access on, and what each caller needs. Broker 3 does not run; its certificate is the node's."""

    cluster: ProcessCluster
    keys: dict[str, str]
    url: str  # of the broker that leads the topic
    topic_id: str
    node_id: int
    cluster_id: str

    def trust(self, caller: str) -> ssl.SSLContext:
        if caller != NODE:
            return ssl.create_default_context(cafile=str(self.cluster.ca))
        cert, key = (next(self.cluster.local.data_dir("broker-3").rglob(f"tls/{name}")) for name in ("*.crt", "*.key"))
        cert = next(path for path in cert.parent.glob("*.crt") if path.name != "ca.crt")
        return node_client_context(self.cluster.ca, cert, key)

    def headers(self, caller: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.keys[caller]}"} if caller in self.keys else {}


def access_file(keys: dict[str, tuple[str, bytes]]) -> str:
    """Principals whose grants docs/access.md states. ``keys``: by name, id and digest."""
    actions = {STRANGER: None, READER: "read", WRITER: "write", MANAGER: "manage"}
    text = ""
    for name, action in actions.items():
        key_id, digest = keys[name]
        resources = ["topic", "group", "exchange", *(["cluster"] if action != "write" else [])] if action else []
        grants = ", ".join(f'{{ resource = "{resource}", actions = ["{action}"] }}' for resource in resources)
        text += f'[[principals]]\nname = "{name}"\ngrants = [{grants}]\n'
        text += f'keys = [{{ id = "{key_id}", sha256 = "{digest.hex()}" }}]\n\n'
    return text


@asynccontextmanager
async def bed(folder: Path) -> AsyncIterator[Bed]:
    """A cluster of two brokers that run and one that does not, with a topic, and an exchange that leads to it."""
    made = {
        name: make_key(bytes([number] * (ID_BYTES + SECRET_BYTES)))
        for number, name in enumerate((STRANGER, READER, WRITER, MANAGER))
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "access.toml"
    file.write_text(access_file({name: (key_id, digest) for name, (_, key_id, digest) in made.items()}))
    cluster = ProcessCluster(folder / "cluster", brokers=3, coordinator_args=["--access", str(file)])
    try:
        await cluster.start()
        node_id = cluster.broker_id("broker-3")
        await cluster.terminate("broker-3")
        yield await _furnished(cluster, {name: key for name, (key, _, _) in made.items()}, node_id)
    finally:
        await cluster.kill_all()


async def _furnished(cluster: ProcessCluster, keys: dict[str, str], node_id: int) -> Bed:
    trust = ssl.create_default_context(cafile=str(cluster.ca))
    headers = {"Authorization": f"Bearer {keys[MANAGER]}"}
    connector = aiohttp.TCPConnector(ssl=trust)
    async with aiohttp.ClientSession(cluster.url, connector=connector, headers=headers) as http:

        async def rest(method: str, path: str, body: Any = None) -> Any:
            async with http.request(method, path, json=body) as response:
                found = await response.json()
                assert response.status < 300, found
                return found

        async def alone() -> bool:
            brokers = (await rest("GET", "/v1/brokers"))["brokers"]
            return all(broker["fenced"] for broker in brokers if broker["id"] == node_id)

        await poll(alone, within_s=60)
        config = {"partitions": 1, "replication": 1}
        await rest("POST", "/v1/topics", {"name": TOPIC, "config": config})
        await rest("POST", "/v1/exchanges", {"name": EXCHANGE, "type": "fanout"})
        await rest("POST", f"/v1/exchanges/{EXCHANGE}/bindings", {"topic": TOPIC})
        where = await rest("GET", f"/v1/topics/{TOPIC}/route?key=k")
        cluster_id = (await rest("GET", "/v1/cluster"))["cluster_id"]
        made = Bed(cluster, keys, where["url"], where["topic_id"], node_id, cluster_id)
        await poll(lambda: _led(made), within_s=60)
    return made


async def _led(made: Bed) -> bool:
    """Whether the broker knows that it leads the topic, and the exchange that leads to it."""
    async with _http(made, MANAGER) as http:
        body = {"records": [{"value": "v"}], "mandatory": True}
        async with http.post(f"{made.url}/v1/exchanges/{EXCHANGE}/publish", json=body) as response:
            return response.status == 200


def _http(made: Bed, caller: str) -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(ssl=made.trust(caller))
    return aiohttp.ClientSession(
        connector=connector, headers=made.headers(caller), timeout=aiohttp.ClientTimeout(total=ASK_S)
    )


# -- routes -----------------------------------------------------------------------------------------


async def served(made: Bed, service: str) -> list[str]:
    """Every route of a service, as it says itself: `METHOD /path`. Raises AssertionError where its rules differ."""
    url, rules = (made.cluster.url, COORDINATOR_ROUTES) if service == COORDINATOR else (made.url, BROKER_ROUTES)
    async with _http(made, ANONYMOUS) as http, http.get(f"{url}/openapi.json") as response:
        document = await response.json()
    found = [f"GET {path}" for path in OPEN]
    found += [f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods]
    ruled = {f"{method} {path}" for method, path in rules}
    assert set(found) == ruled, f"{service}: served and without a rule, or the other way round: {set(found) ^ ruled}"
    return sorted(found, key=lambda route: (route.split()[1], route))


async def ask_route(made: Bed, http: aiohttp.ClientSession, service: str, route: str) -> str:
    """The outcome for whoever ``http`` is."""
    method, path = route.split(" ", 1)
    gone = method in ("DELETE", "PATCH")  # what is there must stay there for the next one who asks
    values = {"topic": TOPIC, "exchange": EXCHANGE, "group": GROUP, "partition": "0", "broker": "999", "log": "records"}
    values = {
        name: MISSING if gone and name in ("topic", "exchange", "group") else text for name, text in values.items()
    }
    target = re.sub(r"{(\w+)}", lambda found: values.get(found.group(1), MISSING), path)
    body = _BODIES.get((method, path), _WRONG) if method in ("POST", "PUT", "PATCH") else None
    base = made.cluster.url if service == COORDINATOR else made.url
    async with http.request(method, base + target, json=body, params=_QUERIES.get((method, path))) as response:
        assert response.status < 500, (service, route, await response.text())
        return str(response.status) if response.status in (401, 403) else YES


# -- frames -----------------------------------------------------------------------------------------


async def ask_frame(ws: aiohttp.ClientWebSocketResponse, question: Question) -> str:
    """The outcome on this session. Behind it METADATA is asked: what has no answer has been handled by then."""
    header = question.header
    await ws.send_bytes(encode_frame(question.kind, 1, header, question.payload or None))
    await ws.send_bytes(encode_frame(Kind.METADATA, 2, MetadataRequest()))
    mine: Frame | None = None
    seen = False
    streamed = question.kind in (Kind.REPLICA_FETCH, Kind.REPLICA_PROGRESS)
    async with asyncio.timeout(ASK_S):
        while not (seen and (mine is not None or streamed)):
            message = await ws.receive()
            assert message.type is aiohttp.WSMsgType.BINARY, (question.label, message)
            frame = decode_frame(message.data)
            if frame.correlation == 1 and frame.is_answer:
                mine = frame
            seen = seen or (frame.correlation == 2 and frame.is_answer)
    return outcome_of(mine)


def questions(made: Bed, service: str) -> list[Question]:
    """One of every kind there is, also of those that the service does not serve."""
    if service == COORDINATOR:
        found, rules = coordinator_questions(made.node_id), COORDINATOR_FRAMES
    else:
        found, rules = broker_questions(made.topic_id, 0, 1, made.node_id), BROKER_FRAMES
    asked = {question.kind for question in found}
    assert asked == set(rules), (
        f"{service}: kinds with a rule and no question, or the other way round: {asked ^ set(rules)}"
    )
    return found + [Question(kind.name, kind, None) for kind in Kind if kind not in asked]


async def _session(made: Bed, http: aiohttp.ClientSession, url: str, *, node: bool) -> aiohttp.ClientWebSocketResponse:
    ws = await http.ws_connect(f"{url}/v1/session", compress=0, max_msg_size=FRAME_BYTES_MAX)
    hello = Hello(client="matrix", cluster_id=made.cluster_id)
    if node:
        hello = Hello(role=ROLE_BROKER, broker_id=made.node_id, cluster_id=made.cluster_id)
    answer = await Wire(http, ws).ask(Kind.HELLO, hello)
    assert not answer.is_error, bytes(answer.header)
    return ws


async def ask_frames(made: Bed, http: aiohttp.ClientSession, caller: str, service: str, matrix: Matrix) -> None:
    """All kinds, as one caller. A node asks as a broker what brokers ask, else as a client with a certificate."""
    url = made.cluster.url if service == COORDINATOR else made.url
    for question in questions(made, service):
        outcomes = matrix.setdefault((service, question.label), {})
        try:
            between = service == COORDINATOR or question.kind >= Kind.REPLICA_FETCH
            ws = await _session(made, http, url, node=caller == NODE and between)
        except aiohttp.WSServerHandshakeError as refused:
            outcomes[caller] = str(refused.status)
            continue
        outcomes[caller] = await ask_frame(ws, question)
        await ws.close()


# -- the whole, and what it should be ---------------------------------------------------------------


async def measured(made: Bed) -> tuple[Matrix, Matrix]:
    """(routes, frames) as they are."""
    routes: Matrix = {}
    frames: Matrix = {}
    for service in (COORDINATOR, BROKER):
        known = await served(made, service)
        for caller in CALLERS:
            async with _http(made, caller) as http:
                for route in known:
                    outcome = await ask_route(made, http, service, route)
                    routes.setdefault((service, route), {})[caller] = outcome
                await ask_frames(made, http, caller, service, frames)
    return routes, frames


def documented() -> tuple[dict[str, dict[str, str]], dict[str, dict[str, str]]]:
    """(routes, frames) as docs/access.md says, by route or kind; AssertionError for one that stands there twice."""
    text = EXPECTED.read_text()
    return _table(text, "### Routes"), _table(text, "### Frames")


def _table(text: str, title: str) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    section = text.partition(f"\n{title}\n")[2].partition("\n#")[0]
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) != 1 + len(CALLERS) or "`" not in cells[0]:
            continue
        for name in re.findall(r"`([^`]+)`", cells[0]):
            assert name not in found, f"{name} stands twice in docs/access.md"
            found[name] = dict(zip(CALLERS, cells[1:], strict=True))
    return found


def differences(routes: Matrix, frames: Matrix) -> list[str]:
    """What is not as documented, one line each."""
    expected_routes, expected_frames = documented()
    wrong = []
    for what, found, expected in (("route", routes, expected_routes), ("frame", frames, expected_frames)):
        known = {name for (_, name), outcomes in found.items() if UNKNOWN not in outcomes.values()}
        wrong += [f"{what} {name}: documented, and nobody serves it" for name in sorted(set(expected) - known)]
        for (service, name), outcomes in found.items():
            nobody = what == "frame" and outcomes == _unknown()
            should = _unknown() if nobody and not _serves(service, name) else expected.get(name)
            if should is None:
                wrong.append(f"{service}: {what} {name}: served, and not documented")
                continue
            wrong += [
                f"{service}: {what} {name}: {caller} gets {outcomes[caller]}, documented is {should[caller]}"
                for caller in CALLERS
                if outcomes[caller] != should[caller]
            ]
    return wrong


def _unknown() -> dict[str, str]:
    return {caller: "401" if caller == ANONYMOUS else UNKNOWN for caller in CALLERS}


def _serves(service: str, label: str) -> bool:
    rules = COORDINATOR_FRAMES if service == COORDINATOR else BROKER_FRAMES
    return Kind[label.split()[0]] in rules


def shown(routes: Matrix, frames: Matrix) -> str:
    """The matrix as a page."""
    cells = sum(len(outcomes) for found in (routes, frames) for outcomes in found.values())
    lines = [
        "# Access matrix",
        "",
        f"What the services of a running cluster answered to {cells} requests. Made by",
        "`python -m tests.integration.access_matrix --write`; a test compares it with a new run, and each run with the",
        "tables of [access.md](access.md), which say who the callers are and what the words mean.",
    ]
    for title, found in (("routes", routes), ("frames", frames)):
        for service in (COORDINATOR, BROKER):
            lines += ["", f"## {service.capitalize()}: {title}", ""]
            lines += [f"| {title[:-1]} | {' | '.join(CALLERS)} |", "|---" * (1 + len(CALLERS)) + "|"]
            for (where, name), outcomes in found.items():
                if where == service:
                    lines.append(f"| `{name}` | {' | '.join(outcomes[caller] for caller in CALLERS)} |")
    return "\n".join(lines) + "\n"


async def run(folder: Path) -> tuple[Matrix, Matrix]:
    async with bed(folder) as made:
        return await measured(made)


def main() -> int:
    """Exit status 1 if anything is not as documented."""
    parser = argparse.ArgumentParser(description="Ask everything as everybody, and compare with docs/access.md.")
    parser.add_argument("--write", action="store_true", help="write docs/access-matrix.md")
    write = parser.parse_args().write
    with tempfile.TemporaryDirectory() as folder:
        routes, frames = asyncio.run(run(Path(folder)))
    page = shown(routes, frames)
    if write:
        MATRIX.write_text(page)
    sys.stdout.write(page)
    wrong = differences(routes, frames)
    for line in wrong:
        sys.stderr.write(f"{line}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
