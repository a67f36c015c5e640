"""How a session between nodes ends when the connection breaks between a ping and its pong."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import pytest
from structlog.testing import capture_logs

from ferryline.protocol.messages import HelloOk
from ferryline_service.node import NodeConnection
from tests.polling import poll


class BrokenSocket:
    """A WebSocket whose peer died after its last ping: answering that ping fails inside ``receive``."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self._writer = SimpleNamespace(transport=SimpleNamespace(is_closing=lambda: True))

    async def receive(self) -> aiohttp.WSMessage:
        raise self.error

    async def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("error", "foreseen"),
    [
        (aiohttp.ClientConnectionResetError("Cannot write to closing transport"), True),
        (ConnectionResetError(), True),
        (KeyError("a mistake of ours"), False),
    ],
)
async def test_a_connection_that_breaks_ends_the_session_once_and_only_a_mistake_is_shouted_about(
    error: Exception, foreseen: bool
) -> None:
    ended: list[NodeConnection] = []
    with capture_logs() as logs:
        connection = NodeConnection(cast(Any, BrokenSocket(error)), "https://peer", HelloOk(0, ""), None)
        connection.on_close = ended.append
        connection._tasks.append(asyncio.get_running_loop().create_task(connection._read()))
        await poll(lambda: ended)
        await asyncio.gather(*connection._tasks)
    assert ended == [connection]
    assert connection.closed
    assert any(entry["log_level"] == "error" for entry in logs) is not foreseen
