"""A broker's search for the active coordinator: who is asked, who is waited for, what is left open."""

from __future__ import annotations

import asyncio
import time

import pytest

from ferryline.finding import hinted as hinted_for_clients
from ferryline.protocol.errors import ConnectionFailed, CoordinatorStandby
from ferryline_broker.finding import find_active, hinted
from tests.polling import SOON_S


class Session:
    def __init__(self, url: str) -> None:
        self.url = url
        self.closed = False

    async def close(self) -> None:
        self.closed = True


class Coordinators:
    """What each URL does: "active", "standby" (names ``active``), "dead", "stopped" (never answers)."""

    def __init__(self, active: str = "", **kinds: str) -> None:
        self.kinds, self.active = {f"https://{name}": kind for name, kind in kinds.items()}, active
        self.asked: list[str] = []
        self.opened: list[Session] = []
        self.cancelled: list[str] = []

    async def connect(self, url: str) -> Session:
        self.asked.append(url)
        kind = self.kinds.get(url, "dead")
        try:
            await asyncio.sleep(60 if kind == "stopped" else 0)
        except asyncio.CancelledError:
            self.cancelled.append(url)
            raise
        if kind == "standby":
            raise CoordinatorStandby("on standby", active=self.active)
        if kind != "active":
            raise ConnectionFailed(f"{url}: refused")
        self.opened.append(Session(url))
        return self.opened[-1]

    def urls(self) -> list[str]:
        return list(self.kinds)


async def test_a_stopped_coordinator_is_not_waited_for() -> None:
    world = Coordinators(a="stopped", b="standby", c="active")
    began = time.monotonic()
    url, session = await find_active(world.urls(), world.connect)
    assert (url, session.closed) == ("https://c", False)
    assert time.monotonic() - began < SOON_S
    assert world.cancelled == ["https://a"], "nothing goes on behind the back of who asked"


async def test_a_hint_leads_to_a_coordinator_that_was_not_known() -> None:
    world = Coordinators(active="https://hidden", a="standby", b="dead")
    world.kinds["https://hidden"] = "active"
    url, _ = await find_active(["https://a", "https://b"], world.connect)
    assert url == "https://hidden"
    assert world.asked == ["https://a", "https://hidden"]


@pytest.mark.parametrize("kinds", [{"a": "dead"}, {"a": "standby", "b": "standby"}, {"a": "dead", "b": "standby"}])
async def test_a_round_without_success_ends_and_says_why(kinds: dict[str, str]) -> None:
    world = Coordinators(**kinds)
    with pytest.raises((ConnectionFailed, CoordinatorStandby)):
        await asyncio.wait_for(find_active(world.urls(), world.connect), SOON_S)
    assert sorted(world.asked) == sorted(world.urls()), "each once"
    with pytest.raises(ConnectionFailed):
        await find_active([], world.connect)


async def test_two_that_answer_in_the_same_moment_leave_one_session_open() -> None:
    gate = asyncio.Event()
    opened: list[Session] = []

    async def connect(url: str) -> Session:
        await gate.wait()
        opened.append(Session(url))
        return opened[-1]

    searching = asyncio.create_task(find_active(["https://a", "https://b"], connect))
    await asyncio.sleep(0.3)  # both were asked
    gate.set()
    _, kept = await searching
    assert [session for session in opened if not session.closed] == [kept]


async def test_hints_that_lead_in_circles_end() -> None:
    world = Coordinators(active="https://a", a="standby")
    with pytest.raises(CoordinatorStandby):
        await find_active(["https://a"], world.connect)
    assert world.asked == ["https://a"]


@pytest.mark.parametrize("active", ["http://elsewhere", "ftp://x", "", "javascript:1", None, 7])
def test_a_hint_that_is_no_address_of_a_coordinator_is_not_followed(active: object) -> None:
    error = CoordinatorStandby("on standby", active=active)
    assert hinted(error) == ""
    assert hinted_for_clients(error) == ""
    assert hinted(CoordinatorStandby("on standby", active="https://a:1/")) == "https://a:1"
