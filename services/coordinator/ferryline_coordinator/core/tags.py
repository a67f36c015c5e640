"""What names the present state of a record, for whoever changes only what they have seen. Pure."""

from __future__ import annotations

import hashlib

from ferryline.protocol.access import PrincipalMeta
from ferryline.protocol.errors import PreconditionFailed
from ferryline.protocol.exchanges import ExchangeMeta
from ferryline.protocol.metadata import TopicMeta
from ferryline_coordinator.core.records import encode_record

ANY = "*"


def topic_tag(topic: TopicMeta) -> str:
    """Of its config: a topic made again under its name has another id."""
    return f"{topic.id}.{topic.version}"


def exchange_tag(exchange: ExchangeMeta) -> str:
    """Of all that it is: one made again under its name begins at version 1, too."""
    return f"{exchange.version}.{hashlib.blake2b(encode_record(exchange), digest_size=8).hexdigest()}"


def principal_tag(principal: PrincipalMeta) -> str:
    """Of all that it is, keys included."""
    return f"{principal.version}.{hashlib.blake2b(encode_record(principal), digest_size=8).hexdigest()}"


def check_expected(tag: str, expected: tuple[str, ...]) -> None:
    """Raises PreconditionFailed unless ``tag`` is one of those that are expected, or nothing is."""
    if expected and tag not in expected and ANY not in expected:
        raise PreconditionFailed("it was changed since", field="If-Match", etag=f'"{tag}"')
