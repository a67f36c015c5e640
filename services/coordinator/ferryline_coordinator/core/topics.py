"""Topics: create, alter, add partitions, delete. Every refusal names the field and its limits."""

from __future__ import annotations

from typing import Any

from msgspec.structs import asdict, fields, replace

from ferryline.protocol.dead_letters import EnsureTopicOk
from ferryline.protocol.errors import (
    Conflict,
    InvalidArgument,
    NotEnoughReplicas,
    Throttled,
    TopicExists,
    UnknownTopic,
)
from ferryline.protocol.limits import PARTITIONS_MAX, RECORD_BYTES_CEILING, REPLICATION_MAX, check_name, check_range
from ferryline.protocol.metadata import (
    FLUSH_FSYNC,
    FLUSH_REPLICATED,
    ON_DEAD_PARK,
    ON_DEAD_SKIP,
    PartitionMeta,
    RetryPolicy,
    TopicConfig,
    TopicMeta,
)
from ferryline_coordinator.core.change import Change
from ferryline_coordinator.core.config import CoreConfig
from ferryline_coordinator.core.elections import settled
from ferryline_coordinator.core.events import (
    PartitionsAdded,
    TopicAltered,
    TopicCreated,
    TopicDeleted,
    TopicEnsured,
)
from ferryline_coordinator.core.placement import placed
from ferryline_coordinator.core.records import TopicGone, gone_key, topic_key
from ferryline_coordinator.core.tags import check_expected, topic_tag

_YEARS_MS = 100 * 365 * 86_400_000
_LIMITS: dict[str, tuple[int, int]] = {
    "partitions": (1, PARTITIONS_MAX),
    "replication": (1, REPLICATION_MAX),
    "min_isr": (1, REPLICATION_MAX),
    "retention_ms": (1_000, _YEARS_MS),
    "retention_bytes": (16 * 1024, 2**60),
    "segment_bytes": (16 * 1024, 2**31 - 1),  # positions in the index are 32 bits wide
    "segment_ms": (1_000, _YEARS_MS),
    "max_record_bytes": (1, RECORD_BYTES_CEILING),
}
_RETRY_LIMITS: dict[str, tuple[int, int]] = {
    "attempts": (1, 1_000),
    "backoff_ms": (0, 86_400_000),
    "backoff_max_ms": (0, 86_400_000),
}
_UNLIMITED = ("retention_ms", "retention_bytes")  # -1: no limit
_FIXED = {
    "partitions": "partitions are added, not set: POST /v1/topics/NAME/partitions",
    "replication": "replication of an existing topic cannot be changed in this version",
}
_GONE_MAX = 10_000  # remembered deletions; a broker that was away for more of them keeps unreferenced files


def checked_config(settings: dict[str, Any], base: TopicConfig) -> TopicConfig:
    """``base`` with ``settings``. Raises InvalidArgument naming the field, the value and the limits."""
    known = {field.name for field in fields(TopicConfig)}
    for name, value in settings.items():
        if name not in known:
            raise InvalidArgument(
                f"{name[:64]}: no such setting; there are {', '.join(sorted(known))}", field=name[:64]
            )
        if name == "flush":
            if value not in (FLUSH_FSYNC, FLUSH_REPLICATED):
                raise InvalidArgument(f"flush: expected '{FLUSH_FSYNC}' or '{FLUSH_REPLICATED}'", field="flush")
        elif name in _LIMITS and not (name in _UNLIMITED and type(value) is int and value == -1):
            check_range(value, name, *_LIMITS[name])
    if "retry" in settings:
        settings = {**settings, "retry": checked_retry(settings["retry"], base.retry)}
    config: TopicConfig = replace(base, **settings)
    if config.min_isr > config.replication:
        raise InvalidArgument(
            f"min_isr: {config.min_isr} is above replication {config.replication}",
            field="min_isr",
            low=1,
            high=config.replication,
        )
    return config


def checked_retry(settings: Any, base: RetryPolicy) -> RetryPolicy:
    """``base`` with ``settings``, by name. Raises InvalidArgument naming the field, the value and the limits."""
    if not isinstance(settings, dict):
        raise InvalidArgument(f"retry: expected an object, got {type(settings).__name__}", field="retry")
    known = [field.name for field in fields(RetryPolicy)]
    for name, value in settings.items():
        field = f"retry.{name[:64]}"
        if name in _RETRY_LIMITS:
            check_range(value, field, *_RETRY_LIMITS[name])
        elif name == "on_dead":
            if value not in (ON_DEAD_SKIP, ON_DEAD_PARK):
                raise InvalidArgument(f"{field}: expected '{ON_DEAD_SKIP}' or '{ON_DEAD_PARK}'", field=field)
        elif name != "dead_letters":
            raise InvalidArgument(f"{field}: no such setting; there are {', '.join(known)}", field=field)
        elif value != "":
            check_name(value, field)
    policy: RetryPolicy = replace(base, **settings)
    if policy.backoff_max_ms < policy.backoff_ms:
        raise InvalidArgument(
            f"retry.backoff_max_ms: {policy.backoff_max_ms} is below backoff_ms, {policy.backoff_ms}",
            field="retry.backoff_max_ms",
            low=policy.backoff_ms,
            high=_RETRY_LIMITS["backoff_max_ms"][1],
        )
    return policy


