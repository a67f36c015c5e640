"""Compare the copies of a partition: `Auditor`. Each broker reads its own disk and answers with digests.

Copies must agree from the highest log start up to the lowest high watermark; what only some of them are known to have
is compared among those, and what only one has is still checked against its checksums. A difference is narrowed down to
the first batch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from ferryline.calls import BROKER_ANSWER_S, ask_broker
from ferryline.core.retry import told_ms
from ferryline.protocol.errors import FerrylineError, Throttled
from ferryline.protocol.metadata import PartitionMeta

if TYPE_CHECKING:
    from ferryline.client import Client

LOGS = ("records", "state")
DAMAGED, DIFFERS, UNCHECKED = "damaged", "differs", "not checked"
ANSWER_BYTES = 64 * 1024 * 1024  # of log that one request reads
GONE_MAX = 20  # times that retention may overtake a walk before it is given up

Progress = Callable[[int], None]  # bytes just checked


@dataclass(frozen=True)
class Finding:
    """One copy that is not as it should be. ``differs``: every checksum holds, yet copies hold different batches."""

    topic: str
    partition: int
    log: str
    broker: int
    kind: str
    offset: int = -1
    file: str = ""
    position: int = -1
    reason: str = ""

    def sentence(self) -> str:
        """For people."""
        where = f"{self.topic}/{self.partition} on broker {self.broker}"
        if self.kind == UNCHECKED:
            return f"{where} was not checked: {self.reason}"
        place = f"{self.file} position {self.position}" if self.position >= 0 else self.file
        at = f", {place}" if place else ""
        return f"{where} {self.kind}: {self.log} log, offset {self.offset}{at}: {self.reason}"


@dataclass
class Checked:
    """What was looked at in one partition, and what was found."""

    topic: str
    part: PartitionMeta
    bytes: int = 0
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)  # log -> offsets compared among all copies
    copies: list[int] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def wrong(self, broker: int) -> bool:
        return any(finding.broker == broker for finding in self.findings)

    def row(self) -> dict[str, Any]:
        start, end = self.spans.get(LOGS[0], (0, 0))
        bad = [finding for finding in self.findings if finding.kind != UNCHECKED]
        state = ", ".join(f"{finding.kind} on {finding.broker}" for finding in bad)
        if not state:
            state = "agree" if len(self.copies) > 1 else "sound, one copy"
            state += "".join(f"; {f.broker} not checked" for f in self.findings)
        return {
            "topic": self.topic,
            "partition": self.part.partition,
            "copies": self.copies,
            "from": start,
            "up_to": end,
            "bytes": self.bytes,
            "state": state,
        }


class Brokers:
    """Requests to the brokers of a cluster."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def ask(self, broker: int, method: str, path: str, body: Any = None, **params: Any) -> dict[str, Any]:
        """The answer; a broker that lets no more in is asked again when it says. Raises FerrylineError."""
        end = asyncio.get_running_loop().time() + BROKER_ANSWER_S
        while True:
            try:
                return await self._once(broker, method, path, body, params)
            except Throttled as error:
                pause_s = told_ms(error) / 1000
                if not pause_s or asyncio.get_running_loop().time() + pause_s > end:
                    raise
            await asyncio.sleep(pause_s)

    async def _once(self, broker: int, method: str, path: str, body: Any, params: dict[str, Any]) -> dict[str, Any]:
        data = msgspec.json.encode(body) if body is not None else None
        headers = {"Content-Type": "application/json"} if data is not None else {}
        texts = {name: str(value) for name, value in params.items() if value is not None}
        _, raw = await ask_broker(self._client, broker, method, path, params=texts, data=data, headers=headers)
        answer: dict[str, Any] = msgspec.json.decode(raw)
        return answer


def path_of(part: PartitionMeta) -> str:
    """Of a copy, on the broker that holds it."""
    return f"/v1/replicas/{part.topic_id}/{part.partition}"


