"""What happens to a producer, and what it wants done: events in, effects out. See `core.producer`."""

from __future__ import annotations

import msgspec

from ferryline.protocol.errors import FerrylineError

PartitionKey = tuple[str, int]  # (topic_id, partition)


# -- events -----------------------------------------------------------------------------------------


class Event(msgspec.Struct, frozen=True):
    """Base of what may happen to a producer."""


class BatchClosed(Event, frozen=True):
    """The accumulator closed a batch. ``batch`` is a number that the driver never uses twice.

    ``deadline_ms`` must not be before that of the batch closed before it in the same partition.
    """

    key: PartitionKey
    batch: int
    records: int
    deadline_ms: int
    partitions: int = 0  # count that its keys were hashed with; 0: its records have no keys


class BatchAnswered(Event, frozen=True):
    """The outcome of one attempt. With ``error`` None it is committed at ``base_offset``.

    Also for an attempt that could not be handed to a session: error ConnectionFailed (definite: nothing was sent).
    """

    key: PartitionKey
    batch: int
    attempt: int
    base_offset: int = -1
    epoch: int = 0
    error: FerrylineError | None = None


class SessionLost(Event, frozen=True):
    """The session to a broker ended: what was on its way there may or may not have been applied."""

    broker: int


class RouteChanged(Event, frozen=True):
    """What the metadata says about a partition now. ``gone``: the topic does not exist any more.

    Tell it for every partition of a topic whose partition count changed, too.
    """

    key: PartitionKey
    broker: int
    epoch: int
    partitions: int = 0  # of the topic
    gone: bool = False


class TimePassed(Event, frozen=True):
    """`next_deadline_ms` has come."""


class Closed(Event, frozen=True):
    """The application gives up what is unsettled. Nothing is sent after this."""


# -- effects ----------------------------------------------------------------------------------------


class Effect(msgspec.Struct, frozen=True):
    """Base of what a driver is told to do."""


class SendBatch(Effect, frozen=True):
    """Seal the batch with this identity (`records.set_producer` if it carries another) and send it to ``broker``.

    Exactly one BatchAnswered or SessionLost must follow for the attempt. Effects of one call are in sending order, and
    a session must keep it. ``timeout_ms`` bounds the wait for the commit on the broker.
    """

    key: PartitionKey
    batch: int
    attempt: int
    broker: int
    pid: int
    pepoch: int
    sequence: int
    timeout_ms: int


class CompleteBatch(Effect, frozen=True):
    """Acknowledged: its records stand at ``base_offset`` and above. Last word on this batch."""

    key: PartitionKey
    batch: int
    base_offset: int


class FailBatch(Effect, frozen=True):
    """Last word on this batch. ``error.definite`` says whether it was surely not applied."""

    key: PartitionKey
    batch: int
    error: FerrylineError


class RepartitionBatch(Effect, frozen=True):
    """Surely not applied, because the topic has another number of partitions now: route its records anew.

    Last word on this batch. Given back in order, and only when no earlier batch of the partition is unsettled.
    """

    key: PartitionKey
    batch: int


class RefreshMetadata(Effect, frozen=True):
    """The picture of the cluster is probably old; ask for a new one now."""
