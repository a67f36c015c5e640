"""Positions: where "start", "end" or a moment are, and what a group has committed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ferryline.message import At
from ferryline.protocol.errors import FerrylineError
from ferryline.protocol.frames import Kind
from ferryline.protocol.messages import (
    Commit,
    CommitEntry,
    Committed,
    CommittedAnswer,
    CommittedResult,
    Offsets,
    OffsetsAnswer,
    OffsetsEntry,
    OffsetsResult,
)
from ferryline.requests import Key, ask_primaries

if TYPE_CHECKING:
    from ferryline.client import Client

Goal = int | str | At


async def look_up(client: Client, asked: Mapping[Key, Goal], timeout: float) -> dict[Key, OffsetsResult]:
    """The offset of each goal, with log start and high watermark. Raises the first error."""

    def header(keys: list[Key]) -> Offsets:
        return Offsets([_entry(key, asked[key]) for key in keys])

    outcomes = await ask_primaries(client, Kind.OFFSETS, asked, header, OffsetsAnswer, timeout=timeout)
    found: dict[Key, OffsetsResult] = _all_good(outcomes)
    for key, goal in asked.items():
        if isinstance(goal, int):
            found[key] = OffsetsResult(*key, goal, found[key].log_start, found[key].high_watermark)
    return found


async def committed(client: Client, group: str, keys: list[Key], timeout: float) -> dict[Key, CommittedResult]:
    """What the group has committed (offset -1: nothing). Raises the first error."""

    def header(asked: list[Key]) -> Committed:
        return Committed(group, [*asked])

    return _all_good(await ask_primaries(client, Kind.COMMITTED, keys, header, CommittedAnswer, timeout=timeout))


async def behind(client: Client, positions: Mapping[Key, int], timeout: float) -> dict[Key, int]:
    """How many committed records there are from each position on. Raises the first error."""

    def header(asked: list[Key]) -> Offsets:
        return Offsets([OffsetsEntry(*key, "end", counted_from=positions[key]) for key in asked])

    outcomes = await ask_primaries(client, Kind.OFFSETS, positions, header, OffsetsAnswer, timeout=timeout)
    found: dict[Key, OffsetsResult] = _all_good(outcomes)
    return {key: one.records if one.records >= 0 else max(0, one.offset - positions[key]) for key, one in found.items()}


def lag_of(result: CommittedResult) -> int:
    """How many committed records the group has not read."""
    return result.lag if result.lag >= 0 else result.high_watermark - max(result.offset, result.log_start)


async def commit_alone(
    client: Client, group: str, offsets: Mapping[Key, tuple[int, bool]], metadata: str, timeout: float
) -> dict[Key, CommittedResult | FerrylineError]:
    """Commit (offset, reset) for a reader that is no member: generation 0, good only while no member has claimed."""

    def header(keys: list[Key]) -> Commit:
        entries = [CommitEntry(*key, 0, offsets[key][0], metadata, offsets[key][1]) for key in keys]
        return Commit(group, "", entries)

    return await ask_primaries(client, Kind.COMMIT, offsets, header, CommittedAnswer, timeout=timeout)


def _entry(key: Key, goal: Goal) -> OffsetsEntry:
    if isinstance(goal, At):
        return OffsetsEntry(*key, "time", goal.timestamp_ms)
    return OffsetsEntry(*key, goal if isinstance(goal, str) else "start")


def _all_good(outcomes: dict[Key, Any]) -> dict[Key, Any]:
    for outcome in outcomes.values():
        if isinstance(outcome, FerrylineError):
            raise outcome
    return outcomes
