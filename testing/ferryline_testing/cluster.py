"""`Cluster`: what a test has in its hands."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from ferryline.client import Client
from ferryline_testing import log_lines
from ferryline_testing.connecting import client_of
from ferryline_testing.events import EventLog
from ferryline_testing.faults import Faults, Weather
from ferryline_testing.leaps import Leaps
from ferryline_testing.lives import HERE, Life
from ferryline_testing.network import Network
from ferryline_testing.nodes import BrokerNode, CoordinatorNode, Node
from ferryline_testing.shells import COORDINATOR, url_of
from ferryline_testing.virtual_time import START_S, VirtualTime
from ferryline_testing.world import World, enter, leave

CLIENT = "client"
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
LATENCY_MS = (0.1, 0.5)
BROKERS_MAX = 50
HEALTHY_S = 120.0
_POLL_S = 0.05
_LAST_TURNS = 200  # of the loop, for what was cancelled

Which = int | str


class Cluster:
    """A coordinator and ``brokers`` brokers in this process, in this event loop. Use it with ``async with``.

    They are the programs that run in production, on virtual time: nobody waits, and days pass in milliseconds. Inside
    of ``async with`` the whole loop lives in that time, ``asyncio.sleep`` and ``asyncio.timeout`` of the test included.
    Everything that is left to chance follows ``seed``: two runs of a test with one seed have the same `events`.

    ``topics``: names, or names with settings as of ``admin.create_topic`` (a number stands for partitions). ``begin``:
    what clocks show at the start. ``latency_ms``: the least and the most that a message takes. ``faults``: what breaks
    by itself, see `Faults`.

    Brokers are named by number, from 1; the coordinator is "coordinator", and a client what it was named, or "client".
    """

    def __init__(
        self,
        *,
        brokers: int = 3,
        seed: int = 0,
        topics: Sequence[str] | Mapping[str, int | Mapping[str, Any]] = (),
        faults: Faults | None = None,
        begin: datetime = BEGIN,
        latency_ms: tuple[float, float] = LATENCY_MS,
    ) -> None:
        if not 1 <= brokers <= BROKERS_MAX:
            raise ValueError(f"brokers: {brokers} is outside 1 to {BROKERS_MAX}")
        if begin.tzinfo is None:
            raise ValueError("begin: needs a time zone, for example datetime.UTC")
        if not 0 < latency_ms[0] <= latency_ms[1]:
            raise ValueError(f"latency_ms: {latency_ms} is no range of positive times")
        self.size = brokers
        self.seed = seed
        self.events = EventLog(self._moment, self._topic_name)
        self._topics, self._begin, self._latency_ms, self._faults = topics, begin, latency_ms, faults
        self._life = Life(CLIENT)
        self._clients: list[Client] = []
        self._client_lives = {CLIENT: self._life}
        self._powers = random.Random(f"{seed}/power")
        self._clock: VirtualTime
        self._network: Network
        self._leaps: Leaps
        self._world: World | None = None
        self._coordinator: CoordinatorNode
        self._brokers: dict[int, BrokerNode] = {}
        self._weather: Weather | None = None

    # -- life ---------------------------------------------------------------------------------------

    async def __aenter__(self) -> Cluster:
        if self._world is not None:
            raise RuntimeError("this cluster was used before; make another one")
        loop = asyncio.get_running_loop()
        self._clock = clock = VirtualTime(loop, self._life)
        world = World(loop, clock, self.seed, int(self._begin.timestamp() * 1000))
        enter(world)
        self._world, world.heard = world, self._heard
        log_lines.take_over()
        clock.begin()
        self._network = network = Network(loop, self.seed, self._latency_ms)
        self._coordinator = CoordinatorNode(network, clock, self.events.tell)
        for number in range(1, self.size + 1):
            self._brokers[number] = BrokerNode(number, network, clock, self.events.tell, self._coordinator)
        self._leaps = Leaps(clock, network, self._coordinator, self._brokers.values(), self.events, self._sending)
        clock.on_idle = self._leaps.consider
        try:
            await self._begin_all()
        except BaseException:
            await self._end_all()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._end_all()

    async def _begin_all(self) -> None:
        await self._coordinator.start()
        # One after the other: broker ids are given in the order of joining.
        for broker in self._brokers.values():
            broker.begin()
            await broker.joined.wait()
        for broker in self._brokers.values():
            await broker.started()
        if self._topics:
            async with self.client() as client:
                await self._make_topics(client)
            await self.healthy()
        self.events.tell("test", f"cluster of {self.size} is up")
        if self._faults is not None:
            self._weather = Weather(self, self._faults, self.seed)
            self._weather.start()

    async def _make_topics(self, client: Client) -> None:
        named = self._topics if isinstance(self._topics, Mapping) else dict.fromkeys(self._topics, 1)
        for name, settings in named.items():
            options: dict[str, Any] = {"partitions": settings} if isinstance(settings, int) else {**settings}
            options.setdefault("replication", min(2, self.size))
            await client.admin.create_topic(name, **options)

    async def _end_all(self) -> None:
        try:
            await self.calm(wait=False)
            for client in self._clients:
                await client.close()
        finally:
            await self._leave()

    async def _leave(self) -> None:
        for node in (*self._brokers.values(), self._coordinator):
            node.kill()
        await self._last_tasks()
        self._clock.end()
        log_lines.give_back()
        assert self._world is not None
        leave(self._world)

    async def _last_tasks(self) -> None:
        """Let what was cancelled end."""
        lives = [node.latest for node in (*self._brokers.values(), self._coordinator) if node.latest]
        lives += self._client_lives.values()
        for life in lives:
            for task in list(life.tasks):
                task.cancel()
        for _ in range(_LAST_TURNS):
            if not any(life.tasks for life in lives):
                break
            await asyncio.sleep(0)
        await asyncio.sleep(0)

    # -- use ----------------------------------------------------------------------------------------

    def client(self, *, timeout: float = 30.0, name: str = CLIENT) -> Client:
        """A client of this cluster, for ``async with``: what ``fl.connect`` gives, connected to here.

        ``name`` is for `partition` and `isolate`, to cut off one of several.
        """
        self._running()
        if name == COORDINATOR or re.fullmatch(r"broker-\d+", name):
            raise ValueError(f"name: {name!r} is that of a service")
        life = self._client_lives.setdefault(name, Life(name))
        client = client_of(self._network, life, [url_of(COORDINATOR)], timeout=timeout, name=name)
        self._clients.append(client)
        return client

    async def advance(
        self, *, days: float = 0, hours: float = 0, minutes: float = 0, seconds: float = 0, ms: float = 0
    ) -> None:
        """Let time pass, with all that falls due in it."""
        span = timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds, milliseconds=ms)
        if span < timedelta(0):
            raise ValueError("advance: time does not go back")
        await asyncio.sleep(span.total_seconds())

    def now(self) -> datetime:
        """What the clocks of the cluster show."""
        world = self._running()
        return datetime.fromtimestamp(world.wall_ns() / 1e9, UTC)

    async def healthy(self, *, timeout: float = HEALTHY_S) -> None:
        """Return once every broker counts and every partition has a primary and all its copies in sync.

        Raises TimeoutError, which says what is missing. ``timeout`` is in seconds of virtual time.
        """
        end = self._clock.now_s + timeout
        while why := self._unhealthy():
            if self._clock.now_s >= end:
                raise TimeoutError(f"not healthy after {timeout:g} s: {why}")
            await asyncio.sleep(_POLL_S)

    def _unhealthy(self) -> str:
        for broker in self._brokers.values():
            if broker.shell is None:
                return f"{broker.name} is down"
        shell = self._coordinator.shell
        return shell.unsettled() if shell is not None else "the coordinator is down"

    def primary(self, topic: str, partition: int = 0) -> int:
        """The broker that leads a partition; 0 if none does. Raises LookupError for a partition that is unknown."""
        shell = self._coordinator.shell
        if shell is None:
            raise LookupError("the coordinator is down")
        state = shell.driver.state
        part = state.part(state.topic_ids.get(topic, ""), partition)
        if part is None:
            raise LookupError(f"{topic}/{partition} does not exist")
        return part.meta.primary

    def story(self) -> str:
        """`events` as text, one line for each."""
        return self.events.text()

    # -- faults -------------------------------------------------------------------------------------

    def kill(self, which: Which) -> None:
        """As ``kill -9``: the process is gone, what it wrote is not."""
        node = self._node(which)
        self.events.tell("test", f"kill {node.name}")
        node.kill()

    def power_cut(self, *which: int) -> None:
        """Power goes off for these brokers, or for all at once: what they had not flushed is lost, in part or whole."""
        for number in which or tuple(self._brokers):
            self._node(number)
            self.events.tell("test", f"power cut at broker-{number}")
            self._brokers[number].power_cut(self._powers)

    async def stop(self, which: Which) -> None:
        """In order: partitions are handed over, clients are told."""
        node = self._node(which)
        self.events.tell("test", f"stop {node.name}")
        await node.stop()

    async def start(self, which: Which) -> None:
        """Start what was stopped or killed, on what its disk has kept. Returns when it serves."""
        node = self._node(which)
        if not node.up:
            self.events.tell("test", f"start {node.name}")
            await node.start()

    async def restart(self, which: Which) -> None:
        """Kill it, if it runs, and start it."""
        node = self._node(which)
        if node.up:
            self.kill(which)
        await self.start(which)

    def pause(self, which: Which) -> None:
        """As SIGSTOP: it does nothing more, and its connections stay."""
        node = self._node(which)
        self.events.tell("test", f"pause {node.name}")
        node.pause()

    def resume(self, which: Which) -> None:
        """As SIGCONT."""
        node = self._node(which)
        self.events.tell("test", f"resume {node.name}")
        node.resume()

    def partition(self, a: Which, b: Which, *, one_way: bool = False) -> None:
        """Nothing gets from ``a`` to ``b`` any more, and back unless ``one_way``. Connections notice by silence."""
        names = [self._name_of(which) for which in (a, b)]
        self.events.tell("test", f"cut {names[0]} {'->' if one_way else '<->'} {names[1]}")
        self._network.part(names[0], names[1])
        if not one_way:
            self._network.part(names[1], names[0])

    def isolate(self, which: Which) -> None:
        """Cut one process off from all the others, clients included."""
        name = self._name_of(which)
        others: list[Which] = [*self._client_lives, COORDINATOR, *self._brokers]
        for other in others:
            if self._name_of(other) != name:
                self.partition(which, other)

    def heal(self) -> None:
        """Everybody reaches everybody again; what waited on the way arrives."""
        self.events.tell("test", "heal")
        self._network.heal()

    async def calm(self, *, wait: bool = True) -> None:
        """End the schedule of faults and mend everything; unless told otherwise, wait until all is well."""
        if self._weather is not None:
            weather, self._weather = self._weather, None
            await weather.stop()
        if self._network.parted:
            self.heal()
        for node in (self._coordinator, *self._brokers.values()):
            if node.life is not None and node.life.paused:
                self.resume(node.name if node is self._coordinator else getattr(node, "number", 0))
        if wait:
            await self.start(COORDINATOR)
            for number in self._brokers:
                await self.start(number)
            await self.healthy()

    # -- inside -------------------------------------------------------------------------------------

    def _running(self) -> World:
        if self._world is None:
            raise RuntimeError("use the cluster with `async with` first")
        return self._world

    def _node(self, which: Which) -> Node:
        self._running()
        if which == COORDINATOR:
            return self._coordinator
        if type(which) is int and which in self._brokers:
            return self._brokers[which]
        raise ValueError(f"{which!r}: brokers are 1 to {self.size}, and there is {COORDINATOR!r}")

    def _name_of(self, which: Which) -> str:
        return which if isinstance(which, str) and which in self._client_lives else self._node(which).name

    def _sending(self) -> bool:
        parts = [part for client in self._clients for part in client.closables]
        return any(getattr(part, "buffered_bytes", 0) for part in parts)

    def _moment(self) -> tuple[datetime, float]:
        return self.now(), self._clock.now_s - START_S

    def _topic_name(self, topic_id: str) -> str:
        shell = self._coordinator.shell
        topic = shell.driver.state.topics.get(topic_id) if shell is not None else None
        return topic.name if topic is not None else topic_id[:8]

    def _heard(self, said: str, fields: dict[str, Any]) -> None:
        life = HERE.get()
        if life is not None:
            self.events.tell_line(life.name, said, fields)
