"""A primary that learns by the refusal of a proposal that its replica was moved away."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from core_pair import KEY, Pair, part

from ferryline.protocol.messages import RECORDS, AlterIsrResult
from ferryline_broker.core import events as ev

AWAY = part(2, 2, 3, (2,), replicas=(2,))


def refused_after_the_move() -> Pair:
    pair = Pair()
    pair.meta(part(1, 1, 1, (1, 2)))
    pair.produce(1, 1)
    pair.tell(1, ev.AlterIsrAnswered(AlterIsrResult(*KEY, 1, False, 1, AWAY, "NOT_PRIMARY")))
    return pair


def test_an_answer_ends_the_primaryship_and_deletes_nothing() -> None:
    pair = refused_after_the_move()
    assert pair.cores[1].role == "idle"
    assert not pair.effects(ev.DeleteReplica, 1), "the node does not know yet, and would never open it again"


def test_it_is_deleted_once_the_node_knows() -> None:
    pair = refused_after_the_move()
    pair.meta(AWAY, 1)
    assert pair.effects(ev.DeleteReplica, 1)


def test_moved_back_before_the_node_knew_it_follows_the_new_primary() -> None:
    pair = refused_after_the_move()
    pair.meta(AWAY, 2)
    pair.produce(2, 2)
    pair.meta(part(2, 2, 4, (2,), replicas=(2, 1), adding=(1,)))
    assert pair.cores[1].role == "secondary"
    assert not pair.effects(ev.DeleteReplica, 1)
    assert pair.disks[1].end(RECORDS) == pair.disks[2].end(RECORDS)


def test_a_stopped_replica_is_deleted_once_the_node_knows() -> None:
    pair = Pair()
    pair.meta(part(1, 1, 1, (1, 2)))
    pair.tell(1, ev.StorageFailed(RECORDS, "EIO"))
    pair.tell(1, ev.AlterIsrAnswered(AlterIsrResult(*KEY, 1, False, 1, AWAY, "NOT_PRIMARY")))
    assert not pair.effects(ev.DeleteReplica, 1)
    pair.meta(AWAY, 1)
    assert pair.effects(ev.DeleteReplica, 1)
