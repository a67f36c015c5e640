"""What a judge found: counts and a few examples of each kind, and sentences that a person understands."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

EXAMPLES_MAX = 5
NEARBY_US = 5_000_000  # a fault that ended this long before is still worth naming

# What each finding means. The first table holds broken promises, the second what is only counted.
ERRORS = {
    "lost": "acknowledged, missing below a record that was read",
    "unseen": "acknowledged, above everything that was read after the end of all faults",
    "lost on replica, prefix": "acknowledged, missing on one copy below its first record",
    "lost on replica, middle": "acknowledged, missing on one copy between its records",
    "lost on replica, postfix": "acknowledged, missing on one copy above its last record",
    "duplicate": "one record is stored at several offsets although producers are idempotent",
    "nonmonotonic send": "one producer's records lie in another order than it sent them",
    "external poll skip": "a consumer's next poll began behind a record that it had not been given",
    "internal poll skip": "a poll left out a record between two that it gave",
    "external nonmonotonic poll": "a consumer's next poll went back",
    "internal nonmonotonic poll": "a poll gave records in falling order",
    "phantom": "a record was read that nobody sent",
    "aborted read": "a record was read whose send had been refused for certain",
    "inconsistent offset": "one offset held two different records",
    "real time": "a record that was sent after another's acknowledgement lies below it",
    "stale read": "the primary answered without a record that was acknowledged before it was asked",
    "offset sanity": "an acknowledgement came without a usable offset",
    "K1 two committers": "two members hold, or commit under, one claim of a partition",
    "K1 zombie commit": "a commit was accepted under a claim that a later one had replaced",
    "K2 commit went back": "the committed offset of a group fell",
    "K3 stale start": "a new owner began below the last accepted commit",
    "K5 no convergence": "members of a group did not come to one view within the bound",
    "K6 not processed": "an acknowledged record was given to nobody in the group",
    "K7 commit beyond watermark": "a group committed an offset that did not exist yet",
}
COUNTED = {
    "duplicates": "records at several offsets; producers are not idempotent",
    "recovered": "records with an unknown outcome that turned out to be stored",
    "expired": "acknowledged records that retention removed before anybody read them",
    "redelivered": "records that a group was given again",
    "zombie unknown": "commits under a replaced claim whose outcome is unknown",
    "zombie refused": "commits under a replaced claim that were refused, as they must be",
}


@dataclass(frozen=True)
class Verdict:
    """What the run came to. ``facts`` are totals, ``errors`` broken promises, ``counted`` what is not an error."""

    facts: dict[str, int]
    errors: dict[str, int]  # only kinds that were found
    counted: dict[str, int]
    examples: dict[str, list[str]] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        """Whether every promise was kept."""
        return not self.errors

    @property
    def counts(self) -> dict[str, int]:
        """Every finding and total by name."""
        return {**self.facts, **self.counted, **self.errors}

    def explain(self) -> list[str]:
        """The verdict in sentences."""
        told = ", ".join(f"{count:,} {name}" for name, count in self.facts.items())
        lines = [f"{told}: {'every promise was kept' if self.good else 'PROMISES WERE BROKEN'}"]
        for name, count in self.errors.items():
            lines.append(f"{name}: {count:,} ({ERRORS[name]})")
            lines += [f"    {example}" for example in self.examples.get(name, [])]
        lines += [f"{name}: {count:,} ({COUNTED[name]})" for name, count in self.counted.items() if count]
        return lines

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "good": self.good,
            "facts": self.facts,
            "errors": self.errors,
            "counted": self.counted,
            "examples": self.examples,
        }


class Findings:
    """Collects; the judges write, `verdict` reads."""

    def __init__(self) -> None:
        self.facts: dict[str, int] = {}
        self._counts: dict[str, int] = {}
        self._examples: dict[str, list[str]] = {}
        self._faults: list[tuple[int, int, str]] = []

    def fact(self, name: str, count: int) -> None:
        """Add to a total."""
        self.facts[name] = self.facts.get(name, 0) + count

    def fault(self, t0: int, t1: int, note: str) -> None:
        """Something was done to the cluster."""
        self._faults.append((t0, max(t0, t1), note))

    def add(self, name: str, count: int = 1, example: str = "", at_us: int = 0) -> None:
        """``count`` more of a kind. The first few examples are kept, with the faults around ``at_us``."""
        assert name in ERRORS or name in COUNTED, name
        self._counts[name] = self._counts.get(name, 0) + count
        if example and self.wants(name):
            self._examples.setdefault(name, []).append(example + self._around(at_us))

    def wants(self, name: str) -> bool:
        """Whether another example of this kind would be kept: making one may be costly."""
        return len(self._examples.get(name, ())) < EXAMPLES_MAX

    def _around(self, at_us: int) -> str:
        near = [(t0, note) for t0, t1, note in self._faults if at_us and t0 <= at_us <= t1 + NEARBY_US]
        told = "; ".join(f"{note} {(at_us - t0) / 1e6:.1f} s before" for t0, note in sorted(near)[-2:])
        return f" ({told})" if told else ""

    def verdict(self) -> Verdict:
        """What was found so far."""
        errors = {name: self._counts[name] for name in ERRORS if self._counts.get(name)}
        counted = {name: self._counts.get(name, 0) for name in COUNTED}
        return Verdict(dict(self.facts), errors, counted, {name: self._examples.get(name, []) for name in errors})


def seconds(us: int) -> str:
    """A moment, for sentences."""
    return f"{us / 1e6:.3f} s"


def listed(items: Iterable[object]) -> str:
    """Names, for sentences."""
    return ", ".join(str(item) for item in items)
