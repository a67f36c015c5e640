"""Dedupe state of one partition: which batch of which producer comes next. Pure; rebuilt from the log.

Every replica can build the table from the batch headers alone, so a promoted secondary refuses the same duplicates as
the primary did.
"""

from __future__ import annotations

import msgspec

from ferryline.protocol.limits import IN_FLIGHT_MAX
from ferryline.protocol.records import NO_PRODUCER, BatchHeader

SEQUENCE_WRAP = 2**31  # base_sequence counts records and wraps, as in Kafka
PRODUCERS_MAX = 100_000  # per partition; the longest idle ones go first


class ProducerBatch(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One batch that a producer had appended: sequences count records."""

    base_sequence: int
    record_count: int
    base_offset: int

    @property
    def next_sequence(self) -> int:
        return (self.base_sequence + self.record_count) % SEQUENCE_WRAP


class ProducerState(msgspec.Struct, array_like=True):
    """Last batches of one producer, oldest first, at most IN_FLIGHT_MAX. ``timestamp_ms``: of its last batch."""

    epoch: int
    timestamp_ms: int
    batches: list[ProducerBatch]


class Verdict(msgspec.Struct, frozen=True, gc=False):
    """``error`` refuses the batch (an error code); ``duplicate`` is where the same batch already stands."""

    error: str = ""
    message: str = ""
    duplicate: ProducerBatch | None = None


ACCEPTED = Verdict()
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[tuple[int, ProducerState]])


class ProducerTable:
    """Producer id -> state. `check` decides, `observe` records what was appended, in log order."""

    __slots__ = ("_states",)

    def __init__(self) -> None:
        self._states: dict[int, ProducerState] = {}

    def __len__(self) -> int:
        return len(self._states)

    def check(self, header: BatchHeader) -> Verdict:
        """May this batch be appended now? Changes nothing."""
        if header.producer_id == NO_PRODUCER:
            return ACCEPTED
        state = self._states.get(header.producer_id)
        sequence = header.base_sequence
        if state is None or header.producer_epoch > state.epoch:
            if sequence == 0:
                return ACCEPTED
            code = "UNKNOWN_PRODUCER" if state is None else "OUT_OF_ORDER_SEQUENCE"
            return Verdict(code, f"producer epoch {header.producer_epoch} begins with sequence {sequence}, not 0")
        if header.producer_epoch < state.epoch:
            return Verdict("PRODUCER_FENCED", f"producer epoch {header.producer_epoch} is below {state.epoch}")
        last = state.batches[-1]
        if sequence == last.next_sequence:
            return ACCEPTED
        for batch in state.batches:
            if batch.base_sequence == sequence and batch.record_count == header.record_count:
                return Verdict(duplicate=batch)
        return Verdict("OUT_OF_ORDER_SEQUENCE", f"sequence {sequence} does not follow; expected {last.next_sequence}")

    def observe(self, header: BatchHeader) -> None:
        """A batch was appended (or found in the log). Control batches and batches without producer leave no trace."""
        if header.producer_id == NO_PRODUCER or header.is_control:
            return
        batch = ProducerBatch(header.base_sequence, header.record_count, header.base_offset)
        state = self._states.pop(header.producer_id, None)
        if state is None or header.producer_epoch > state.epoch:
            state = ProducerState(header.producer_epoch, header.max_timestamp, [batch])
        else:
            state.batches.append(batch)
            state.timestamp_ms = header.max_timestamp
            del state.batches[:-IN_FLIGHT_MAX]
        self._states[header.producer_id] = state  # re-inserted: dict order is order of last use
        if len(self._states) > PRODUCERS_MAX:
            del self._states[next(iter(self._states))]

    def snapshot(self) -> bytes:
        return _encoder.encode(list(self._states.items()))

    @classmethod
    def restore(cls, snapshot: bytes) -> ProducerTable:
        table = cls()
        if snapshot:
            table._states = dict(_decoder.decode(snapshot))
        return table
