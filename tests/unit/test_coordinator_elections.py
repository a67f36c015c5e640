"""Elections as functions from one partition record to the next: what the simulator found, kept."""

from __future__ import annotations

from msgspec.structs import replace

from ferryline.protocol.metadata import NO_BROKER, PartitionMeta
from ferryline_coordinator.core.change import Change
from ferryline_coordinator.core.elections import fence
from ferryline_coordinator.core.events import Reply
from ferryline_coordinator.core.records import ClusterRecord, encode_record
from ferryline_coordinator.core.state import CoordinatorState

BASE = PartitionMeta("a" * 32, 0, (3, 4), NO_BROKER, 5, 9, (3,), (4,), min_isr=2)


def test_fencing_the_last_in_sync_replica_elects_a_complete_one_that_is_up() -> None:
    """3/2/replicated seed 341: the primary had resigned before it was fenced, and nobody looked again."""
    after = fence(BASE, [3], lambda broker: broker == 4)
    assert after.primary == 4
    assert after.epoch == 6
    assert after.isr == (4,)
    assert after.elr == (3,)


def test_a_frozen_partition_elects_nobody() -> None:
    assert fence(BASE, [3], lambda broker: broker == 4, frozen=True).primary == NO_BROKER


def test_without_a_candidate_the_partition_waits_with_everybody_remembered() -> None:
    after = fence(replace(BASE, primary=3), [3], lambda _: False)
    assert after.primary == NO_BROKER
    assert set(after.elr) == {3, 4}


def test_an_answer_shows_what_the_whole_decision_made_of_a_partition() -> None:
    """3/2/replicated seed 1577: a move changed the record again under the version that the answer had shown."""
    state = CoordinatorState(10)
    state.load([("cluster", encode_record(ClusterRecord("c", b"k")))])
    change = Change(state, 0, 1)
    change.reply_at_end(7, lambda: change.part(BASE.key))
    change.put_part(replace(BASE, replicas=(3, 4), primary=3, isr=(3, 4), elr=()))
    final = change.put_part(replace(BASE, replicas=(3, 4, 5), primary=3, isr=(3, 4), elr=(), adding=(5,)))
    assert change.effects[0] == Reply(7, None)
    decision = change.finish()
    answer = decision.effects[0]
    assert isinstance(answer, Reply)
    assert answer.message.meta == final
