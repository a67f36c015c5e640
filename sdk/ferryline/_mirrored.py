"""Which asynchronous classes `ferryline.sync` mirrors, and what of them. Also read by the writer of its stub."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import ferryline.admin
import ferryline.client
import ferryline.consumer
import ferryline.producer
import ferryline.subscription

ASYNC_CLASSES: tuple[type, ...] = (
    ferryline.client.Client,
    ferryline.producer.Producer,
    ferryline.consumer.Consumer,
    ferryline.subscription.Subscription,
    ferryline.admin.Admin,
)


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
