"""Publishing to exchanges: which topics a record goes to is decided here, by the cluster's metadata, without a question
to anybody; the topics then get it as if each had been sent to.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ferryline.accumulator import Pairs
from ferryline.message import RecordMetadata
from ferryline.protocol.errors import FerrylineError, PartlyPublished, Unroutable
from ferryline.protocol.exchanges import HEADER_EXCHANGE, HEADER_ROUTING_KEY, check_routing_key
from ferryline.protocol.limits import check_name
from ferryline.record_checks import HeadersLike, pairs_of
from ferryline.serializers import CONTENT_TYPE, Encoded

if TYPE_CHECKING:
    from ferryline.client import Client
    from ferryline.producer import Producer

_OWN = (HEADER_EXCHANGE, HEADER_ROUTING_KEY)


class Publisher:
    """Routes for one producer. ``unroutable`` counts records that reached no topic, by exchange."""

    def __init__(self, producer: Producer, client: Client, encode: Callable[[Any], Encoded]) -> None:
        self.unroutable: Counter[str] = Counter()
        self._producer = producer
        self._client = client
        self._encode = encode

    async def publish(
        self,
        exchange: str,
        value: Any,
        routing_key: str,
        headers: HeadersLike | None,
        key: str | bytes | None,
        timestamp_ms: int | None,
        mandatory: bool,
    ) -> dict[str, RecordMetadata]:
        """As `Producer.publish` says."""
        await self._producer.start()  # raises when it was closed
        check_routing_key(routing_key)
        pairs = [] if headers is None else [pair for pair in pairs_of(headers) if pair[0] not in _OWN]
        if type(value) is not bytes:
            data, content_type = self._encode(value)
            if data is not None:  # once, however many topics it goes to
                value = data
                pairs += [] if content_type is None else [(CONTENT_TYPE, content_type)]
        topics = await self._topics(exchange, routing_key, pairs, mandatory)
        if not topics:
            self.unroutable[exchange] += 1
            return {}
        pairs += [(HEADER_EXCHANGE, exchange.encode()), (HEADER_ROUTING_KEY, routing_key.encode())]
        send = self._producer.send
        if len(topics) == 1:
            return {topics[0]: await send(topics[0], value, key, pairs, timestamp_ms=timestamp_ms)}
        sending = (send(topic, value, key, pairs, timestamp_ms=timestamp_ms) for topic in topics)
        outcomes = await asyncio.gather(*sending, return_exceptions=True)
        return _all_or_raise(exchange, dict(zip(topics, outcomes, strict=True)))

    async def _topics(self, exchange: str, routing_key: str, pairs: Pairs, mandatory: bool) -> tuple[str, ...]:
        """Where it goes. Raises UnknownExchange, or Unroutable if it is mandatory and goes nowhere.

        Before that is said, the metadata is asked for again: the exchange or binding may be a moment old.
        """
        routing = self._client.routing
        if exchange not in routing.cluster.exchanges:
            check_name(exchange, "exchange")
            await self._client.watch.ask(
                timeout=self._client.timeout, known=lambda: exchange in routing.cluster.exchanges
            )
        topics = routing.table().route(exchange, routing_key, pairs)
        if not topics and mandatory:
            await self._client.watch.ask(
                timeout=self._client.timeout,
                known=lambda: bool(routing.table().route(exchange, routing_key, pairs)),
            )
            topics = routing.table().route(exchange, routing_key, pairs)
            if not topics:
                raise Unroutable(
                    f"exchange {exchange}: no binding takes routing key {routing_key[:80]!r}, and no alternate does",
                    exchange=exchange,
                    routing_key=routing_key,
                )
        return topics


def _all_or_raise(exchange: str, outcomes: dict[str, RecordMetadata | BaseException]) -> dict[str, RecordMetadata]:
    """The outcome of every topic, if all have the record."""
    stored = {topic: outcome for topic, outcome in outcomes.items() if isinstance(outcome, RecordMetadata)}
    if len(stored) == len(outcomes):
        return stored
    failed: dict[str, str] = {}
    for topic, outcome in outcomes.items():
        if isinstance(outcome, FerrylineError):
            failed[topic] = outcome.code
        elif isinstance(outcome, BaseException):
            raise outcome
    names = ", ".join(f"{topic} ({code})" for topic, code in failed.items())
    raise PartlyPublished(
        f"exchange {exchange}: {len(failed)} of {len(outcomes)} topics do not have the record: {names}",
        dict(outcomes),
        failed=failed,
    )
