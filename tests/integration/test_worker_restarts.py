"""A short piece of the campaign on workers, and that it would notice."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration import workers_campaign
from tests.integration.workers_campaign import KEYS, Line, verdict

pytestmark = pytest.mark.process

S = 1_000_000_000


@pytest.mark.timeout(300)
async def test_workers_are_replaced_and_killed_and_nothing_runs_twice_without_a_reason(tmp_path: Path) -> None:
    args = ["--blocked", "0", "--workers", "2", "--rounds", "1", "--kills", "1", "--rate", "50", "--dir", str(tmp_path)]
    for found in await workers_campaign.run(workers_campaign.parser().parse_args(args)):
        wrong = {name: found[name] for name in ("lost", "out_of_order", "unmarked", "not_in_hand")}
        assert not any(wrong.values()), found
        assert found["part"] == "killing" or found["twice"] == 0, found


def test_what_must_not_be_is_counted() -> None:
    """Worker 1 is killed at 5 s. In turn: done twice by the living, in hand of the killed, the same without a mark,
    finished by it long before, lost, and begun before the one before it in its key."""

    def line(at_s: float, pid: int, what: str, number: int, attempt: int = 1) -> Line:
        return Line(int(at_s * S), pid, what, number, attempt)

    journal = [
        line(1, 2, "began", 0), line(1, 2, "ended", 0), line(9, 3, "began", 0, 2), line(9, 3, "ended", 0, 2),
        line(4.9, 1, "began", 1), line(9, 3, "began", 1, 2), line(9, 3, "ended", 1, 2),
        line(4.9, 1, "began", 2), line(9, 3, "began", 2, 1), line(9, 3, "ended", 2, 1),
        line(1, 1, "began", 3), line(1, 1, "ended", 3), line(9, 3, "began", 3, 2), line(9, 3, "ended", 3, 2),
        line(1, 2, "began", 4),
        line(0.5, 2, "began", 1 + KEYS), line(0.6, 2, "ended", 1 + KEYS),
    ]  # fmt: skip
    found = verdict(journal, {0, 1, 2, 3, 4, 1 + KEYS}, {1: 5 * S})
    wrong = {name: found[name] for name in ("twice", "not_in_hand", "unmarked", "lost", "out_of_order")}
    assert wrong == {"twice": 4, "not_in_hand": 2, "unmarked": 1, "lost": 1, "out_of_order": 1}
