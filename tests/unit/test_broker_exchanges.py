"""A broker passes exchanges on: in its whole copy, and in what it says has changed."""

from __future__ import annotations

import random

import msgspec
import pytest

from ferryline.protocol.exchanges import FANOUT, ExchangeMeta, binding_to
from ferryline.protocol.metadata import BrokerMeta, ClusterMetadata, MetadataAnswer
from ferryline_broker.view import _CHANGES_MAX, ClusterView

CLUSTER = "c" * 32


def told(revision: int, **news: object) -> MetadataAnswer:
    return msgspec.structs.replace(MetadataAnswer(CLUSTER, 1, revision, False), **news)  # type: ignore[arg-type]


def exchange(name: str, version: int) -> ExchangeMeta:
    return ExchangeMeta(name, FANOUT, "", tuple(binding_to(topic=f"t{n}") for n in range(version)), version)


@pytest.mark.parametrize("seed", range(10))
def test_whoever_knows_an_older_picture_gets_the_present_exchanges(seed: int) -> None:
    rng, known = random.Random(seed), ClusterMetadata()
    view = ClusterView(known)
    whole = MetadataAnswer(
        CLUSTER, 1, 1, True, [BrokerMeta(1, "https://i", "https://e", 1)], exchanges=[exchange("a", 1)]
    )
    known.apply(whole)
    view.took(whole)
    askers: list[ClusterMetadata] = []
    for revision in range(2, 60):
        asker = ClusterMetadata()
        asker.apply(msgspec.msgpack.decode(view.encoded(), type=MetadataAnswer))
        assert asker.exchanges == known.exchanges
        askers.append(asker)
        name = rng.choice("abc")
        gone = rng.random() < 0.3
        news = {"deleted_exchanges": [name]} if gone else {"exchanges": [exchange(name, revision)]}
        answer = told(revision, **(news if rng.random() < 0.8 else {"brokers": whole.brokers}))
        assert known.apply(answer)
        view.took(answer)
        for other in rng.sample(askers, min(3, len(askers))):
            delta = msgspec.msgpack.decode(view.news(1, other.revision), type=MetadataAnswer)
            assert not delta.full
            assert other.apply(delta)
            assert (other.exchanges, other.revision) == (known.exchanges, revision)


def test_what_is_kept_for_deltas_is_bounded_by_bindings_too() -> None:
    known = ClusterMetadata()
    view = ClusterView(known)
    whole = MetadataAnswer(CLUSTER, 1, 1, True, [])
    known.apply(whole)
    view.took(whole)
    for revision in range(2, 60):
        answer = told(revision, exchanges=[exchange("a", 900)])
        known.apply(answer)
        view.took(answer)
    kept = sum(len(one.bindings) for change in view._changes for one in change.exchanges)
    assert 0 < kept <= _CHANGES_MAX
    assert msgspec.msgpack.decode(view.news(1, 3), type=MetadataAnswer).full
    assert not msgspec.msgpack.decode(view.news(1, 58), type=MetadataAnswer).full
