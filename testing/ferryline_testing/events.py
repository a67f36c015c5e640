"""What happened in a cluster, and when: the same lines for the same seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

EVENTS_MAX = 100_000  # the oldest go first
_LEFT_OUT = ("level", "topic_id", "exc_info", "stack_info", "where", "story", "service")


@dataclass(frozen=True, slots=True)
class Event:
    """``after_s``: since the cluster's start. ``who``: a process, or "test"."""

    at: datetime
    after_s: float
    who: str
    what: str

    def __str__(self) -> str:
        return f"{self.after_s:12.3f}  {self.who:<12} {self.what}"


class EventLog:
    """A sequence of `Event`, oldest first."""

    def __init__(self, now: Callable[[], tuple[datetime, float]], topic_name: Callable[[str], str]) -> None:
        self._now, self._topic_name = now, topic_name
        self._events: list[Event] = []

    def __iter__(self) -> Iterator[Event]:
        return iter(self._events)

    def __len__(self) -> int:
        return len(self._events)

    def __getitem__(self, index: int) -> Event:
        return self._events[index]

    @property
    def last_s(self) -> float:
        return self._events[-1].after_s if self._events else 0.0

    def tell(self, who: str, what: str) -> None:
        at, after_s = self._now()
        self._events.append(Event(at, after_s, who, what))
        if len(self._events) > EVENTS_MAX:
            del self._events[: EVENTS_MAX // 10]

    def tell_line(self, who: str, said: str, fields: Mapping[str, Any]) -> None:
        """A log line of a service. Ids of topics become their names."""
        if fields.get("level") == "debug":
            return
        words = [said]
        topic_id = fields.get("topic_id")
        if topic_id:
            words.append(f"topic={self._topic_name(str(topic_id))}")
        words += [f"{name}={value}" for name, value in fields.items() if name not in _LEFT_OUT]
        self.tell(who, " ".join(words))

    def matching(self, text: str, who: str = "") -> list[Event]:
        """Events that contain ``text``, of one process or of all."""
        return [event for event in self._events if text in event.what and who in ("", event.who)]

    def text(self) -> str:
        """One line for each."""
        return "\n".join(map(str, self._events))
