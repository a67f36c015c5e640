"""The broker as a member: registration, epochs of coordinators, metadata, stopping."""

from __future__ import annotations

from typing import Any

from ferryline.protocol.messages import HeartbeatOk, RegisterOk
from ferryline.protocol.metadata import BrokerMeta, MetadataAnswer, PartitionMeta, TopicConfig, TopicMeta
from ferryline_broker.core import events as ev
from ferryline_broker.core.node import NodeConfig, NodeCore, NodeIdentity

TOPIC = "a" * 32
CONFIG = NodeConfig()


def node(**changes: Any) -> NodeCore:
    identity = NodeIdentity(0, "s", 1, "clean", "https://in", "https://ex", **changes)
    return NodeCore(CONFIG, identity)


def of(kind: type[ev.Effect], effects: list[ev.Effect]) -> list[Any]:
    return [effect for effect in effects if isinstance(effect, kind)]


def registered(core: NodeCore, revision: int = 5, coord_epoch: int = 1) -> list[ev.Effect]:
    core.handle(ev.CoordinatorUp(), 0)
    ok = RegisterOk(1, 11, coord_epoch, "cluster", b"key", 500, revision)
    return core.handle(ev.RegisterAnswered(ok), 10)


def metadata(revision: int, parts: list[PartitionMeta], *, coord_epoch: int = 1, **rest: Any) -> ev.MetadataReceived:
    brokers = [BrokerMeta(1, "https://in", "https://ex", 11, False), BrokerMeta(2, "i", "e", 12, False)]
    topics = [TopicMeta(TOPIC, "orders", TopicConfig(partitions=1))]
    return ev.MetadataReceived(MetadataAnswer("cluster", coord_epoch, revision, True, brokers, topics, parts, **rest))


def part(version: int, replicas: tuple[int, ...] = (1, 2), primary: int = 1, epoch: int = 1) -> PartitionMeta:
    return PartitionMeta(TOPIC, 0, replicas, primary, epoch, version, (primary,))


def test_a_new_broker_registers_then_asks_for_metadata_and_sends_heartbeats() -> None:
    core = node()
    assert of(ev.SendRegister, core.handle(ev.CoordinatorUp(), 0))[0].register.broker_id == 0
    effects = core.handle(ev.RegisterAnswered(RegisterOk(7, 11, 1, "cluster", b"key", 500, 5)), 10)
    assert core.broker_id == 7
    assert of(ev.ConfirmRegistered, effects)
    assert of(ev.PersistCoordEpoch, effects) == [ev.PersistCoordEpoch(1)]
    assert of(ev.RequestMetadata, effects)
    assert of(ev.SendHeartbeat, effects)


def test_an_unanswered_registration_is_sent_again() -> None:
    core = node()
    core.handle(ev.CoordinatorUp(), 0)
    due = core.next_deadline_ms()
    assert due is not None
    assert of(ev.SendRegister, core.handle(ev.Tick(), due))


def test_metadata_from_before_the_registration_is_ignored() -> None:
    core = node()
    registered(core, revision=5)
    assert not of(ev.TellReplica, core.handle(metadata(4, [part(1)]), 20))
    effects = core.handle(metadata(5, [part(1)]), 30)
    assert of(ev.OpenReplica, effects) == [ev.OpenReplica((TOPIC, 0), "fsync")]
    assert of(ev.TellReplica, effects)


def test_a_replaced_coordinator_is_not_heeded() -> None:
    core = node(seen_coord_epoch=3)
    effects = registered(core, coord_epoch=2)
    assert of(ev.ResetCoordinatorSession, effects)
    assert not core.registered
    registered(core, coord_epoch=3)
    assert of(ev.ResetCoordinatorSession, core.handle(metadata(9, [part(1)], coord_epoch=2), 20))


def test_a_later_coordinator_is_remembered_before_it_is_obeyed() -> None:
    core = node()
    registered(core)
    effects = core.handle(metadata(9, [part(1)], coord_epoch=4), 20)
    kinds = [type(effect) for effect in effects]
    assert kinds.index(ev.PersistCoordEpoch) < kinds.index(ev.TellReplica)


def test_replicas_go_only_where_the_coordinator_says_so() -> None:
    core = node(replicas={(TOPIC, 0): "ok", ("b" * 32, 3): "ok"})
    registered(core)
    effects = core.handle(metadata(6, []), 20)
    assert not of(ev.DeleteReplica, effects), "absent from the metadata is not deleted"
    effects = core.handle(metadata(7, [], deleted_topics=["b" * 32]), 30)
    assert of(ev.DeleteReplica, effects) == [ev.DeleteReplica(("b" * 32, 3))]
    effects = core.handle(metadata(8, [part(4, (2, 3), 2)]), 40)
    assert of(ev.TellReplica, effects)[0].event.part.version == 4, "its own core decides, by version and epoch"


def test_a_damaged_replica_is_fetched_again_only_when_nobody_counts_on_it() -> None:
    core = node(replicas={(TOPIC, 0): "damaged"})
    registered(core)
    effects = core.handle(metadata(6, [part(1, primary=1)]), 20)
    assert not of(ev.OpenReplica, effects)
    effects = core.handle(metadata(7, [part(2, primary=2, epoch=2)]), 30)
    assert of(ev.OpenReplica, effects) == [ev.OpenReplica((TOPIC, 0), "fsync", True)]