def _as_settings(config: TopicConfig) -> dict[str, Any]:
    """All settings of ``config``, as a request names them."""
    return {**asdict(config), "retry": asdict(config.retry)}


def _check_elsewhere(name: str, config: TopicConfig) -> None:
    """A dead letter in its own topic would be read, and would die, for ever."""
    if config.retry.dead_letters == name:
        raise InvalidArgument(
            f"retry.dead_letters: {name} cannot take its own dead letters", field="retry.dead_letters"
        )


class Topics:
    """Carries out commands on topics. A refused one changes nothing."""

    def __init__(self, config: CoreConfig) -> None:
        self._config = config

    def create(self, change: Change, event: TopicCreated) -> None:
        name = check_name(event.name)
        if change.topic(name) is not None:
            raise TopicExists(f"topic {name} exists", topic=name)
        change.reply(event.reply, self._made(change, name, event.topic_id, event.settings, event.owner))

    def ensure(self, change: Change, event: TopicEnsured) -> None:
        """Make a topic, or answer with the one that is there: a lost answer is asked for again."""
        name, settings = check_name(event.message.name), _as_settings(event.message.config)
        topic = change.topic(name) or self._made(change, name, event.topic_id, settings, event.message.owner)
        change.reply(event.reply, EnsureTopicOk(topic))

    def _made(self, change: Change, name: str, topic_id: str, settings: dict[str, Any], owner: str) -> TopicMeta:
        if len(change.state.topics) >= self._config.topics_max:
            raise Throttled(f"the cluster has {self._config.topics_max} topics", limit=self._config.topics_max)
        config = checked_config(settings, TopicConfig())
        _check_elsewhere(name, config)
        topic = TopicMeta(topic_id, name, config, 1, owner)
        self._add_partitions(change, topic, 0)
        change.put(topic)
        return topic

    def alter(self, change: Change, event: TopicAltered) -> None:
        topic = self._existing(change, event.name)
        check_expected(topic_tag(topic), event.expected)
        for name, why in _FIXED.items():
            if name in event.settings and event.settings[name] != getattr(topic.config, name):
                raise InvalidArgument(f"{name}: {why}", field=name)
        config = checked_config(event.settings, topic.config)
        _check_elsewhere(topic.name, config)
        if config != topic.config:
            topic = replace(topic, config=config, version=topic.version + 1)
            change.put(topic)
            for record in change.parts_of(topic):
                change.put_part(settled(replace(record.meta, min_isr=config.min_isr, flush=config.flush)))
        change.reply(event.reply, topic)

    def add_partitions(self, change: Change, event: PartitionsAdded) -> None:
        topic = self._existing(change, event.name)
        check_expected(topic_tag(topic), event.expected)
        count = check_range(event.partitions, "partitions", 1, PARTITIONS_MAX)
        have = topic.config.partitions
        if count < have:
            raise InvalidArgument(f"partitions: {count} is below the present {have}", field="partitions", low=have)
        if count > have:
            if not event.keys_move:
                raise Conflict(
                    f"partitions: from {have} to {count}, keys move to other partitions and lose their order against "
                    "what was sent before; say keys_move=true to accept that",
                    field="keys_move",
                )
            topic = replace(topic, config=replace(topic.config, partitions=count), version=topic.version + 1)
            self._add_partitions(change, topic, have)
            change.put(topic)
        change.reply(event.reply, topic)

    def delete(self, change: Change, event: TopicDeleted) -> None:
        topic = self._existing(change, event.name)
        check_expected(topic_tag(topic), event.expected)
        for number in range(topic.config.partitions):
            change.delete_part((topic.id, number))
        change.delete(topic_key(topic.id))
        change.put(TopicGone(topic.id, change.state.revision + 1))
        gone = change.state.gone
        if len(gone) >= _GONE_MAX:
            change.delete(gone_key(min(gone.values(), key=lambda record: record.revision).topic_id))
        change.reply(event.reply, topic)

    def _existing(self, change: Change, name: str) -> TopicMeta:
        topic = change.topic(check_name(name))
        if topic is None:
            raise UnknownTopic(f"topic {name} does not exist", topic=name)
        return topic

    def _add_partitions(self, change: Change, topic: TopicMeta, first: int) -> None:
        """Place and create partitions from ``first`` on. All replicas begin in sync: they are equally empty."""
        config = topic.config
        registered = [b.meta.id for b in change.brokers() if b.meta.broker_epoch and not b.meta.draining]
        usable = [b for b in registered if change.usable(b)]
        if len(registered) < config.replication or not usable:
            raise NotEnoughReplicas(
                f"replication: {config.replication} replicas need as many brokers, {len(registered)} are registered "
                f"and {len(usable)} of them serve",
                replication=config.replication,
                brokers=len(registered),
                serving=len(usable),
            )
        count = config.partitions - first
        if change.state.replicas + count * config.replication > self._config.partitions_max:
            raise Throttled(
                f"partitions: {count} times {config.replication} replicas would go over the cluster's "
                f"{self._config.partitions_max}",
                limit=self._config.partitions_max,
            )
        new = {(topic.id, number): config.replication for number in range(first, config.partitions)}
        state = change.state
        for (topic_id, number), replicas in placed(state.assigned, state.preferred, new, usable, registered).items():
            isr = tuple(b for b in replicas if b in usable)
            change.put_part(
                PartitionMeta(topic_id, number, replicas, isr[0], 1, 1, isr, min_isr=config.min_isr, flush=config.flush)
            )
