"""Administration: topics, groups, brokers, the cluster. Changes go to the coordinator; what exists is read from the
cluster's metadata, so that it can be asked during a coordinator outage, too.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

import aiohttp
import msgspec
import tenacity

from ferryline.finding import hinted
from ferryline.message import TopicPartition
from ferryline.protocol.errors import (
    BY_CODE,
    ConnectionFailed,
    ConnectionLost,
    CoordinatorLoading,
    CoordinatorStandby,
    CoordinatorUnavailable,
    DeadlineExceeded,
    FerrylineError,
    InternalError,
    InvalidArgument,
    RequestTimedOut,
    TopicExists,
    UnknownTopic,
)
from ferryline.protocol.limits import check_name
from ferryline.protocol.metadata import NO_BROKER, BrokerMeta, TopicConfig, TopicMeta

if TYPE_CHECKING:
    from ferryline.client import Client

T = TypeVar("T")
BODY_BYTES_MAX = 64 * 1024 * 1024
_ATTEMPT_S = 10.0
_SILENT_S = 3.0  # a coordinator that did not answer is left alone for so long, if there are others
_VISIBLE_S = 10.0  # how long a change may take to reach this client's own metadata


class PartitionInfo(msgspec.Struct, frozen=True):
    """One partition: ``primary`` is 0 while there is none."""

    partition: int
    primary: int
    epoch: int
    replicas: tuple[int, ...]
    isr: tuple[int, ...]
    min_isr: int

    @property
    def healthy(self) -> bool:
        """All replicas in sync, and one of them is primary."""
        return self.primary != NO_BROKER and len(self.isr) >= len(self.replicas)


class TopicInfo(msgspec.Struct, frozen=True):
    """A topic, its settings and its partitions."""

    name: str
    id: str
    config: TopicConfig
    partitions: list[PartitionInfo]


class BrokerInfo(msgspec.Struct, frozen=True):
    """A registered broker. ``primaries`` and ``replicas`` count partitions."""

    id: int
    url: str
    fenced: bool
    stopping: bool
    draining: bool
    primaries: int
    replicas: int


class ClusterInfo(msgspec.Struct, frozen=True):
    """The cluster at a glance. ``offline``: partitions without primary; ``under_replicated``: a replica is missing."""

    id: str
    coordinators: list[str]
    feature_level: int
    brokers: list[BrokerInfo]
    topics: int
    partitions: int
    under_replicated: list[TopicPartition]
    offline: list[TopicPartition]


class Admin:
    """Administration of the cluster that the client is connected to. Made by ``client.admin``.

    Every call ends within ``timeout`` seconds (default: the client's), with a value or a FerrylineError.
    """

    def __init__(self, client: Client) -> None:
        self._client = client

    # -- topics ------------------------------------------------------------------------------------

    async def create_topic(
        self, name: str, *, exist_ok: bool = False, timeout: float | None = None, **settings: Any
    ) -> TopicInfo:
        """Create a topic and wait until it can be used. Settings as of TopicConfig: partitions, replication, ...

        Raises TopicExists unless ``exist_ok``, InvalidArgument, NotEnoughReplicas.
        """
        check_name(name)
        try:
            await self._change("POST", "/v1/topics", {"name": name, "config": settings}, timeout)
        except TopicExists:
            if not exist_ok:
                raise
        await self._visible(lambda: self._is_served(name), timeout)
        return await self.describe_topic(name, timeout=timeout)

    async def list_topics(self, *, timeout: float | None = None) -> list[TopicInfo]:
        """All topics, by name."""
        await self._refresh(timeout)
        topics = self._client.routing.cluster.topics.values()
        return [self._topic_info(meta) for meta in sorted(topics, key=lambda meta: meta.name)]

    async def describe_topic(self, name: str, *, timeout: float | None = None) -> TopicInfo:
        """One topic as it is now. Raises UnknownTopic."""
        check_name(name)
        await self._refresh(timeout)
        meta = self._client.routing.topic(name)
        if meta is None:
            raise UnknownTopic(f"topic: {name!r} does not exist", field="topic", topic=name)
        return self._topic_info(meta)

    async def alter_topic(self, name: str, *, timeout: float | None = None, **settings: Any) -> TopicInfo:
        """Change settings of a topic. Raises UnknownTopic, InvalidArgument."""
        if not settings:
            raise InvalidArgument("settings: at least one is needed", field="settings")
        check_name(name)
        await self._change("PATCH", f"/v1/topics/{quote(name)}", {"config": settings}, timeout)
        await self._visible(
            lambda: (
                (meta := self._client.routing.topic(name)) is not None
                and all(getattr(meta.config, key, value) == value for key, value in settings.items())
            ),
            timeout,
        )
        return await self.describe_topic(name, timeout=timeout)

    async def add_partitions(
        self, name: str, partitions: int, *, keys_move: bool = False, timeout: float | None = None
    ) -> TopicInfo:
        """Give a topic ``partitions`` partitions in all. Keys move between partitions: say ``keys_move=True``."""
        check_name(name)
        body = {"partitions": partitions, "keys_move": keys_move}
        await self._change("POST", f"/v1/topics/{quote(name)}/partitions", body, timeout)
        await self._visible(lambda: self._is_served(name, partitions), timeout)
        return await self.describe_topic(name, timeout=timeout)

    async def delete_topic(self, name: str, *, timeout: float | None = None) -> None:
        """Delete a topic and its records. Raises UnknownTopic."""
        check_name(name)
        await self._change("DELETE", f"/v1/topics/{quote(name)}", None, timeout)
        await self._visible(lambda: self._client.routing.topic(name) is None, timeout)

    # -- groups ------------------------------------------------------------------------------------

    async def list_groups(self, *, timeout: float | None = None) -> list[dict[str, Any]]:
        """All groups, as the coordinator describes them."""
        return _listed(await self._ask("GET", "/v1/groups", timeout), "groups")

    async def describe_group(self, group: str, *, timeout: float | None = None) -> dict[str, Any]:
        """Members and assignment of a group. Raises UnknownGroup."""
        check_name(group, "group")
        answer: dict[str, Any] = await self._ask("GET", f"/v1/groups/{quote(group)}", timeout)
        return answer

    async def delete_group(self, group: str, *, timeout: float | None = None) -> None:
        """Forget a group without members. Raises UnknownGroup, Conflict while it has members."""
        check_name(group, "group")
        await self._change("DELETE", f"/v1/groups/{quote(group)}", None, timeout)

    # -- brokers and cluster -----------------------------------------------------------------------

    async def list_brokers(self, *, timeout: float | None = None) -> list[BrokerInfo]:
        """All registered brokers, by id."""
        await self._refresh(timeout)
        return self._brokers()

    async def drain_broker(self, broker: int, *, timeout: float | None = None) -> None:
        """Move everything off a broker; it goes on serving until others have taken over. Raises UnknownBroker."""
        await self._change("POST", f"/v1/brokers/{int(broker)}/drain", {}, timeout)

    async def undrain_broker(self, broker: int, *, timeout: float | None = None) -> None:
        """Let a broker have partitions again."""
        await self._change("POST", f"/v1/brokers/{int(broker)}/undrain", {}, timeout)

    async def forget_broker(self, broker: int, *, timeout: float | None = None) -> None:
        """Forget a broker that will not come back. Raises Conflict while it serves or has replicas."""
        await self._change("DELETE", f"/v1/brokers/{int(broker)}", None, timeout)

    async def recover_partition(
        self, topic: str, partition: int, *, accept_data_loss: bool = False, timeout: float | None = None
    ) -> None:
        """Give a partition without candidate a primary again: the most complete of the replicas that report.

        Without ``accept_data_loss`` every replica must report. Consumers past the new end get LogTruncated.
        """
        body = {"topic": check_name(topic), "partition": partition, "accept_data_loss": accept_data_loss}
        await self._change("POST", "/v1/partitions/recover", body, timeout)

    async def cluster(self, *, timeout: float | None = None) -> ClusterInfo:
        """The cluster at a glance: brokers, topics, and what is not as it should be."""
        await self._refresh(timeout)
        metadata = self._client.routing.cluster
        names = {meta.id: meta.name for meta in metadata.topics.values()}
        partitions = sorted(
            metadata.partitions.values(), key=lambda part: (names.get(part.topic_id, ""), part.partition)
        )
        return ClusterInfo(
            metadata.cluster_id,
            list(metadata.coordinators),
            metadata.feature_level,
            self._brokers(),
            len(metadata.topics),
            len(partitions),
            [TopicPartition(names.get(p.topic_id, p.topic_id), p.partition) for p in partitions
             if len(p.isr) < len(p.replicas)],
            [TopicPartition(names.get(p.topic_id, p.topic_id), p.partition) for p in partitions
             if p.primary == NO_BROKER],
        )  # fmt: skip

    async def route(self, topic: str, key: str | bytes) -> TopicPartition:
        """The partition that a key belongs to."""
        from ferryline.protocol.partitioner import partition_of

        meta = await self._client.learn_topic(topic)
        raw = key.encode() if isinstance(key, str) else key
        return TopicPartition(topic, partition_of(raw, meta.config.partitions))

    # -- from metadata -----------------------------------------------------------------------------

    async def _refresh(self, timeout: float | None) -> None:
        limit = self._limit(timeout)
        await self._client.start()
        await self._client.watch.ask(timeout=limit)

    def _limit(self, timeout: float | None) -> float:
        return self._client.timeout if timeout is None else timeout

    def _topic_info(self, meta: TopicMeta) -> TopicInfo:
        parts = self._client.routing.cluster.partitions_of(meta.id)
        return TopicInfo(
            meta.name,
            meta.id,
            meta.config,
            [PartitionInfo(p.partition, p.primary, p.epoch, p.replicas, p.isr, p.min_isr) for p in parts],
        )

    def _brokers(self) -> list[BrokerInfo]:
        parts = self._client.routing.cluster.partitions.values()

        def info(meta: BrokerMeta) -> BrokerInfo:
            primaries = sum(part.primary == meta.id for part in parts)
            replicas = sum(meta.id in part.replicas for part in parts)
            return BrokerInfo(meta.id, meta.external, meta.fenced, meta.stopping, meta.draining, primaries, replicas)

        return [info(meta) for _, meta in sorted(self._client.routing.cluster.brokers.items())]

    def _is_served(self, name: str, partitions: int = 1) -> bool:
        """Every partition has a primary, as far as this client knows."""
        meta = self._client.routing.topic(name)
        if meta is None or meta.config.partitions < partitions:
            return False
        parts = self._client.routing.cluster.partitions_of(meta.id)
        return len(parts) == meta.config.partitions and all(part.primary != NO_BROKER for part in parts)

    async def _visible(self, condition: Any, timeout: float | None) -> None:
        """Wait until this client sees its own change; the change is made either way."""
        await self._client.watch.until(condition, timeout=min(self._limit(timeout), _VISIBLE_S))

    # -- the coordinator's REST --------------------------------------------------------------------

    async def _change(self, method: str, path: str, body: Any, timeout: float | None) -> Any:
        """A change: sent again only when it surely did not reach a coordinator."""
        return await self._request(method, path, body, self._limit(timeout), again=_surely_not_sent)

    async def _ask(self, method: str, path: str, timeout: float | None) -> Any:
        return await self._request(method, path, None, self._limit(timeout), again=_worth_another_try)

    async def _request(self, method: str, path: str, body: Any, timeout: float, *, again: Any) -> Any:
        await self._client.start()
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(again),
            wait=tenacity.wait_random_exponential(multiplier=0.05, max=1.0),
            stop=tenacity.stop_before_delay(timeout),
            reraise=True,
        )
        try:
            async with asyncio.timeout(timeout):
                return await retrying(self._once, method, path, body)
        except TimeoutError:
            if method == "GET":
                raise DeadlineExceeded(f"{method} {path}: no answer within {timeout:g} s") from None
            raise RequestTimedOut(f"{method} {path}: no answer within {timeout:g} s") from None

    async def _once(self, method: str, path: str, body: Any) -> Any:
        """One try at each address that may be a coordinator."""
        routing = self._client.routing
        brokers = {routing.address(broker) for broker in routing.cluster.brokers}
        urls = [url for url in dict.fromkeys([*routing.coordinators, *self._client.urls]) if url not in brokers]
        silent, now = self._client.silent, asyncio.get_running_loop().time()
        urls = [url for url in urls if silent.get(url, 0.0) <= now] or urls
        last: FerrylineError = CoordinatorUnavailable("no coordinator is known")
        for url in urls:  # grows while it is gone through
            silent[url] = now + _ATTEMPT_S + _SILENT_S  # unless it answers; the caller's patience may end before ours
            try:
                answer = await self._send(url, method, path, body)
                silent.pop(url, None)
                return answer
            except FerrylineError as error:
                if not isinstance(error, RequestTimedOut) and not error.details.get("silent"):
                    silent.pop(url, None)
                if not isinstance(error, (ConnectionFailed, CoordinatorStandby)):
                    raise
                last = error
                if (active := hinted(error)) and active not in urls:
                    urls.append(active)
        if isinstance(last, CoordinatorStandby):
            raise last
        raise ConnectionFailed(f"no coordinator answers: {last.message}") from last

    async def _send(self, url: str, method: str, path: str, body: Any) -> Any:
        data = msgspec.json.encode(body) if body is not None else None
        headers = {"Content-Type": "application/json"} if data is not None else {}
        limits = aiohttp.ClientTimeout(total=_ATTEMPT_S, connect=self._client.connector.connect_timeout)
        try:
            async with self._client.connector.http.request(
                method, url + path, data=data, headers=headers, timeout=limits, allow_redirects=False
            ) as response:
                raw = await response.content.read(BODY_BYTES_MAX)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise ConnectionFailed(f"{url}: {error}", url=url, silent=isinstance(error, TimeoutError)) from None
        except (aiohttp.ClientError, OSError) as error:
            raise ConnectionLost(f"{url}: {error or type(error).__name__}", url=url) from None
        except TimeoutError:
            raise RequestTimedOut(f"{url}{path}: no answer within {_ATTEMPT_S:g} s") from None
        if response.status >= 400:
            raise problem_of(response.status, raw)
        return msgspec.json.decode(raw) if raw.strip() else {}


def _listed(answer: Any, name: str) -> list[dict[str, Any]]:
    found = answer.get(name, []) if isinstance(answer, dict) else answer
    return list(found)


def _surely_not_sent(error: BaseException) -> bool:
    return isinstance(error, (ConnectionFailed, CoordinatorStandby, CoordinatorLoading))


def _worth_another_try(error: BaseException) -> bool:
    return isinstance(error, FerrylineError) and error.retriable


def problem_of(status: int, raw: bytes) -> FerrylineError:
    """Problem details (RFC 9457) back into the error they were made from."""
    try:
        body = msgspec.json.decode(raw)
        code, text = str(body["code"]), str(body.get("detail") or body.get("title") or "")
        details = {str(key): value for key, value in (body.get("details") or {}).items()}
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError):
        return InternalError(f"HTTP {status}: {raw[:200]!r}", status=status)
    kind = BY_CODE.get(code)
    if kind is None:
        return InternalError(f"{code}: {text}", **details)
    details.pop("message", None)
    return kind(text, **details, request_id=str(body.get("request_id", "")))
