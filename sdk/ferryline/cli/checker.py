"""Judge a run from outside: what was sent, what was acknowledged, what came out, in which order.

Pure and independent of the client: it is fed facts and knows nothing of batches, brokers or groups. Each record is
known by the number of its key and its place among the records of that key, (key, n), n from 0 without gaps; its value
carries both, so that a record that nobody sent is recognised.

=================  ==========================================================================  =======
lost               acknowledged and never received                                             error
out of order       first received after a later record of its key, or stored below it          error
stored twice       received at two different offsets                                           error
phantom            received, never sent                                                        error
aborted read       received although its send was refused for certain                          error
moved              received at another offset than the acknowledgement named                   error
redelivered        received again at the same offset (at-least-once, after a change of owner)  counted
unknown            neither acknowledged nor refused; may or may not be there                   counted
=================  ==========================================================================  =======
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

PENDING, ACKED, REFUSED = range(3)
EXAMPLES_MAX = 5
_NO_OFFSET = -1


@dataclass(frozen=True)
class Verdict:
    """What the run came to. ``examples`` shows the first few of each kind of error."""

    sent: int = 0
    acknowledged: int = 0
    refused: int = 0
    unknown: int = 0
    received: int = 0  # distinct records
    lost: int = 0
    out_of_order: int = 0
    stored_twice: int = 0
    phantom: int = 0
    aborted_read: int = 0
    moved: int = 0
    redelivered: int = 0
    examples: dict[str, list[str]] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        """Nothing acknowledged was lost, nothing is out of order, and nothing is there that should not be."""
        errors = (self.lost, self.out_of_order, self.stored_twice, self.phantom, self.aborted_read, self.moved)
        return not any(errors)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "good": self.good}


class _Key:
    """One key: outcome and acknowledged offset by n; deliveries in order of arrival."""

    __slots__ = ("acked_at", "delivered_at", "delivered_n", "outcome")

    def __init__(self) -> None:
        self.outcome = bytearray()
        self.acked_at = array("q")
        self.delivered_n = array("q")
        self.delivered_at = array("q")


class Ledger:
    """The facts of one run. About 33 bytes a record; every method is O(1), `verdict` is O(n log n)."""

    def __init__(self, keys: int) -> None:
        self._keys = [_Key() for _ in range(keys)]
        self.sent = 0
        self.acknowledged = 0
        self.refused = 0
        self.deliveries = 0
        self._sends_of = self  # whose counts of sends are true
        self._strangers = 0
        self._stranger_examples: list[str] = []

    # -- facts ---------------------------------------------------------------------------------------

    def next_n(self, key: int) -> int:
        """A record of ``key`` is about to be sent: returns its n."""
        entry = self._keys[key]
        entry.outcome.append(PENDING)
        entry.acked_at.append(_NO_OFFSET)
        self.sent += 1
        return len(entry.outcome) - 1

    def acked(self, key: int, n: int, offset: int) -> None:
        """The send returned ``offset``."""
        entry = self._keys[key]
        assert entry.outcome[n] == PENDING, f"key {key} record {n} was settled twice"
        entry.outcome[n] = ACKED
        entry.acked_at[n] = offset
        self.acknowledged += 1

    def refused_for_certain(self, key: int, n: int) -> None:
        """The send raised a *definite* error: the record must never appear. Indefinite errors are not reported."""
        entry = self._keys[key]
        assert entry.outcome[n] == PENDING, f"key {key} record {n} was settled twice"
        entry.outcome[n] = REFUSED
        self.refused += 1

    def received(self, key: int, n: int, offset: int) -> None:
        """A consumer was handed the record. Call in the order in which it happened, over all consumers."""
        self.deliveries += 1
        if not 0 <= key < len(self._keys):
            self.stranger(f"key {key} record {n} at {offset}")
            return
        entry = self._keys[key]
        entry.delivered_n.append(n)
        entry.delivered_at.append(offset)

    def stranger(self, what: str) -> None:
        """Something was received that no record of this run looks like."""
        self._strangers += 1
        if len(self._stranger_examples) < EXAMPLES_MAX:
            self._stranger_examples.append(what)

    def second_reader(self) -> Ledger:
        """A ledger of the same sends with deliveries of its own: for another reader of the same records."""
        other = Ledger(0)
        for entry in self._keys:
            twin = _Key()
            twin.outcome, twin.acked_at = entry.outcome, entry.acked_at
            other._keys.append(twin)
        other._sends_of = self
        return other

    # -- judgement -----------------------------------------------------------------------------------

    def acknowledged_by_key(self) -> list[int]:
        return [entry.outcome.count(ACKED) for entry in self._keys]

    def missing(self) -> int:
        """How many acknowledged records have not been received yet."""
        return sum(self._missing_of(entry) for entry in self._keys)

    @staticmethod
    def _missing_of(entry: _Key) -> int:
        waiting = bytearray(entry.outcome)
        for n in entry.delivered_n:
            if 0 <= n < len(waiting):
                waiting[n] = PENDING
        return waiting.count(ACKED)

    def verdict(self) -> Verdict:
        """Judge the run as it stands. Call when it has ended: what is under way counts as lost or unknown."""
        judge = _Judge()
        judge.count("phantom", self._strangers, self._stranger_examples)
        for number, entry in enumerate(self._keys):
            judge.key(number, entry)
        sends = self._sends_of
        return Verdict(
            sent=sends.sent,
            acknowledged=sends.acknowledged,
            refused=sends.refused,
            unknown=sends.sent - sends.acknowledged - sends.refused,
            examples=judge.examples,
            **judge.counts,
        )


class _Judge:
    def __init__(self) -> None:
        kinds = ("received", "lost", "out_of_order", "stored_twice", "phantom", "aborted_read", "moved", "redelivered")
        self.counts = dict.fromkeys(kinds, 0)
        self.examples: dict[str, list[str]] = {}

    def count(self, kind: str, number: int, examples: Iterable[str] = ()) -> None:
        self.counts[kind] += number
        for example in examples:
            shown = self.examples.setdefault(kind, [])
            if len(shown) < EXAMPLES_MAX:
                shown.append(example)

    def key(self, key: int, entry: _Key) -> None:
        first_at = array("q", [_NO_OFFSET]) * len(entry.outcome)  # offset of the first delivery of each n
        newest = -1
        for n, offset in zip(entry.delivered_n, entry.delivered_at, strict=True):
            if not 0 <= n < len(entry.outcome):
                self.count("phantom", 1, [f"key {key} record {n} at {offset}"])
                continue
            if first_at[n] != _NO_OFFSET:
                kind = "redelivered" if first_at[n] == offset else "stored_twice"
                self.count(kind, 1, [] if kind == "redelivered" else [f"key {key} record {n}: {first_at[n]}, {offset}"])
                continue
            first_at[n] = offset
            self._first(key, entry, n, offset, newest)
            newest = max(newest, n)
        self._stored_order(key, first_at)
        for n, outcome in enumerate(entry.outcome):
            if outcome == ACKED and first_at[n] == _NO_OFFSET:
                self.count("lost", 1, [f"key {key} record {n}, acknowledged at {entry.acked_at[n]}"])

    def _first(self, key: int, entry: _Key, n: int, offset: int, newest: int) -> None:
        self.counts["received"] += 1
        if n < newest:
            self.count("out_of_order", 1, [f"key {key} record {n} came after {newest}"])
        if entry.outcome[n] == REFUSED:
            self.count("aborted_read", 1, [f"key {key} record {n} at {offset}"])
        elif entry.outcome[n] == ACKED and entry.acked_at[n] != offset:
            self.count("moved", 1, [f"key {key} record {n}: acknowledged at {entry.acked_at[n]}, read at {offset}"])

    def _stored_order(self, key: int, first_at: array[int]) -> None:
        """Offsets must rise with n also where the order of arrival cannot show it."""
        highest = _NO_OFFSET
        for n, offset in enumerate(first_at):
            if offset == _NO_OFFSET:
                continue
            if offset <= highest:
                self.count("out_of_order", 1, [f"key {key} record {n} is stored at {offset}, below {highest}"])
            highest = max(highest, offset)


class Gaps:
    """Longest time without an acknowledgement, per lane (a key or a partition), from a moment on."""

    def __init__(self, lanes: int) -> None:
        self._last: list[float | None] = [None] * lanes
        self._since = float("inf")
        self.longest: list[float] = [0.0] * lanes

    def start(self, now: float) -> None:
        """Count gaps that end after ``now`` (one that began before counts whole)."""
        self._since = now
        self.longest = [0.0] * len(self.longest)

    def acknowledged(self, lane: int, now: float) -> None:
        last = self._last[lane]
        self._last[lane] = now
        if last is not None and now >= self._since and now - last > self.longest[lane]:
            self.longest[lane] = now - last

    def worst(self) -> float:
        return max(self.longest, default=0.0)


def percentile(values: Iterable[float], share: float) -> float:
    """Nearest-rank percentile; 0.0 of nothing."""
    ordered = sorted(values)
    if not ordered:
        return 0.0
    return ordered[max(0, math.ceil(len(ordered) * share) - 1)]
