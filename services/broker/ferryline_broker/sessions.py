"""What this broker remembers of one session."""

from __future__ import annotations

from ferryline_broker.outbox import DataOutbox
from ferryline_service.server_session import ServerSession


class ClientState:
    """State of a client's session, in ``ServerSession.state``."""

    __slots__ = ("entries", "parked", "produce_bytes", "rotation", "session", "watched")

    def __init__(self, session: ServerSession) -> None:
        self.session = session
        self.produce_bytes = 0  # of batches that are not settled yet
        self.parked = 0  # fetches that wait
        self.entries = 0  # of those, all together
        self.watched = False  # is there a close callback for them?
        self.rotation = 0  # where the next fetch begins among its entries, so that none starves


class PeerState:
    """State of a session that another broker opened to fetch from here. ``number`` is the core's ``session``."""

    __slots__ = ("number", "outbox")

    def __init__(self, number: int, outbox: DataOutbox) -> None:
        self.number = number
        self.outbox = outbox


def state_of(session: ServerSession) -> ClientState:
    state = session.state
    if type(state) is not ClientState:
        assert state is None, "a broker's session does not carry client requests"
        state = session.state = ClientState(session)
    return state