def test_damage_found_while_running_is_told_before_the_copy_is_given_up() -> None:
    """The record that this broker knows may be older than one that counts on its copy."""
    core = node()
    registered(core)
    core.handle(metadata(6, [part(1, primary=2)]), 20)
    effects = core.handle(ev.ReplicaOpened((TOPIC, 0), "damaged"), 30)
    assert not of(ev.OpenReplica, effects)
    assert of(ev.SendRegister, effects)


def test_damage_found_during_a_registration_is_told_by_another_one_before_the_copy_is_given_up() -> None:
    """The one under way says that all is well: a proposal made in that belief could still count on the copy."""
    core = node()
    first = of(ev.SendRegister, core.handle(ev.CoordinatorUp(), 0))[0].register
    again = of(ev.SendRegister, core.handle(ev.Tick(), core.next_deadline_ms() or 0))[0].register
    assert not core.handle(ev.ReplicaOpened((TOPIC, 0), "damaged"), 30)

    def answer(request: int) -> list[ev.Effect]:
        return core.handle(ev.RegisterAnswered(RegisterOk(1, 11, 1, "cluster", b"key", 500, 5, request)), 40)

    told = of(ev.SendRegister, answer(first.request))[0].register
    assert not core.registered
    assert of(ev.SendRegister, answer(again.request)), "a late answer to the second one says nothing about the third"
    assert not core.handle(metadata(6, [part(1, primary=2)]), 50)
    effects = answer(told.request)
    assert core.registered
    assert not of(ev.SendRegister, effects)
    effects = core.handle(metadata(6, [part(1, primary=2)]), 60)
    assert of(ev.OpenReplica, effects) == [ev.OpenReplica((TOPIC, 0), "fsync", True)]


def test_a_stale_broker_epoch_registers_again() -> None:
    core = node()
    registered(core)
    assert of(ev.SendRegister, core.handle(ev.HeartbeatAnswered(None, "STALE_BROKER_EPOCH"), 20))


def test_a_clean_stop_hands_over_and_waits_for_the_coordinator() -> None:
    core = node()
    registered(core)
    core.handle(metadata(6, [part(1)]), 20)
    effects = core.handle(ev.StopAsked(), 30)
    assert isinstance(of(ev.TellReplica, effects)[0].event, ev.HandOverAsked)
    assert of(ev.SendHeartbeat, effects)[0].heartbeat.want == "stop"
    assert not of(ev.StopNow, effects)
    assert of(ev.StopNow, core.handle(ev.HeartbeatAnswered(HeartbeatOk(True, 1, 6, True)), 40))[0].clean


def test_a_stop_is_bounded_and_does_not_need_a_coordinator() -> None:
    core = node()
    registered(core)
    core.handle(metadata(6, [part(1)]), 20)
    core.handle(ev.StopAsked(), 30)
    assert of(ev.StopNow, core.handle(ev.Tick(), 30 + CONFIG.stop_ms))
    alone = node()
    assert of(ev.StopNow, alone.handle(ev.StopAsked(), 0))


def test_a_refused_cluster_or_version_ends_the_process() -> None:
    core = node()
    core.handle(ev.CoordinatorUp(), 0)
    effects = core.handle(ev.RegisterAnswered(None, "CLUSTER_MISMATCH", "another cluster"), 10)
    assert not of(ev.StopNow, effects)[0].clean


def test_an_answer_with_news_that_got_lost_is_not_waited_for() -> None:
    core = node()
    registered(core, revision=5)
    core.handle(metadata(5, [part(1)]), 30)  # the next request is parked for half a minute
    core.handle(ev.HeartbeatAnswered(HeartbeatOk(False, 1, 5, False)), 500)
    assert not of(ev.RequestMetadata, core.handle(ev.Tick(), 3_000)), "no news"
    core.handle(ev.HeartbeatAnswered(HeartbeatOk(False, 1, 6, False)), 3_000)
    core.handle(ev.HeartbeatAnswered(HeartbeatOk(False, 1, 7, False)), 3_500)
    assert not of(ev.RequestMetadata, core.handle(ev.Tick(), 4_999)), "it may be under way"
    assert of(ev.RequestMetadata, core.handle(ev.Tick(), 5_000))


def test_a_lost_metadata_request_is_asked_again() -> None:
    core = node()
    registered(core)
    for _ in range(200):
        due = core.next_deadline_ms()
        assert due is not None
        if of(ev.RequestMetadata, core.handle(ev.Tick(), due)):
            return
    raise AssertionError("metadata was never asked for again")


def test_a_primaryship_that_arrives_while_stopping_is_handed_over_at_once() -> None:
    core = node()
    registered(core)
    core.handle(metadata(6, [part(1, primary=2)]), 20)
    core.handle(ev.StopAsked(), 30)
    effects = core.handle(metadata(7, [part(2, primary=1, epoch=2)]), 40)
    assert [type(effect.event) for effect in of(ev.TellReplica, effects)] == [ev.MetaReceived, ev.HandOverAsked]
