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
    from ferryline import tracing as tracing
    from ferryline.admin import Admin as Admin
    from ferryline.app.app import App as App
    from ferryline.app.context import Context as Context
    from ferryline.app.errors import JobFailed as JobFailed
    from ferryline.app.errors import Reject as Reject
    from ferryline.app.job import Job as Job
    from ferryline.app.statuses import JobState as JobState
    from ferryline.app.statuses import JobStatus as JobStatus
    from ferryline.app.task import Task as Task
    from ferryline.app.worker import Worker as Worker
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
    from ferryline.protocol.access import Grant as Grant
    from ferryline.protocol.access import Quota as Quota
    from ferryline.protocol.errors import *  # noqa: F403  (fl.UnknownTopic and the like)
    from ferryline.queues.message import QueueMessage as QueueMessage
    from ferryline.queues.receiver import Receiver as Receiver
    from ferryline.retry import Retry as Retry
    from ferryline.retry import exponential as exponential
    from ferryline.serializers import Serializer as Serializer
    from ferryline.tuning import tune_process as tune_process

__version__ = "0.1.0"

_MODULES = {
    "Admin": "ferryline.admin",
    "App": "ferryline.app.app",
    "At": "ferryline.message",
    "Client": "ferryline.client",
    "Consumer": "ferryline.consumer",
    "Context": "ferryline.app.context",
    "FerrylineError": "ferryline.protocol.errors",
    "Grant": "ferryline.protocol.access",
    "Headers": "ferryline.message",
    "Job": "ferryline.app.job",
    "JobFailed": "ferryline.app.errors",
    "JobState": "ferryline.app.statuses",
    "JobStatus": "ferryline.app.statuses",
    "Message": "ferryline.message",
    "OutcomeUnknown": "ferryline.protocol.errors",
    "Producer": "ferryline.producer",
    "QueueMessage": "ferryline.queues.message",
    "Quota": "ferryline.protocol.access",
    "Receiver": "ferryline.queues.receiver",
    "RecordMetadata": "ferryline.message",
    "Reject": "ferryline.app.errors",
    "Retry": "ferryline.retry",
    "Serializer": "ferryline.serializers",
    "Task": "ferryline.app.task",
    "TopicPartition": "ferryline.message",
    "Worker": "ferryline.app.worker",
    "at": "ferryline.message",
    "connect": "ferryline.client",
    "exponential": "ferryline.retry",
    "tune_process": "ferryline.tuning",
}
_SUBMODULES = ("errors", "simple", "sync", "testing", "tracing")

__all__ = [*_MODULES, *_SUBMODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = getattr(importlib.import_module(_MODULES[name]), name)
    elif name in _SUBMODULES:
        value = importlib.import_module("ferryline.protocol.errors" if name == "errors" else f"ferryline.{name}")
    else:  # errors may be named at the top: fl.UnknownTopic
        value = getattr(importlib.import_module("ferryline.protocol.errors"), name, None)
        if not (isinstance(value, type) and issubclass(value, Exception)):
            raise AttributeError(f"module 'ferryline' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
