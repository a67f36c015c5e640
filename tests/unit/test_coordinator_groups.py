"""Groups: assignment, revoke-then-grant, generations, sessions, restarts (K1, K5, K6 of the group checker)."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferryline.protocol.errors import Conflict, InvalidArgument, InvalidName, UnknownGroup, UnknownMember, UnknownTopic
from ferryline.protocol.messages import GroupAssignment, GroupPartition
from ferryline_coordinator.core import events as ev
from ferryline_coordinator.core.assignment import assign
from ferryline_service.claims import claim_token, claim_token_valid
from unit.coordinator_bench import Bench, even

Key = tuple[str, int]

# -- assignment -------------------------------------------------------------------------------------


@given(
    st.dictionaries(st.sampled_from("abc"), st.integers(1, 20), min_size=1),
    st.integers(0, 8),
    st.randoms(use_true_random=False),
)
@settings(max_examples=200, deadline=None)
def test_members_that_want_the_same_differ_by_at_most_one_and_moves_are_minimal(
    partitions: dict[str, int], members: int, rng: random.Random
) -> None:
    names = [f"m{n}" for n in range(members)]
    keys = [(t, n) for t in partitions for n in range(partitions[t])]
    current = {key: rng.choice([*names, "gone"]) for key in keys if rng.random() < 0.8}
    wants = {name: set(partitions) for name in names}
    result = assign(partitions, wants, current)
    if not names:
        assert result == {}
        return
    assert set(result) == set(keys)
    load = Counter(result.values())
    counts = {name: load[name] for name in names}
    assert even(counts)
    # Nobody loses a partition while it is not above its share.
    held = Counter(owner for owner in current.values() if owner in counts)
    total = len(result)
    for name in names:
        lost = sum(1 for key, owner in current.items() if owner == name and result[key] != name)
        assert lost <= max(0, held[name] - total // len(names))
    assert assign(partitions, wants, result) == result


@given(
    st.dictionaries(st.sampled_from("abcd"), st.integers(1, 8), min_size=1),
    st.lists(st.sets(st.sampled_from("abcd")), max_size=6),
    st.randoms(use_true_random=False),
)
@settings(max_examples=200, deadline=None)
def test_with_different_wishes_everything_wanted_has_an_owner_that_wants_it_and_no_single_move_helps(
    partitions: dict[str, int], wishes: list[set[str]], rng: random.Random
) -> None:
    wants = {f"m{n}": topics for n, topics in enumerate(wishes)}
    current = {(t, n): rng.choice([*wants, "gone"]) for t in partitions for n in range(partitions[t])}
    result = assign(partitions, wants, current)
    wanted = {t for t in partitions if any(t in topics for topics in wishes)}
    assert set(result) == {(t, n) for t in wanted for n in range(partitions[t])}
    load = Counter(result.values())
    for (topic, _), owner in result.items():
        assert topic in wants[owner]
        assert all(load[other] >= load[owner] - 1 for other, topics in wants.items() if topic in topics)
    assert assign(partitions, wants, result) == result


# -- a group on the bench ---------------------------------------------------------------------------


class Member:
    """A well-behaved member: gives up what it is told to, holds what it is given."""

    def __init__(self, bench: Bench, name: str, topics: list[str], **fields: Any) -> None:
        self.bench, self.name, self.topics, self.fields = bench, name, topics, fields
        self.sequence = 0
        self.owned: dict[Key, GroupPartition] = {}
        self.answer: GroupAssignment | None = None

    def beat(self, *, hold: bool = False) -> GroupAssignment:
        """One heartbeat. ``hold``: keep what is revoked a little longer."""
        self.sequence += 1
        answer = self.bench.member(
            "g", self.name, self.topics, owned=list(self.owned.values()), sequence=self.sequence, **self.fields
        )
        assert isinstance(answer, GroupAssignment)
        kept = {
            k: p for k, p in self.owned.items() if hold and k in {(r.topic_id, r.partition) for r in answer.revoked}
        }
        self.owned = {(p.topic_id, p.partition): p for p in answer.assigned} | kept
        self.answer = answer
        return answer

    def leave(self) -> None:
        self.sequence += 1
        self.bench.member("g", self.name, [], leave=True, sequence=self.sequence)
        self.owned = {}


def group(members: int, partitions: int = 12) -> tuple[Bench, list[Member]]:
    bench = Bench(1)
    bench.create("t", partitions=partitions, replication=1)
    team = [Member(bench, f"m{n}", ["t"]) for n in range(members)]
    settle(team)
    return bench, team


def settle(team: list[Member], rounds: int = 4) -> None:
    for _ in range(rounds):
        for member in team:
            member.beat()


def check(team: list[Member], partitions: int) -> None:
    """Everything has exactly one owner, evenly."""
    owners = Counter(key for member in team for key in member.owned)
    assert set(owners) == {("t-id", n) for n in range(partitions)}
    assert set(owners.values()) == {1}
    assert even({m.name: len(m.owned) for m in team})


def test_the_first_member_gets_everything_at_its_first_heartbeat() -> None:
    bench = Bench(1)
    bench.create("t", partitions=5, replication=1)
    answer = Member(bench, "m", ["t"]).beat()
    assert [p.partition for p in answer.assigned] == list(range(5))
    key = bench.state.cluster.claim_key
    for partition in answer.assigned:
        assert partition.generation == 1
        assert claim_token_valid(partition.token, key, "g", "t-id", partition.partition, "m", 1)
        assert partition.token == claim_token(key, "g", "t-id", partition.partition, "m", 1)
        assert not claim_token_valid(partition.token, key, "g", "t-id", partition.partition, "m", 2)


def test_a_joining_member_takes_only_its_share_and_nobody_else_stops() -> None:
    bench, team = group(3)
    before = {m.name: dict(m.owned) for m in team}
    joined = Member(bench, "m3", ["t"])
    joined.beat()
    settle([*team, joined])
    check([*team, joined], 12)
    for member in team:
        assert set(member.owned) <= set(before[member.name])
        for key, partition in member.owned.items():
            assert partition.generation == before[member.name][key].generation


def test_a_partition_is_granted_only_after_its_owner_let_go() -> None:
    bench, (first,) = group(1, 4)
    second = Member(bench, "m1", ["t"])
    second.beat()
    first.beat(hold=True)
    assert len(first.owned) == 4, "told to give up two, still finishing them"
    for _ in range(5):
        assert not second.beat().assigned
        first.beat(hold=True)
    first.beat()  # gives them up on its side
    first.beat()  # says so
    granted = second.beat().assigned
    assert len(granted) == 2
    assert all(p.generation == 2 for p in granted)


def test_a_heartbeat_sent_before_the_revocation_was_known_releases_nothing() -> None:
    bench, (first,) = group(1, 2)
    second = Member(bench, "m1", ["t"])
    second.beat()
    told = first.beat(hold=True)
    assert told.revoked
    late = bench.member("g", "m0", ["t"], owned=[], sequence=first.sequence)  # the same number again: overtaken
    assert [p.partition for p in late.revoked] == [p.partition for p in told.revoked]
    assert not second.beat().assigned


def test_overtaken_heartbeats_change_nothing() -> None:
    bench, team = group(2)
    before = dict(bench.rows)
    bench.member("g", "m0", ["t"], owned=[], sequence=1)
    bench.member("g", "m1", ["nothing-like-it"], owned=[], sequence=2)
    assert bench.rows == before
    settle(team)
    check(team, 12)


def test_a_member_that_leaves_frees_its_partitions_at_once() -> None:
    _, team = group(3)
    team[0].leave()
    settle(team[1:], 1)
    settle(team[1:], 1)
    check(team[1:], 12)


def test_a_late_heartbeat_of_a_member_that_left_does_not_bring_it_back() -> None:
    bench, team = group(2)
    owned = list(team[0].owned.values())
    team[0].leave()
    with pytest.raises(UnknownMember):
        bench.member("g", "m0", ["t"], owned=owned, sequence=team[0].sequence - 1)
    settle(team[1:])
    check(team[1:], 12)


def test_a_silent_member_keeps_its_partitions_for_its_session_and_not_longer() -> None:
    bench, team = group(2)
    for member in team:
        member.fields["session_ms"] = 6_000
    settle(team)
    silent = dict(team[0].owned)
    for _ in range(5):
        bench.play(1_000)
        team[1].beat()
        assert not set(team[1].owned) & set(silent)
    for _ in range(3):
        bench.play(1_000)
        team[1].beat()
    check(team[1:], 12)
    for key, partition in team[1].owned.items():
        if key in silent:
            assert partition.generation == silent[key].generation + 1


def test_a_member_that_comes_back_after_its_session_is_told_and_begins_anew() -> None:
    bench, team = group(2)
    for member in team:
        member.fields["session_ms"] = 3_000
    settle(team)
    for _ in range(5):
        bench.play(1_000)
        team[1].beat()
    with pytest.raises(UnknownMember):
        team[0].beat()
    team[0].owned = {}
    settle(team)
    check(team, 12)


def test_a_static_member_keeps_its_partitions_over_a_restart_under_new_generations() -> None:
    bench = Bench(1)
    bench.create("t", partitions=6, replication=1)
    team = [Member(bench, f"m{n}", ["t"], instance_id=f"i{n}") for n in range(2)]
    settle(team)
    before, others = dict(team[0].owned), dict(team[1].owned)
    again = Member(bench, "m0-again", ["t"], instance_id="i0")
    again.beat()
    assert set(again.owned) == set(before)
    assert all(again.owned[k].generation == before[k].generation + 1 for k in before)
    settle([again, team[1]])
    assert team[1].owned == others
    with pytest.raises(UnknownMember):
        team[0].beat()


def test_assignments_outlive_the_coordinator_and_every_member_gets_a_full_session() -> None:
    bench, team = group(3)
    for member in team:
        member.fields["session_ms"] = 10_000
    settle(team)
    before = {m.name: dict(m.owned) for m in team}
    bench.now += 3_600_000
    bench.restart()
    bench.play(9_000)
    for member in team:
        member.beat()
        assert member.owned == before[member.name]
    bench.play(15_000)
    team[0].beat()
    settle(team[:1], 2)
    check(team[:1], 12)


@pytest.mark.parametrize("step", range(6))
def test_a_rebalance_that_is_interrupted_after_any_heartbeat_ends_even(step: int) -> None:
    bench, team = group(2)
    team.append(Member(bench, "m2", ["t"]))
    order = [team[2], team[0], team[1], team[0], team[1], team[2]]
    for number, member in enumerate(order):
        member.beat()
        if number == step:
            bench.restart()
    settle(team)
    check(team, 12)


def test_new_partitions_and_new_topics_reach_the_group_and_deleted_ones_leave_it() -> None:
    bench, team = group(2, 4)
    bench.ask(ev.PartitionsAdded, "t", 10, True)
    settle(team)
    check(team, 10)
    for member in team:
        member.topics = ["t", "later"]
    settle(team)
    bench.create("later", partitions=4, replication=1)
    settle(team)
    assert Counter(k[0] for m in team for k in m.owned) == {"t-id": 10, "later-id": 4}
    bench.ask(ev.TopicDeleted, "t")
    settle(team)
    assert Counter(k[0] for m in team for k in m.owned) == {"later-id": 4}
    assert not any(key.startswith("owners/g/t-id") for key in bench.rows)


def test_generations_never_fall() -> None:
    bench, team = group(2, 4)
    highest: dict[Key, int] = {}
    rng = random.Random(5)
    members = list(team)
    for number in range(60):
        move = rng.random()
        if move < 0.15 and len(members) > 1:
            members.pop(rng.randrange(len(members))).leave()
        elif move < 0.4:
            members.append(Member(bench, f"x{number}", ["t"]))
        elif move < 0.5:
            bench.restart()
        for member in members:
            for key, partition in [(k, p) for k, p in _beat(member).items()]:
                assert partition.generation >= highest.get(key, 0)
                highest[key] = partition.generation
        bench.play(100)
        owners = Counter(key for member in members for key in member.owned)
        assert max(owners.values(), default=1) == 1, "two members never hold the same partition"
    settle(members)
    check(members, 4)


def _beat(member: Member) -> dict[Key, GroupPartition]:
    member.beat()
    return member.owned


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"group": "a/b"}, InvalidName, "group"),
    ({"member": ""}, InvalidName, "member"),
    ({"member": "é"}, InvalidName, "member"),
    ({"topics": []}, InvalidArgument, "topics: 0 is outside 1..1000"),
    ({"topics": ["t"] * 1001}, InvalidArgument, "topics: 1001"),
    ({"topics": ["no such"]}, InvalidName, "topic"),
    ({"topics": ["none"]}, UnknownTopic, "none"),
    ({"session_ms": 1}, InvalidArgument, "session_ms: 1 is outside 500"),
    ({"session_ms": 10**10}, InvalidArgument, "session_ms"),
    ({"instance_id": "x y"}, InvalidName, "instance_id"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), BAD, ids=[str(case[0])[:40] for case in BAD])
def test_a_wrong_heartbeat_is_refused_by_name(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    bench, team = group(1)
    fields: dict[str, Any] = {"group": "g", "member": "x", "topics": ["t"], **wrong}
    with pytest.raises(error, match=message):
        bench.member(fields.pop("group"), fields.pop("member"), fields.pop("topics"), **fields)
    settle(team)
    check(team, 12)


def test_a_group_is_deleted_only_without_members() -> None:
    bench, team = group(2)
    with pytest.raises(Conflict, match="2 members"):
        bench.ask(ev.GroupDeleted, "g")
    for member in team:
        member.leave()
    bench.ask(ev.GroupDeleted, "g")
    assert not any(key.startswith(("group/", "owners/")) for key in bench.rows)
    with pytest.raises(UnknownGroup):
        bench.ask(ev.GroupDeleted, "g")


def test_a_group_that_was_deleted_and_comes_back_goes_on_above_what_primaries_remember() -> None:
    bench, team = group(2)
    for _ in range(3):
        team[0].leave()
        settle(team)
    highest = max(p.generation for member in team for p in member.owned.values())
    assert highest > 1
    for member in team:
        member.leave()
    bench.ask(ev.GroupDeleted, "g")
    bench.restart()
    assert min(p.generation for p in Member(bench, "new", ["t"]).beat().assigned) > highest
