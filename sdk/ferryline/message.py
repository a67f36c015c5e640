"""What a consumer gets and a producer is told: `Message`, `Headers`, `RecordMetadata`, `TopicPartition`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import msgspec

from ferryline.protocol._codec import COMPILED, MessageBase, without_gc
from ferryline.protocol.errors import SerializationFailed
from ferryline.protocol.exchanges import HEADER_EXCHANGE, HEADER_ROUTING_KEY
from ferryline.serializers import Decoder

T = TypeVar("T")
_PRIORITY_DEFAULT = 4


class TopicPartition(NamedTuple):
    """One partition of a topic, by name."""

    topic: str
    partition: int


class At(msgspec.Struct, frozen=True):
    """A position by time: the first record whose timestamp is not before it. Made by `at`."""

    timestamp_ms: int


def at(when: datetime) -> At:
    """The position of a moment, for ``consumer.seek``. A datetime without a time zone is taken as UTC."""
    aware = when if when.tzinfo is not None else when.replace(tzinfo=UTC)
    return At(int(aware.timestamp() * 1000))


class RecordMetadata(msgspec.Struct, frozen=True, gc=False):
    """Where an acknowledged record stands."""

    topic: str
    partition: int
    offset: int


class Headers(Mapping[str, bytes | None]):
    """Headers of a record, in order; a name may stand more than once. ``h[name]`` is the last one with that name."""

    __slots__ = ("pairs",)

    def __init__(self, pairs: list[tuple[str, bytes | None]]) -> None:
        self.pairs = pairs

    def __getitem__(self, name: str) -> bytes | None:
        for key, value in reversed(self.pairs):
            if key == name:
                return value
        raise KeyError(name)

    def getall(self, name: str) -> list[bytes | None]:
        """Every value with this name, in order."""
        return [value for key, value in self.pairs if key == name]

    def text(self, name: str, default: str = "") -> str:
        """The header as text; ``default`` when it is missing, empty or no UTF-8."""
        value = self.get(name)
        try:
            return value.decode() if value else default
        except UnicodeDecodeError:
            return default

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(key for key, _ in self.pairs))

    def __len__(self) -> int:
        return len({key for key, _ in self.pairs})

    def __repr__(self) -> str:
        return f"Headers({self.pairs!r})"


class Source:
    """What the messages of one partition share."""

    __slots__ = ("decode", "partition", "topic")

    def __init__(self, topic: str, partition: int, decode: Decoder | None) -> None:
        self.topic = topic
        self.partition = partition
        self.decode = decode


class Described:
    """What every message tells of its record, whoever gets it; mixed into the structs that a codec makes."""

    __slots__ = ()

    if TYPE_CHECKING:

        @property
        def offset(self) -> int: ...
        @property
        def timestamp_ms(self) -> int: ...
        @property
        def raw(self) -> bytes | None: ...
        @property
        def _source(self) -> Any: ...
        @property
        def _pairs(self) -> list[tuple[str, bytes | None]]: ...

    @property
    def topic(self) -> str:
        return self._source.topic  # type: ignore[no-any-return]

    @property
    def partition(self) -> int:
        return self._source.partition  # type: ignore[no-any-return]

    def _parse(self) -> Any:
        """The parsed value; asked for once."""
        decode = self._source.decode
        if decode is None:
            return self.raw
        try:
            return decode(self.raw)
        except SerializationFailed as error:
            where = f"{self.topic}/{self.partition}/{self.offset}"
            raise SerializationFailed(
                f"{where}: {error.message}", topic=self.topic, partition=self.partition, offset=self.offset
            ) from error

    @property
    def headers(self) -> Headers:
        return Headers(self._pairs)

    @property
    def timestamp(self) -> datetime:
        """When it was produced, in UTC."""
        return datetime.fromtimestamp(self.timestamp_ms / 1000, UTC)

    @property
    def id(self) -> str:
        """The sender's id of the message (header ``fl-id``); "" when it gave none."""
        return self.headers.text("fl-id")

    @property
    def priority(self) -> int:
        text = self.headers.text("fl-priority")
        return int(text) if text.isdigit() else _PRIORITY_DEFAULT

    @property
    def exchange(self) -> str:
        """The exchange it was published to; "" when it was sent to the topic itself."""
        return self.headers.text(HEADER_EXCHANGE)

    @property
    def routing_key(self) -> str:
        """The routing key it was published with."""
        return self.headers.text(HEADER_ROUTING_KEY)


@without_gc
class Message(Described, MessageBase, Generic[T]):
    """One record. Frozen; ``value`` is parsed at the first access, so iterating over bytes parses nothing.

    A consumer makes a million of them a second, so the codec makes them while it decodes; ``offset``, ``key``, ``raw``
    (the value as it was sent), ``timestamp_ms`` and ``value`` are attributes of its own (`MessageBase`).
    """

    if COMPILED:
        __slots__ = ()  # a struct of the codec in Python must not name its slots, and needs no such line

    if TYPE_CHECKING:

        @property
        def value(self) -> T:
            """The value as the consumer's type. Raises SerializationFailed, naming topic, partition and offset."""

    @property
    def delivery_count(self) -> int:
        """How often it was handed out: 1 for a consumer of a log, which does not count."""
        return 1

    def __repr__(self) -> str:
        return f"Message({self.topic}/{self.partition}/{self.offset} key={self.key!r} raw={self.raw!r:.100})"
