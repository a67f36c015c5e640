"""The member core: what a consumer holds, claims and gives up."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from ferryline.core.membership import (
    AssignmentReceived,
    ClaimAnswered,
    ClaimPartition,
    Declare,
    DropPartition,
    Effect,
    MemberCore,
    MemberFenced,
    MemberUnknown,
    OpenPartition,
    Released,
    RevokePartition,
    Subscribed,
    TimePassed,
)
from ferryline.protocol.errors import NotPrimary, StaleMember
from ferryline.protocol.messages import GroupAssignment, GroupHeartbeat, GroupPartition

A, B = ("t", 0), ("t", 1)


class Driver:
    """A member core, and a coordinator that says what a test tells it to say."""

    def __init__(self) -> None:
        self.core = MemberCore("g", "m-1", ("orders",))
        self.sequence = 0
        self.now = 0
        self.declared = self.core.heartbeat()

    def do(self, event: Any) -> list[Effect]:
        effects = self.core.handle(event, self.now)
        for effect in effects:
            if isinstance(effect, Declare):
                self.declared = effect.heartbeat
        return [effect for effect in effects if not isinstance(effect, Declare)]

    def sent(self) -> tuple[int, GroupHeartbeat]:
        self.sequence += 1
        return self.sequence, self.declared

    def answer(
        self,
        assigned: dict[tuple[str, int], int],
        revoked: tuple[tuple[str, int], ...] = (),
        sent: tuple[int, GroupHeartbeat] | None = None,
    ) -> list[Effect]:
        sequence, heartbeat = sent or self.sent()
        return self.do(
            AssignmentReceived(
                GroupAssignment(
                    "m-1",
                    [GroupPartition(*key, generation, b"token") for key, generation in assigned.items()],
                    [GroupPartition(*key, 0) for key in revoked],
                    sequence=sequence,
                ),
                heartbeat,
            )
        )

    def owned(self) -> list[tuple[str, int]]:
        return [(item.topic_id, item.partition) for item in self.declared.owned]

    def open(self, key: tuple[str, int], generation: int = 1) -> None:
        self.answer({key: generation})
        self.do(ClaimAnswered(key, generation, offset=7))


def test_an_assigned_partition_is_claimed_and_then_read_from_the_committed_offset() -> None:
    driver = Driver()
    assert driver.answer({A: 3}) == [ClaimPartition(A, 3, b"token")]
    assert driver.owned() == [A]
    assert driver.core.generation(A) is None
    (opened,) = driver.do(ClaimAnswered(A, 3, offset=41, offset_epoch=2, log_start=5, high_watermark=50))
    assert opened == OpenPartition(A, 3, 41, 2, 5, 50)
    assert driver.core.generation(A) == 3
    assert driver.answer({A: 3}) == []


def test_a_revoked_partition_stays_owned_until_the_application_is_done() -> None:
    driver = Driver()
    driver.open(A)
    assert driver.answer({}, revoked=(A,)) == [RevokePartition(A, 1)]
    assert driver.owned() == [A]
    assert driver.core.generation(A) == 1, "the last commit needs it"
    assert driver.answer({}, revoked=(A,)) == [], "said twice, done once"
    driver.do(Released(A, 1))
    assert driver.owned() == []
    assert driver.core.generation(A) is None


def test_a_partition_that_is_neither_assigned_nor_revoked_is_dropped() -> None:
    driver = Driver()
    driver.open(A)
    assert driver.answer({}) == [DropPartition(A, 1)]
    assert driver.owned() == []


def test_a_partition_revoked_before_its_claim_was_answered_is_free_at_once() -> None:
    driver = Driver()
    driver.answer({A: 1})
    assert driver.answer({}, revoked=(A,)) == [DropPartition(A, 1)]
    assert driver.do(ClaimAnswered(A, 1, offset=0)) == []
    assert driver.owned() == []


def test_a_refused_claim_is_tried_again_after_a_pause() -> None:
    driver = Driver()
    driver.answer({A: 1})
    assert driver.do(ClaimAnswered(A, 1, error=NotPrimary())) == []
    deadline = driver.core.next_deadline_ms()
    assert deadline is not None
    driver.now = deadline
    assert driver.do(TimePassed()) == [ClaimPartition(A, 1, b"token")]
    assert driver.core.next_deadline_ms() is None
    assert driver.owned() == [A]


def test_a_claim_that_a_later_generation_has_overtaken_is_given_up() -> None:
    driver = Driver()
    driver.answer({A: 1})
    assert driver.do(ClaimAnswered(A, 1, error=StaleMember())) == [DropPartition(A, 1)]
    assert driver.owned() == []


def test_a_fenced_partition_is_dropped_and_a_late_answer_does_not_bring_it_back() -> None:
    driver = Driver()
    driver.open(A)
    late = driver.sent()
    assert driver.do(MemberFenced(A, 1)) == [DropPartition(A, 1)]
    assert driver.answer({A: 1}, sent=late) == [], "the coordinator had not heard yet that we gave it up"
    assert driver.answer({A: 2}) == [ClaimPartition(A, 2, b"token")]


def test_the_same_generation_is_taken_again_when_the_coordinator_changed_its_mind_knowingly() -> None:
    driver = Driver()
    driver.open(A)
    driver.answer({}, revoked=(A,))
    driver.do(Released(A, 1))
    assert driver.answer({A: 1}) == [ClaimPartition(A, 1, b"token")], "else it would belong to nobody for ever"


def test_a_higher_generation_of_what_we_hold_is_claimed_anew() -> None:
    driver = Driver()
    driver.open(A)
    assert driver.answer({A: 4}) == [DropPartition(A, 1), ClaimPartition(A, 4, b"token")]
    assert driver.declared.owned == [GroupPartition(*A, 4)]


def test_an_overtaken_answer_changes_nothing() -> None:
    driver = Driver()
    first = driver.sent()
    driver.answer({B: 1})
    assert driver.answer({A: 1}, sent=first) == []
    assert driver.owned() == [B]


def test_no_answer_changes_nothing() -> None:
    driver = Driver()
    driver.open(A)
    driver.now += 10**7
    assert driver.core.next_deadline_ms() is None
    assert driver.do(TimePassed()) == []
    assert driver.owned() == [A]


def test_an_unknown_member_drops_everything_and_joins_anew_with_nothing() -> None:
    driver = Driver()
    driver.open(A)
    driver.answer({A: 1, B: 1})
    assert driver.do(MemberUnknown()) == [DropPartition(A, 1), DropPartition(B, 1)]
    assert driver.owned() == []
    assert driver.answer({A: 2}) == [ClaimPartition(A, 2, b"token")]


def test_a_new_subscription_is_declared_at_once() -> None:
    driver = Driver()
    driver.do(Subscribed(("orders", "returns")))
    assert driver.declared.topics == ["orders", "returns"]


def test_leaving_names_nothing_as_owned() -> None:
    driver = Driver()
    driver.open(A)
    goodbye = driver.core.heartbeat(leave=True)
    assert goodbye.leave
    assert goodbye.owned == []


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_what_is_read_is_always_declared_and_opens_and_drops_alternate(seed: int) -> None:
    """Under any order of answers, claims, revocations and fences, with answers that come late or never."""
    rng = random.Random(seed)
    driver = Driver()
    reading: dict[tuple[str, int], int] = {}
    claims: list[ClaimPartition] = []
    revoking: dict[tuple[str, int], int] = {}
    late: list[tuple[int, GroupHeartbeat]] = []
    generation = 0

    def follow(effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, ClaimPartition):
                claims.append(effect)
            elif isinstance(effect, OpenPartition):
                assert effect.key not in reading
                reading[effect.key] = effect.generation
            elif isinstance(effect, RevokePartition):
                assert reading[effect.key] == effect.generation
                revoking[effect.key] = effect.generation
            elif isinstance(effect, DropPartition):
                reading.pop(effect.key, None)
                revoking.pop(effect.key, None)
        declared = {(item.topic_id, item.partition): item.generation for item in driver.declared.owned}
        for key, held in reading.items():
            assert declared[key] == held, "a partition was read that another member may have been given"

    for _ in range(80):
        match rng.randrange(6):
            case 0 | 1:
                generation += 1
                keys = [key for key in (A, B, ("t", 2)) if rng.random() < 0.6]
                assigned = {key: rng.randint(max(1, generation - 2), generation) for key in keys}
                gone = tuple(key for key in (A, B, ("t", 2)) if key not in assigned and rng.random() < 0.7)
                late.append(driver.sent())
                sent = late.pop(rng.randrange(len(late)))
                follow(driver.answer(assigned, gone, sent))
            case 2:
                if claims:
                    claim = claims.pop(rng.randrange(len(claims)))
                    error = rng.choice([None, None, NotPrimary(), StaleMember()])
                    follow(driver.do(ClaimAnswered(claim.key, claim.generation, 0, error=error)))
            case 3:
                if revoking:
                    key, held = revoking.popitem()
                    reading.pop(key, None)
                    follow(driver.do(Released(key, held)))
            case 4:
                if reading and rng.random() < 0.3:
                    key = rng.choice(sorted(reading))
                    follow(driver.do(MemberFenced(key, reading[key])))
            case _:
                driver.now += rng.choice([1, 20, 600])
                follow(driver.do(TimePassed()))
