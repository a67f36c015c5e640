"""What happens to a receiver, and what it wants done: events in, effects out. See `core.receiving`."""

from __future__ import annotations

import msgspec

from ferryline.core.leases import Lease, PartitionKey
from ferryline.protocol.errors import FerrylineError
from ferryline.protocol.queue_messages import Delivery, SettleEntry, SettleResult

# -- events -----------------------------------------------------------------------------------------


class Event(msgspec.Struct, frozen=True):
    """Base of what may happen to a receiver."""


class RoutesChanged(Event, frozen=True):
    """Where the partitions of the topic are now: (broker, epoch) by key, all of them. Empty: it does not exist."""

    routes: dict[PartitionKey, tuple[int, int]]


class SessionLost(Event, frozen=True):
    """The session to a broker ended."""

    broker: int


class Received(Event, frozen=True):
    """The answer to SendReceive ``ask``. ``more``: and not the last one."""

    ask: int
    deliveries: list[Delivery]
    more: bool = False


class ReceiveFailed(Event, frozen=True):
    """SendReceive ``ask`` has no answer. Definite: nothing was leased because of it."""

    ask: int
    error: FerrylineError


class KeepAnswered(Event, frozen=True):
    """The answer to SendKeep ``keep``; ``error`` stands for all of its partitions, ``errors`` for single ones."""

    keep: int
    error: FerrylineError | None = None
    errors: dict[PartitionKey, FerrylineError] = {}


class Settle(msgspec.Struct, frozen=True):
    """What becomes of records of one lease, which `LeaseTable.begin` has taken. ``number``: never used twice.

    ``indexes`` are empty for an extension of the lease as a whole.
    """

    number: int
    lease: Lease
    action: str
    indexes: list[int]
    deadline_ms: int
    delay_ms: int = -1
    reason: str = ""
    detail: str = ""


class SettleAsked(Event, frozen=True):
    """The application settled records since the last time; what stands here together travels together. ``idle``: it
    waits for records meanwhile, and has none."""

    items: list[Settle]
    idle: bool = False


class SettleAnswered(Event, frozen=True):
    """The answer to SendSettle ``frame``."""

    frame: int
    results: list[SettleResult]


class SettleFailed(Event, frozen=True):
    """SendSettle ``frame`` has no answer, or was refused as a whole."""

    frame: int
    error: FerrylineError


class RecordsLost(Event, frozen=True):
    """A renewal found out that these offsets of a lease are not ours any more, or gave them up."""

    lease: Lease
    offsets: list[int]


class TimePassed(Event, frozen=True):
    """`next_deadline_ms` has come."""


class PrefetchChanged(Event, frozen=True):
    """From now on so many records may be here unsettled. What waits beyond that is given back, if it stays."""

    records: int


class Stopped(Event, frozen=True):
    """Ask for nothing more. Settling goes on."""


class Parting(Event, frozen=True):
    """Say to every primary that nothing is held here; one SendKeep each. After `Stopped`."""


class Closed(Event, frozen=True):
    """The application gives up what is unsettled. Nothing is sent after this."""


# -- effects ----------------------------------------------------------------------------------------


class Effect(msgspec.Struct, frozen=True):
    """Base of what a driver is told to do."""


class SendReceive(Effect, frozen=True):
    """Send a RECEIVE; exactly one Received or ReceiveFailed follows, unless ForgetReceive comes first."""

    broker: int
    ask: int
    keys: list[PartitionKey]
    records_max: int
    bytes_max: int
    wait_ms: int


class ForgetReceive(Effect, frozen=True):
    """Heed no answer to this one any more: nothing that it named is there."""

    ask: int


class SendKeep(Effect, frozen=True):
    """Send a KEEP with the leases held in each of these partitions; exactly one KeepAnswered follows."""

    broker: int
    keep: int
    entries: list[tuple[PartitionKey, list[int]]]


class SendSettle(Effect, frozen=True):
    """Send a SETTLE; exactly one SettleAnswered or SettleFailed follows. ``patient``: see `Settle` of the protocol."""

    broker: int
    frame: int
    entries: list[SettleEntry]
    patient: bool = False


class Arrived(Effect, frozen=True):
    """Delivery number ``index`` of the event is leased to us: its records may be handed out."""

    index: int
    lease: Lease


class Settled(Effect, frozen=True):
    """The last word on Settle ``number``. Without ``error`` it is done, but for ``lost``: these were not ours."""

    number: int
    lost: list[int] = []
    error: FerrylineError | None = None


class GiveBack(Effect, frozen=True):
    """More waits here than was wanted: release this many of the records that would be handed out last."""

    count: int


class RefreshMetadata(Effect, frozen=True):
    """What is known of the cluster is probably old."""


class RaiseError(Effect, frozen=True):
    """Let the application know; receiving goes on as far as it can."""

    error: FerrylineError
