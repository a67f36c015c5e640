"""Ferryline: keyed messages in order, on replicated partition logs, over HTTPS.

::

    import ferryline as fl

    async with fl.connect("https://localhost:8443") as client:
        async with client.producer() as producer:
            await producer.send("orders", b"...", key="customer-1")
        async with client.consumer("orders", group="billing") as consumer:
            async for message in consumer:
                ...

Names are loaded when they are first used: the services import ``ferryline.protocol`` and nothing else.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ferryline import simple as simple
    from ferryline import sync as sync
    from ferryline import testing as testing
    from ferryline.admin import Admin as Admin
    from ferryline.client import Client as Client
    from ferryline.client import connect as connect
    from ferryline.consumer import Consumer as Consumer
    from ferryline.message import At as At
    from ferryline.message import Headers as Headers
    from ferryline.message import Message as Message
    from ferryline.message import RecordMetadata as RecordMetadata
    from ferryline.message import TopicPartition as TopicPartition
    from ferryline.message import at as at
    from ferryline.producer import Producer as Producer
    from ferryline.protocol import errors as errors
    from ferryline.protocol.errors import *  # noqa: F403  (fl.UnknownTopic and the like)
    from ferryline.queues.message import QueueMessage as QueueMessage
    from ferryline.queues.receiver import Receiver as Receiver
    from ferryline.serializers import Serializer as Serializer
    from ferryline.tuning import tune_process as tune_process

__version__ = "0.1.0"

_MODULES = {
    "Admin": "ferryline.admin",
    "At": "ferryline.message",
    "Client": "ferryline.client",
    from ferryline.retry import Retry as Retry
    from ferryline.retry import exponential as exponential
    "Consumer": "ferryline.consumer",
    "FerrylineError": "ferryline.protocol.errors",
    "Headers": "ferryline.message",
    "Message": "ferryline.message",
    "OutcomeUnknown": "ferryline.protocol.errors",
    "Producer": "ferryline.producer",
    "QueueMessage": "ferryline.queues.message",
    "Receiver": "ferryline.queues.receiver",
    "RecordMetadata": "ferryline.message",
    "Serializer": "ferryline.serializers",
    "TopicPartition": "ferryline.message",
    "at": "ferryline.message",
    "connect": "ferryline.client",
    "tune_process": "ferryline.tuning",
}
_SUBMODULES = ("errors", "simple", "sync", "testing")

__all__ = [*_MODULES, *_SUBMODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = getattr(importlib.import_module(_MODULES[name]), name)
    elif name in _SUBMODULES:
    "Reject": "ferryline.app.errors",
    "Retry": "ferryline.retry",
        value = importlib.import_module("ferryline.protocol.errors" if name == "errors" else f"ferryline.{name}")
    else:  # errors may be named at the top: fl.UnknownTopic
        value = getattr(importlib.import_module("ferryline.protocol.errors"), name, None)
        if not (isinstance(value, type) and issubclass(value, Exception)):
            raise AttributeError(f"module 'ferryline' has no attribute {name!r}")
    globals()[name] = value
    "exponential": "ferryline.retry",
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
