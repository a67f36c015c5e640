"""Breaking the promise on purpose, to see that the proofs notice. Never in production: refused unless
FERRYLINE_ALLOW_SABOTAGE=1, and shouted about in the log.

``FERRYLINE_SABOTAGE`` is one of

* ``ack-before-replicate``: the primary counts its own log only, whatever the in-sync set says;
* ``ack-before-flush``: primary and secondaries count what is in the page cache, and flush nothing;
* ``no-lanes``: queues take every record for one without a key;
* ``forget-acks``: queues take an acknowledgement for "give it to somebody else", and answer as if it were done.

The second loses data only when unsynced bytes are lost. ``FERRYLINE_TEST_LOSSY_STORAGE=1`` makes kill -9 do that, see
`lossy.py`.
"""

from __future__ import annotations

import os

from msgspec.structs import replace

from ferryline.protocol.messages import RECORDS, STATE
from ferryline.protocol.queue_messages import RELEASE
from ferryline_broker.core.events import Claimed, CommitAsked, DataReceived, Effect, Event, Flush, Flushed, Produced
from ferryline_broker.core.partition import PartitionCore
from ferryline_broker.core.queue_events import Scanned, ScannedBatch, SettleAsked, WindowRead
from ferryline_service.logs import get_logger

_log = get_logger()
_APPENDING = (Produced, DataReceived, Claimed, CommitAsked)


class AckBeforeReplicate(PartitionCore):
    """Acknowledges what only this broker holds."""

    def handle(self, event: Event, now_ms: int) -> list[Effect]:
        out = super().handle(event, now_ms)
        primary = self.primary
        if primary is None:
            return out
        flushed = self.replica.flushed
        primary.sync.committable = lambda log: flushed[log]  # type: ignore[method-assign]
        primary.advance(now_ms)
        more, self.replica.out = self.replica.out, []
        return out + more


class AckBeforeFlush(PartitionCore):
    """Takes what was appended for flushed, and never asks for a flush."""

    def handle(self, event: Event, now_ms: int) -> list[Effect]:
        out = super().handle(event, now_ms)
        if not isinstance(event, _APPENDING):
            return out
        for log in (RECORDS, STATE):
            if any(isinstance(effect, Flush) and effect.log == log for effect in out):
                out = [effect for effect in out if not (isinstance(effect, Flush) and effect.log == log)]
                out += super().handle(Flushed(log, self.log_end[log]), now_ms)
        return out


def _laneless(one: Scanned | ScannedBatch) -> Scanned | ScannedBatch:
    return replace(one, lane=None) if isinstance(one, Scanned) else replace(one, lanes=[None] * len(one.lanes))


class NoLanes(PartitionCore):
    """Lets the records of one key overtake each other."""

    def handle(self, event: Event, now_ms: int) -> list[Effect]:
        if isinstance(event, WindowRead):
            event = replace(event, records=[_laneless(one) for one in event.records])
        return super().handle(event, now_ms)


class ForgetAcks(PartitionCore):
    """Delivers again what was acknowledged."""

    def handle(self, event: Event, now_ms: int) -> list[Effect]:
        if isinstance(event, SettleAsked):
            event = replace(event, items=[replace(item, action=RELEASE) for item in event.items])
        return super().handle(event, now_ms)


KINDS: dict[str, type[PartitionCore]] = {
    "ack-before-replicate": AckBeforeReplicate,
    "ack-before-flush": AckBeforeFlush,
    "no-lanes": NoLanes,
    "forget-acks": ForgetAcks,
}


def core_class() -> type[PartitionCore]:
    """The class of partition cores to run. Raises ValueError for sabotage that is unknown or not allowed."""
    kind = os.environ.get("FERRYLINE_SABOTAGE", "")
    if not kind:
        return PartitionCore
    check_allowed("FERRYLINE_SABOTAGE")
    if kind not in KINDS:
        raise ValueError(f"FERRYLINE_SABOTAGE={kind[:50]!r} is not one of {', '.join(KINDS)}")
    _log.critical("SABOTAGE: this broker breaks its promises", kind=kind)
    return KINDS[kind]


def lossy_storage() -> bool:
    """Should unsynced bytes die with the process? Raises ValueError if it is asked for and not allowed."""
    if os.environ.get("FERRYLINE_TEST_LOSSY_STORAGE", "") != "1":
        return False
    check_allowed("FERRYLINE_TEST_LOSSY_STORAGE")
    _log.critical("TEST STORAGE: unsynced bytes are kept in memory; kill -9 is a power cut")
    return True


def check_allowed(name: str) -> None:
    """Raise ValueError unless breaking things on purpose is allowed here."""
    if os.environ.get("FERRYLINE_ALLOW_SABOTAGE", "") != "1":
        raise ValueError(f"{name} is for proofs only; set FERRYLINE_ALLOW_SABOTAGE=1 to allow it")
