"""Elections as functions from one partition record to the next: what the simulator found, kept."""

from __future__ import annotations

from msgspec.structs import replace

from ferryline.protocol.metadata import NO_BROKER, PartitionMeta
from ferryline_coordinator.core.elections import fence

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
