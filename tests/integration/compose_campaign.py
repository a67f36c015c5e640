"""The life of a compose cluster, told in one go under load: `python -m tests.integration.compose_campaign`.

From zero to TLS, access control and Prometheus; a container is killed; three brokers become five; every container is
restarted, then replaced by one of a newer image, one at a time; all of it goes down and comes up again. Four programs
use the cluster meanwhile (`compose_load`), and not one of them may see an error. Needs docker and the images
(`scripts/with-docker python -m ...`). The result goes to benchmarks/results/compose.json.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import ferryline as fl
from ferryline.cli.drill import healed, partitions_of
from ferryline.protocol.access import GROUP, READ, TOPIC, WRITE, Grant
from ferryline.protocol.errors import FerrylineError
from tests.integration.compose_load import LOG, QUEUE, READERS, WORKERS, Load
from tests.integration.docker_driver import ROOT, DockerCluster
from tests.polling import poll

RESULT = ROOT / "benchmarks/results/compose.json"
IMAGES, TAG = os.environ.get("FERRYLINE_IMAGES", ""), os.environ.get("FERRYLINE_TAG", "0.1.0")
NEWER = f"{TAG}-next"
PARTITIONS = 6
SERVICES = ("coordinator", "public-ca", "broker")
MARK = b"-1"  # no number of a record
VERSION_LABEL = "org.opencontainers.image.version"


class Story:
    """One compose project. `tell` runs all of it; `facts` and `wrong` say how it went."""

    def __init__(self, volumes: Path, *, rate: float, calm_s: float, prometheus: bool, restart: bool = True) -> None:
        self.facts: dict[str, Any] = {"steps": {}}
        self.wrong: list[str] = []
        self._volumes, self._rate, self._calm_s = volumes, rate, calm_s
        self._prometheus, self._restart = prometheus, restart
        self._environment = {
            "FERRYLINE_TAG": TAG,
            "FERRYLINE_ROLL_SECONDS": "90",
            "PROMETHEUS_PORT": str(free_port()),
        }
        self._port = free_port()
        self.project = f"ferryline-story-{os.getpid()}"
        self.cluster = self._project(3)
        self._admin = self._app = ""

    def _project(self, brokers: int) -> DockerCluster:
        services: tuple[str, ...] = SERVICES
        environment = dict(self._environment)
        if self._prometheus:
            services, environment["COMPOSE_PROFILES"] = (*SERVICES, "prometheus"), "monitoring"
        return DockerCluster(
            self.project, self._volumes, brokers=brokers, port=self._port, environment=environment, services=services
        )

    def connect(self, token: str = "") -> fl.Client:
        return fl.connect(self.cluster.url, ca=self.cluster.ca, token=token or self._app)

    # -- the story -----------------------------------------------------------------------------------

    async def tell(self) -> None:
        """All steps in order. Raises what cannot go on; what went wrong otherwise is in `wrong`."""
        steps = self.facts["steps"]
        started = time.perf_counter()
        await self.from_zero()
        steps["from zero"] = {"seconds": round(time.perf_counter() - started, 1)}
        load = Load(self.connect, self._rate)
        load.start()
        await load.flows()
        if self._prometheus:
            self.facts["prometheus"] = await self.scraped()
        async with load.while_("kill a container", steps):
            await self.kill()
            await load.flows()
        async with load.while_("scale 3 to 5", steps):
            self.facts["replicas_of_new_brokers"] = await self.grow()
        if self._restart:
            async with load.while_("rolling restart", steps):
                await self.cluster.run("scripts/roll", "-p", self.project, FERRYLINE_ROLL="restart")
                await load.flows()
        async with load.while_("rolling upgrade", steps):
            self.facts["upgraded_to"] = await self.upgrade()
            await load.flows()
        async with load.while_("calm", steps):
            await asyncio.sleep(self._calm_s)
        await load.stop()
        self.wrong += load.wrong()
        self.facts |= {
            "acknowledged": load.total,
            "consumed": sum(map(len, load.consumed.values())),
            "worked_off": sum(map(len, load.done.values())),
            "client_errors": dict(load.errors),
        }
        started = time.perf_counter()
        await self.down_and_up(load)
        steps["down and up"] = {"seconds": round(time.perf_counter() - started, 1)}

    async def from_zero(self) -> None:
        """One command's worth: an access file, three brokers; nobody without a key, an application with its grants."""
        await self.cluster.run("scripts/compose-prepare", "--auth")
        await self.cluster.start()
        key_file = self._volumes / "access" / "admin.key"
        self._admin = key_file.read_text().strip()
        self._check(key_file.stat().st_mode & 0o777 == 0o600, "the key of admin can be read by others")
        for name in ["coordinator", *self.cluster.brokers]:
            self._check(await self._sealed(name), f"{name} runs as root, or can write outside of its volumes")
        try:
            async with fl.connect(self.cluster.url, ca=self.cluster.ca) as stranger:
                await stranger.admin.list_topics()
            self._check(False, "somebody without a token was let in")
        except FerrylineError as error:
            self._check(error.code == "BAD_CREDENTIALS", f"without a token: {error}")
        async with self.connect(self._admin) as admin:
            for topic in (LOG, QUEUE):
                await admin.admin.create_topic(topic, partitions=PARTITIONS, replication=2)
                assert await healed(admin, topic, PARTITIONS, 2, 30.0), topic
            grants = [Grant(TOPIC, "*", (READ, WRITE)), Grant(GROUP, "*", (READ,))]
            await admin.admin.create_principal("app", grants)
            self._app = (await admin.admin.create_key("app")).key

    async def _sealed(self, name: str) -> bool:
        """The service is no root, and its container's own files cannot be written, even by root."""
        look = (
            "for p in /proc/[0-9]*; do grep -qa ferryline- $p/cmdline 2>/dev/null && "
            "awk '/^Uid:/ {print $2}' $p/status; done; touch /usr/x /opt/ferryline/x 2>/dev/null && echo 0; true"
        )
        done = await asyncio.to_thread(self.cluster.container(name).exec_run, ["sh", "-c", look], user="nobody")
        assert isinstance(done.output, bytes)
        users = done.output.decode().split()
        return bool(set(users) - {"0"}) and "10001" in users

    async def scraped(self) -> dict[str, Any]:
        """What Prometheus says of its targets once it has reached all of them with its token."""
        base = f"http://127.0.0.1:{self._environment['PROMETHEUS_PORT']}/api/v1"

        async def up() -> list[str]:
            query = urllib.parse.urlencode({"query": "up == 1"})
            found = await asyncio.to_thread(ask_json, f"{base}/query?{query}")
            return sorted(one["metric"]["job"] for one in found["data"]["result"])

        jobs: list[str] = []

        async def all_up() -> bool:
            jobs[:] = await up()
            return len(jobs) == 1 + len(self.cluster.brokers)

        await poll(all_up, within_s=90, what="Prometheus has reached the coordinator and every broker")
        rules = (await asyncio.to_thread(ask_json, f"{base}/rules"))["data"]["groups"]
        return {"up": jobs, "rules": sum(len(group["rules"]) for group in rules)}

    async def kill(self) -> None:
        """SIGKILL for one container; it stays away until the others serve, then it is started again."""
        victim = self.cluster.brokers[0]
        await self.cluster.kill(victim)
        await asyncio.sleep(self._calm_s / 2)
        await self.cluster.restart(victim)
        await self.whole(3)

    async def grow(self) -> int:
        """Five brokers; returns how many replicas the new ones hold once it is quiet."""
        new = {self.cluster.broker_id(name) for name in await self.cluster.scale(5)}
        async with self.connect(self._admin) as admin:

            def moved() -> int:
                parts = [part for topic in (LOG, QUEUE) for part in partitions_of(admin, topic)]
                settled = not any(part.adding or part.removing for part in parts)
                held = sum(broker in new for part in parts for broker in part.replicas)
                return held if settled and all(any(b in part.replicas for part in parts) for b in new) else 0

            held: int = await poll(moved, within_s=60, what="partitions move to the new brokers")
        await self.whole(5)
        return held

    async def whole(self, brokers: int) -> None:
        """Every broker runs and every partition has all its copies."""
        await asyncio.to_thread(
            self.cluster.container("coordinator").exec_run,
            [
                "python3",
                "/usr/local/bin/ferryline-entrypoint",
                "python3",
                "/usr/local/bin/ferryline-settled",
                str(brokers),
            ],
        )

    async def upgrade(self) -> list[str]:
        """Images of a newer version (the same code, another label) take over, container by container."""
        for service in ("coordinator", "broker"):
            image = f"{IMAGES}ferryline-{service}"
            recipe = f"FROM {image}:{TAG}\nLABEL {VERSION_LABEL}={NEWER}\n"
            build = f"printf '%s' '{recipe}' | docker build --quiet --tag {image}:{NEWER} -"
            await self.cluster.run("sh", "-c", build, DOCKER_BUILDKIT="0")
        self._environment["FERRYLINE_TAG"] = self.cluster.environment["FERRYLINE_TAG"] = NEWER
        await self.cluster.run("scripts/roll", "-p", self.project)
        names = ["coordinator", *self.cluster.brokers]
        self._check(len(names) == 6, f"after the upgrade there are {names}")
        self.facts["releases"] = await self.cluster.run(
            ".venv/bin/ferryline",
            *("cluster", "upgrade", "--check"),  # fails when some node is behind
            FERRYLINE_URL=self.cluster.url,
            FERRYLINE_CA=str(self.cluster.ca),
            FERRYLINE_TOKEN=self._admin,
            COLUMNS="200",
        )
        images = [self.cluster.container(name).image for name in names]
        return [image.labels.get(VERSION_LABEL, "") for image in images if image is not None]

    async def down_and_up(self, load: Load) -> None:
        """Other containers, the same records, offsets, settled jobs, principals and keys."""
        ids = sorted(self.cluster.broker_id(name) for name in self.cluster.brokers)
        for name in self.cluster.brokers:
            self._check(
                "process_crash" not in self.cluster.logs(name), f"{name} follows one that did not stop in order"
            )
        await self.cluster.stop()
        self.cluster = self._project(5)
        await self.cluster.start()
        again = sorted(self.cluster.broker_id(name) for name in self.cluster.brokers)
        self._check(again == ids, f"brokers {ids} came back as {again}")
        async with self.connect() as client:
            stored = await read_all(client, LOG)
            expected = load.acknowledged[LOG]
            self._check(stored == expected, "what is stored after down and up is not what was acknowledged")
            for topic, asked in ((LOG, self._consumed_again), (QUEUE, self._received_again)):
                async with client.producer() as producer:
                    await asyncio.gather(*(producer.send(topic, MARK, key=key) for key in expected))
                more = await asked(client, len(expected))
                self._check(not more, f"{len(more)} records of {topic} came again to whoever was done with them")
        async with self.connect(self._admin) as admin:
            names = {principal.name for principal in await admin.admin.list_principals()}
            self._check({"admin", "app"} <= names, f"principals after down and up: {names}")
        await self.cluster.stop()

    async def _consumed_again(self, client: fl.Client, marks: int) -> list[bytes]:
        """What the group gets before the marks, which were sent after everything that it has committed."""
        more: list[bytes] = []
        async with client.consumer(LOG, group=READERS) as consumer:
            async for message in consumer:
                more.append(message.raw or b"")
                if more.count(MARK) == marks:
                    break
        return [raw for raw in more if raw != MARK]

    async def _received_again(self, client: fl.Client, marks: int) -> list[bytes]:
        """The same for the queue."""
        more: list[bytes] = []
        async with client.receiver(QUEUE, group=WORKERS) as receiver:
            async for message in receiver:
                more.append(message.raw or b"")
                await message.ack()
                if more.count(MARK) == marks:
                    break
        return [raw for raw in more if raw != MARK]

    def _check(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.wrong.append(otherwise)

    def clean(self) -> None:
        """Whatever happened, no container, network or volume of this project stays."""
        environment = {**os.environ, **self.cluster.environment, "COMPOSE_PROFILES": "monitoring"}
        down = ["scripts/compose", "--project-name", self.project, "down", "--volumes", "--remove-orphans", "-t", "5"]
        subprocess.run(down, env=environment, cwd=ROOT, capture_output=True, check=True)


async def read_all(client: fl.Client, topic: str) -> dict[bytes, list[int]]:
    """Everything in a topic, by key, as one who was not there when it happened."""
    found: dict[bytes, list[int]] = {}
    async with client.consumer(topic, start="start") as consumer:
        while True:
            batch = await consumer.pull(max_records=10_000, max_wait=2.0)
            for message in batch:
                found.setdefault(message.key or b"", []).append(int(message.raw or b""))
            if not batch and not any((await consumer.lag()).values()):
                return found


def ask_json(url: str) -> Any:
    """The answer of a server on loopback."""
    with urllib.request.urlopen(url, timeout=5) as answer:
        return json.load(answer)


def free_port() -> int:
    """One that was free a moment ago: containers keep it over their renewal, as a user's do."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def commit() -> str:
    """Short id of the tree, with a plus if it is not clean."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def prometheus_here() -> bool:
    """Whether there is an image of Prometheus, after making a stand-in where its program is installed."""
    if shutil.which("prometheus") is None:
        return False
    return subprocess.run(["scripts/stand-in-image", "prometheus"], cwd=ROOT, check=False).returncode == 0


async def run(*, rate: float, calm_s: float, restart: bool = True) -> Story:
    """One story in volumes of its own, cleaned up. ``restart`` False: the upgrade is the only roll."""
    volumes = Path(tempfile.mkdtemp(prefix="ferryline-compose-"))
    prometheus = await asyncio.to_thread(prometheus_here)
    story = Story(volumes, rate=rate, calm_s=calm_s, prometheus=prometheus, restart=restart)
    try:
        await story.tell()
    finally:
        story.clean()
        shutil.rmtree(volumes)
    return story


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rate", type=float, default=400.0, help="records a second")
    parser.add_argument("--calm", type=float, default=10.0, help="seconds of load after the last step")
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    story = asyncio.run(run(rate=options.rate, calm_s=options.calm))
    result = {
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": f"{os.cpu_count()} cores, {platform.system()}; stand-in base image of Debian packages",
        "rate": options.rate,
        **story.facts,
        "wrong": story.wrong,
    }
    options.result.write_text(json.dumps(result, indent=2) + "\n")
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
    return 1 if story.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
