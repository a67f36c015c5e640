"""Changes that come in frames, for the audit log: told when they are answered, because only then it is known how they
ended. Over REST the middleware tells them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ferryline.protocol.access import GROUP
from ferryline_broker.core.events import Bytes
from ferryline_broker.ports import Asker
from ferryline_broker.view import ClusterView
from ferryline_service.access.caller import Caller
from ferryline_service.server_session import ServerSession


class ToldAsker:
    """A session that changes a group: it is answered as it would be, and the log hears of it."""

    def __init__(self, session: ServerSession, action: str, name: str, **details: Any) -> None:
        self._session = session
        self._action = action
        self._name = name
        self._details = details

    @property
    def caller(self) -> Caller:
        caller: Caller = self._session.caller
        return caller

    @property
    def closed(self) -> bool:
        return self._session.closed

    @property
    def close_callbacks(self) -> list[Callable[[Any], None]]:
        return self._session.close_callbacks

    def answer(
        self, kind: int, correlation: int, header: Any, parts: Sequence[Bytes] = (), *, more: bool = False
    ) -> None:
        errors = [result.error for result in header.results if result.error is not None]
        code = errors[0].code if errors and len(errors) == len(header.results) else ""
        partitions = len(header.results) - len(errors)
        self._session.note_changed(
            self._action, GROUP, self._name, code, **self._details, partitions=partitions, refused=len(errors)
        )
        self._session.answer(kind, correlation, header, parts, more=more)

    def flush(self) -> None:
        self._session.flush()


def told(
    session: ServerSession, view: ClusterView, action: str, group: str, topic_ids: Iterable[str], **details: Any
) -> Asker:
    """Whoever answers ``session`` about a change of a group, by way of the audit log."""
    topics = {topic_id: view.topic(topic_id) for topic_id in topic_ids}
    names = sorted(topic.name if topic is not None else topic_id for topic_id, topic in topics.items())
    return ToldAsker(session, action, "/".join([group, *names[:1]]), **details, topics=len(names))