class Auditor:
    """Checks partitions one by one. ``trust``: whose copy is right where checksums cannot tell."""

    def __init__(
        self, brokers: Brokers, *, progress: Progress, trust: int = 0, slice_bytes: int = ANSWER_BYTES
    ) -> None:
        self._brokers = brokers
        self._progress = progress
        self._trust = trust
        self._slice_bytes = slice_bytes

    async def check(self, topic: str, part: PartitionMeta) -> Checked:
        """Both logs of one partition on all of its brokers."""
        checked = Checked(topic, part)
        standing: dict[int, dict[str, Any]] = {}
        for broker, answer in (await self._all(part, sorted(part.replicas), "")).items():
            reason = _unusable(answer)
            if reason:
                kind = DAMAGED if isinstance(answer, dict) and answer["log_state"] == "damaged" else UNCHECKED
                checked.findings.append(Finding(topic, part.partition, LOGS[0], broker, kind, reason=reason))
            else:
                assert isinstance(answer, dict)
                standing[broker] = answer
        checked.copies = sorted(standing)
        for log in LOGS:
            await self._check_log(checked, log, {broker: answer["logs"][log] for broker, answer in standing.items()})
        return checked

    async def _check_log(self, checked: Checked, log: str, logs: dict[int, dict[str, int]]) -> None:
        if not logs:
            return
        start = max(one["log_start"] for one in logs.values())
        ends = {broker: one["high_watermark"] for broker, one in logs.items()}
        for broker, one in logs.items():
            if one["log_start"] < start:
                await self._compare(checked, log, [broker], one["log_start"], min(start, ends[broker]))
        checked.spans[log] = (start, max(start, min(ends.values())))
        at = start
        for end in sorted(set(ends.values())):
            if end > at:
                together = [broker for broker in sorted(ends) if ends[broker] >= end and not checked.wrong(broker)]
                await self._compare(checked, log, together, at, end)
                at = end

    async def _compare(self, checked: Checked, log: str, brokers: list[int], at: int, below: int) -> None:
        """[at, below) of these copies: block by block, dropping whoever turns out to be wrong."""
        part, gone = checked.part, 0
        while brokers and at < below and gone < GONE_MAX:
            query = {"log": log, "from": at, "below": below, "limit": self._slice_bytes}
            answers = await self._all(part, brokers, "/digests", **query)
            good: dict[int, dict[str, Any]] = {}
            for broker, answer in answers.items():
                if isinstance(answer, FerrylineError):
                    self._unchecked(checked, log, broker, f"{answer}")
                elif answer["wrong"] is not None:
                    wrong = {name: answer["wrong"][name] for name in ("offset", "file", "position", "reason")}
                    found = Finding(checked.topic, part.partition, log, broker, DAMAGED, **wrong)
                    checked.findings.append(found)
                else:
                    good[broker] = answer
                    checked.bytes += answer["bytes"]
                    self._progress(answer["bytes"])
            starts = [answer["logs"][log]["log_start"] for answer in good.values()]
            if any(answer["gone"] for answer in good.values()):  # retention, or a copy that was set aside meanwhile
                gone += 1
                brokers = sorted(good)
                at = max([at, *starts])
                continue
            brokers, following = await self._agreed(checked, log, good)
            if following <= at:
                break  # nothing more is committed here in whole batches
            at = following
        if gone >= GONE_MAX:
            for broker in brokers:
                self._unchecked(checked, log, broker, "its log kept moving away")

    async def _agreed(self, checked: Checked, log: str, good: dict[int, dict[str, Any]]) -> tuple[list[int], int]:
        """Who agrees in the blocks that all have answered for, and the offset where those end."""
        brokers = sorted(good)
        blocks = {broker: [tuple(block) for block in good[broker]["blocks"]] for broker in brokers}
        count = min((len(rows) for rows in blocks.values()), default=0)
        following = -1
        for number in range(count):
            rows = {blocks[broker][number] for broker in brokers}
            if len(rows) > 1:
                start = min(row[0] for row in rows)
                return await self._narrow(checked, log, brokers, start, min(row[1] for row in rows)), -1
            following = next(iter(rows))[1]
        return brokers, following

    async def _narrow(self, checked: Checked, log: str, brokers: list[int], start: int, end: int) -> list[int]:
        """Find the first batch in which copies differ, say whose is wrong, and return the others."""
        query = {"log": log, "from": start, "below": end, "limit": self._slice_bytes, "batches": "true"}
        answers = await self._all(checked.part, brokers, "/digests", **query)
        rows = {
            broker: [tuple(row) for row in answer["batches"]]
            for broker, answer in answers.items()
            if isinstance(answer, dict) and answer["wrong"] is None and not answer["gone"]
        }
        for number in range(max((len(batches) for batches in rows.values()), default=0)):
            sides: dict[tuple[int, ...], list[int]] = {}
            for broker in sorted(rows):
                batches = rows[broker]
                sides.setdefault(batches[number] if number < len(batches) else (), []).append(broker)
            if len(sides) > 1:
                return self._sides(checked, log, start, sides)
        self._unchecked(
            checked, log, brokers[-1], f"digests differ between {start} and {end}, batches do not: ask again"
        )
        return []

    def _sides(self, checked: Checked, log: str, start: int, sides: dict[tuple[int, ...], list[int]]) -> list[int]:
        """Several contents of one batch. Most copies are right, or the one to be trusted; else nobody can tell."""
        total = sum(len(brokers) for brokers in sides.values())
        right = [brokers for brokers in sides.values() if 2 * len(brokers) > total or self._trust in brokers]
        offset = min((side[0] for side in sides if side), default=start)
        for side, brokers in sides.items():
            if right and brokers is right[0]:
                continue
            told = f"epoch {side[2]}, CRC {side[3]:08x}, {side[7]} bytes" if side else "no batch"
            others = sorted(b for rest in sides.values() if rest is not brokers for b in rest)
            reason = f"{told}; brokers {others} hold another" + (
                "" if right else "; --trust BROKER says which is right"
            )
            for broker in brokers:
                finding = Finding(checked.topic, checked.part.partition, log, broker, DIFFERS, offset, reason=reason)
                checked.findings.append(finding)
        return right[0] if right else []

    def _unchecked(self, checked: Checked, log: str, broker: int, reason: str) -> None:
        checked.findings.append(Finding(checked.topic, checked.part.partition, log, broker, UNCHECKED, reason=reason))

    async def _all(
        self, part: PartitionMeta, brokers: list[int], what: str, **query: Any
    ) -> dict[int, dict[str, Any] | FerrylineError]:
        """Ask several brokers at once; refusals are answers."""

        async def one(broker: int) -> dict[str, Any] | FerrylineError:
            try:
                return await self._brokers.ask(broker, "GET", path_of(part) + what, **query)
            except FerrylineError as error:
                return error

        return dict(zip(brokers, await asyncio.gather(*map(one, brokers)), strict=True))


def _unusable(answer: dict[str, Any] | FerrylineError) -> str:
    if isinstance(answer, FerrylineError):
        return str(answer)
    if answer["stopped"]:
        return str(answer["stopped"])
    return "it is being fetched again" if answer["repairing"] else ""
