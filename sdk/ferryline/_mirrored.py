"""Which asynchronous classes `ferryline.sync` mirrors, and what of them. Also read by the writer of its stub."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import ferryline.admin
import ferryline.client
import ferryline.consumer
import ferryline.dead_letters
import ferryline.producer
import ferryline.queue_admin
import ferryline.queues.message
import ferryline.queues.receiver
import ferryline.subscription

ASYNC_CLASSES: tuple[type, ...] = (
    ferryline.client.Client,
    ferryline.producer.Producer,
    ferryline.consumer.Consumer,
    ferryline.subscription.Subscription,
    ferryline.admin.Admin,
    ferryline.queue_admin.Queue,
    ferryline.dead_letters.DeadLetters,
    ferryline.queues.receiver.Receiver,
    ferryline.queues.message.QueueMessage,
    ferryline.queues.message.Processing,
)
# Frozen: what they tell can be read in any thread. Not all of it is a property: a codec has made them.
PLAIN_CLASSES: dict[type, dict[str, str]] = {
    ferryline.queues.message.QueueMessage: {
        "key": "bytes | None",
        "value": "T",
        "raw": "bytes | None",
        "timestamp_ms": "int",
    }
}


def public_members(cls: type) -> Iterator[tuple[str, Any]]:
    """What of an asynchronous class is mirrored: its public methods and properties, in the order of the source.

    Its own first, then those of its bases.
    """
    members: dict[str, Any] = {}
    for part in cls.__mro__:
        members = {**members, **{name: member for name, member in vars(part).items() if name not in members}}
    for name, member in members.items():
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
            yield name, member
