"""What a broker answers, as JSON Schemas. Tests hold real answers against them."""

from __future__ import annotations

from ferryline.protocol.metadata import MetadataAnswer
from ferryline_broker.log.replica_store import LOGS
from ferryline_service.schemas import (
    BYTES,
    COUNT,
    FLAG,
    TEXT,
    WHOLE,
    Schema,
    component,
    nullable,
    of_struct,
    one_of,
    several,
    shape,
    table,
)

_MAYBE_BYTES = nullable(BYTES)
_RECORD: dict[str, Schema] = {
    "timestamp_ms": WHOLE,
    "key": _MAYBE_BYTES,
    "value": _MAYBE_BYTES,
    "headers": table(_MAYBE_BYTES),
}
_ELSEWHERE = shape({"primary": COUNT, "primary_url": TEXT}, partition=COUNT, code=TEXT)
_AT: dict[str, Schema] = {"partition": COUNT}
_STORED = {"offset": COUNT, "epoch": COUNT}
_FAILED = {"error": component("Error")}


def _either(always: dict[str, Schema], *ways: dict[str, Schema]) -> Schema:
    return {"oneOf": [shape(**always, **way) for way in ways]}


def _by_partition(*ways: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    done = [shape(optional, **_AT, **way) for way in ways]
    return shape(
        partitions=several({"oneOf": [*done, shape(**_AT, **_FAILED)]}),
        elsewhere=several(_ELSEWHERE),
    )


_COUNTS: dict[str, Schema] = dict.fromkeys(
    ("unsettled", "ready", "waiting", "delayed", "leased", "parked", "dying"), COUNT
)
_STATS: dict[str, Schema] = {
    "start": COUNT,
    "high_watermark": COUNT,
    "ordering": TEXT,
    "paused": FLAG,
    "scanned": COUNT,
    "settled_above_start": COUNT,
    "members": table(COUNT),
    **_COUNTS,
}
_TOLD: dict[str, Schema] = {
    "history": several(shape(attempt=COUNT, reason=TEXT, detail=TEXT)),
    "member": TEXT,
    "leased_for_ms": WHOLE,
    "lease_ends_in_ms": WHOLE,
    "behind": COUNT,
    "behind_state": TEXT,
    "due_in_ms": COUNT,
    "paused": FLAG,
    "why": TEXT,
}
_LOG = shape(log_start=COUNT, log_end=COUNT, high_watermark=COUNT)
_STATUS: dict[str, Schema] = {
    "broker": COUNT,
    "role": TEXT,
    "stopped": {**TEXT, "description": "Why, or nothing."},
    "log_state": TEXT,
    "repairing": FLAG,
    "epoch": COUNT,
    "logs": shape(**dict.fromkeys(LOGS, _LOG)),
}
_PLACE: dict[str, Schema] = {"topic": TEXT, "partition": COUNT}

SCHEMAS: dict[str, Schema] = {
    "Metadata": of_struct(MetadataAnswer),
    "Record": shape(offset=COUNT, **_RECORD),
    "Records": shape(records=several(component("Record")), next_offset=COUNT, high_watermark=COUNT, log_start=COUNT),
    "Appended": shape(results=several(_either(_AT, _STORED, _FAILED))),
    "Published": shape(results=several(shape(topics=table(_either(_AT, _STORED, _FAILED))))),
    "Offsets": shape(
        group=TEXT,
        offsets=several(
            shape(
                **_PLACE,
                offset=nullable(COUNT),
                metadata=TEXT,
                generation=COUNT,
                log_start=COUNT,
                high_watermark=COUNT,
                lag=WHOLE,
            )
        ),
        errors=several(shape(**_PLACE, **_FAILED)),
    ),
    "Moved": shape(
        group=TEXT,
        dry_run=FLAG,
        results=several(_either(_PLACE, {"before": nullable(COUNT), "offset": COUNT}, _FAILED)),
    ),
    "Received": shape(
        records=several(shape(partition=COUNT, offset=COUNT, attempts=COUNT, receipt=TEXT, **_RECORD)),
        errors=several(shape(**_AT, **_FAILED)),
        elsewhere=several(_ELSEWHERE),
    ),
    "Settled": shape(results=several(shape(_FAILED, outcome=one_of("done", "stale", "settled", "error")))),
    "Kept": _by_partition({"kept": COUNT}),
    "Peeked": _by_partition({"records": several(shape(offset=COUNT, **_RECORD))}),
    "Stats": _by_partition(_STATS),
    "Explained": _by_partition({"offset": COUNT, "attempts": COUNT, "state": TEXT}, optional=_TOLD),
    "Purged": _by_partition({"purged": COUNT, "below": COUNT}),
    "Paused": _by_partition({"paused": FLAG}),
    "Redriven": _by_partition({"offsets": several(COUNT)}),
    "Deleted": _by_partition({}),
    "Replica": shape(**_STATUS),
    "Digests": shape(
        **_STATUS,
        log=one_of(*LOGS),
        below=COUNT,
        next=COUNT,
        gone=FLAG,
        bytes=COUNT,
        blocks=several({"type": "array"}),
        batches=several({"type": "array"}),
        wrong=nullable(shape(offset=WHOLE, file=TEXT, position=WHOLE, reason=TEXT)),
    ),
    "Certificates": shape(node={"type": "object"}, authorities=several({"type": "object"})),
    "Repairing": shape(partition=TEXT, was_primary=FLAG),
    "LogEnd": shape(log_end=COUNT),
    "LogEnds": shape(log_end=shape(**dict.fromkeys(LOGS, COUNT))),
}
