"""When a secondary flushes: before it asks for more if that is little, beside it otherwise."""

from __future__ import annotations

from ferryline.protocol.messages import RECORDS, STATE
from ferryline_broker.core import events as ev
from ferryline_broker.core.replica import ReplicaConfig
from unit.core_pair import Pair, batch, part


def started(**config: int) -> Pair:
    pair = Pair(config=ReplicaConfig(**config))
    pair.meta(part(1, 1, 1, (1, 2)))
    return pair


def test_what_is_small_is_flushed_before_more_is_asked_for_and_told_with_that() -> None:
    pair = started()
    pair.hold_flush = {2}
    pair.done.clear()
    pair.produce(1, 7)
    before = len(pair.effects(ev.SendFetch, 2))
    (fetch,) = [effect.fetch for effect in pair.tell(2, ev.Flushed(RECORDS, 2)) if isinstance(effect, ev.SendFetch)]
    assert fetch.positions[RECORDS].fetch_offset == fetch.positions[RECORDS].flushed == 2
    assert len(pair.effects(ev.SendFetch, 2)) == before + 1
    assert pair.effects(ev.SendProgress, 2) == []
    assert pair.answers()[7] == ev.AnswerProduce(7, 1, 1)


def test_more_than_little_is_asked_for_before_the_flush_which_is_told_when_it_ended() -> None:
    pair = started()
    pair.hold_flush = {2}
    before = len(pair.effects(ev.SendFetch, 2))
    pair.produce(1, 7, batch(value=b"x" * ReplicaConfig().flush_first_bytes))
    assert len(pair.effects(ev.SendFetch, 2)) == before + 1
    assert [type(effect) for effect in pair.tell(2, ev.Flushed(RECORDS, 2))][:1] == [ev.SendProgress]
    assert pair.answers()[7] == ev.AnswerProduce(7, 1, 1)


def test_a_flush_that_hangs_keeps_nobody_from_asking_for_more_for_longer_than_a_retry() -> None:
    pair = started(fetch_retry_ms=700)
    pair.hold_flush = {2}
    pair.produce(1, 7)
    before = len(pair.effects(ev.SendFetch, 2))
    pair.tick(699)
    assert len(pair.effects(ev.SendFetch, 2)) == before
    pair.tick(1)
    assert len(pair.effects(ev.SendFetch, 2)) == before + 1
    pair.tell(2, ev.Flushed(RECORDS, 2))
    assert pair.effects(ev.SendProgress, 2), "as the fetch is parked"
    assert pair.answers()[7] == ev.AnswerProduce(7, 1, 1)


def test_both_logs_that_were_flushed_together_are_told_together() -> None:
    pair = started(flush_first_bytes=0)
    pair.hold_flush = {2}
    pair.produce(1, 7)
    ends = [pair.disks[2].end(log) for log in (RECORDS, STATE)]
    assert ends == [2, 1]
    pair.done.clear()
    pair.tell(2, ev.Flushed(RECORDS, *ends))
    assert [effect.progress.flushed for effect in pair.effects(ev.SendProgress, 2)] == [tuple(ends)]
    assert pair.answers()[7] == ev.AnswerProduce(7, 1, 1)


def test_a_new_session_ends_the_wait_for_a_flush() -> None:
    pair = started()
    pair.hold_flush = {2}
    pair.produce(1, 7)
    assert [type(effect) for effect in pair.tell(2, ev.PeerUp(1))][:1] == [ev.SendFetch]
    assert [type(effect) for effect in pair.tell(2, ev.Flushed(RECORDS, 2))][:1] == [ev.SendProgress]


def test_a_secondary_does_not_wait_for_what_nobody_asked_it_to_flush() -> None:
    pair = Pair()
    pair.meta(part(1, 1, 1, (1, 2), flush="replicated"))
    pair.tell(1, ev.BarrierAsked(5, 30_000))
    pair.meta(part(1, 1, 2, (1, 2)))  # flushed from now on; the state log was not until now
    pair.produce(1, 9)
    assert isinstance(pair.answers()[9], ev.AnswerProduce)


def test_what_was_appended_while_another_was_to_join_is_flushed_when_it_may_not() -> None:
    pair = Pair()
    pair.meta(part(1, 1, 1, (1,), flush="replicated"))
    (proposal,) = pair.proposals()[-1:]
    pair.cut = {2}
    pair.produce(1, 9)
    assert 9 not in pair.answers()
    pair.answer_alter(1, proposal, False, part(1, 1, 1, (1,), flush="replicated"))
    assert isinstance(pair.answers()[9], ev.AnswerProduce)
