"""Judge a history: `check`. The findings and what they mean are in `findings`.

Linear in the number of records but for sorting acknowledgements by time; memory is about 20 bytes a record
(`lanes`), 40 for each line of acknowledgements and 100 for each commit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ferryline.proof.findings import Findings, Verdict
from ferryline.proof.groups import GroupJudge
from ferryline.proof.history import OK, HistoryError, Op
from ferryline.proof.records import RecordJudge


def check(history: Callable[[], Iterable[Op]]) -> Verdict:
    """The verdict on one history. ``history`` is called twice and must give the same operations both times: outcomes
    have to be known before what was read can be judged.

    Histories of several processes are chained. Their headers must agree. Raises HistoryError.
    """
    findings = Findings()
    records = RecordJudge(findings)
    groups = GroupJudge(findings, records)
    header: tuple[bool, bool, bool] | None = None
    for op in history():
        if op.f in ("attempt", "send"):
            records.send(op)
        elif op.f == "fault":
            findings.fact("faults", 1)
            findings.fault(op.t0, op.t1, op.note)
        elif op.f == "header":
            told = (op.idempotent, op.drained, op.linearizable)
            if header not in (None, told):
                raise HistoryError("histories with different headers do not go together")
            header = told
            records.idempotent, records.drained, records.linearizable = told
        elif op.f == "expired":
            lane = records.lane(op)
            lane.start = max(lane.start, op.offset or 0)
        elif op.f == "watermark" and op.offset is not None:
            lane = records.lane(op)
            lane.high = max(lane.high, op.offset)
    if header is None:
        raise HistoryError("a history begins with its header")
    for op in history():
        if op.f in ("assign", "claim", "release") and op.type == OK:
            records.begin(op)
        elif op.f in ("poll", "replica_read") and op.type == OK:
            records.read(op)
        if (op.group and op.type == OK) or op.f == "commit":
            groups.note(op)
    records.finish()
    groups.finish()
    return findings.verdict()
