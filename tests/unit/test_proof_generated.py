"""Generated runs of a correct cluster are clean, and one wrong thing in any of them is found."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from ferryline.proof.checker import check
from ferryline.proof.findings import Verdict
from ferryline.proof.history import VERSION, Op, ValueBlocks, expand, pack

PARTITIONS, COPIES = 2, (1, 2)


@dataclass
class Run:
    """A correct cluster: a log for each partition, producers, one group whose members take turns, and a last reader."""

    draw: random.Random
    now: int = 10
    ops: list[Op] = field(default_factory=list)
    logs: list[list[int]] = field(default_factory=lambda: [[] for _ in range(PARTITIONS)])  # value, or -1: control
    committed: list[int] = field(default_factory=lambda: [0] * PARTITIONS)
    position: list[int] = field(default_factory=lambda: [0] * PARTITIONS)
    owner: list[str] = field(default_factory=lambda: [""] * PARTITIONS)
    generation: int = 0
    blocks: ValueBlocks = field(default_factory=lambda: ValueBlocks(size=8))

    def tick(self) -> int:
        self.now += self.draw.randint(1, 5)
        return self.now

    def put(self, f: str, part: int = 0, **fields: object) -> None:
        self.ops.append(Op(f, topic="t", partition=part, t0=self.tick(), t1=self.tick(), **fields))  # type: ignore[arg-type]

    def send(self) -> None:
        part, proc = self.draw.randrange(PARTITIONS), self.draw.choice("pq")
        values = []
        for _ in range(self.draw.randint(1, 12)):
            value, fresh = self.blocks.take(proc, "t", part)
            if fresh is not None:
                self.put("attempt", proc=proc, values=[fresh])
            values.append(value)
        outcome = self.draw.choice(["ok"] * 6 + ["info", "lost", "fail"])
        if outcome in ("fail", "lost"):
            self.put("send", part, proc=proc, type={"lost": "info"}.get(outcome, outcome), values=pack(values))
            return
        begin = len(self.logs[part])
        self.logs[part] += values
        told = {"type": "info"} if outcome == "info" else {"offsets": pack(range(begin, len(self.logs[part])))}
        self.put("send", part, proc=proc, values=pack(values), **told)

    def control(self) -> None:
        self.logs[self.draw.randrange(PARTITIONS)].append(-1)
        self.put("fault", note="kill")

    def claim(self) -> None:
        part, self.generation = self.draw.randrange(PARTITIONS), self.generation + 1
        if self.draw.random() < 0.5 and self.owner[part]:
            self.put("release", part, proc=self.owner[part], group="g", generation=self.generation - 1)
        self.owner[part] = self.draw.choice("abc")
        self.position[part] = self.committed[part]
        where = self.draw.choice([self.committed[part], None])
        self.put("claim", part, proc=self.owner[part], group="g", generation=self.generation, offset=where)
        self.generations[part] = self.generation

    generations: dict[int, int] = field(default_factory=dict)

    def poll(self, part: int | None = None, most: int = 9) -> None:
        part = self.draw.randrange(PARTITIONS) if part is None else part
        if not self.owner[part]:
            return
        log, begin = self.logs[part], self.position[part]
        end = min(len(log), begin + self.draw.randint(0, most))
        at = [offset for offset in range(begin, end) if log[offset] >= 0]
        self.position[part] = end
        values = pack(log[offset] for offset in at)
        self.put("poll", part, proc=self.owner[part], group="g", values=values, offsets=pack(at), hw=len(log))

    def commit(self) -> None:
        part = self.draw.randrange(PARTITIONS)
        if not self.owner[part]:
            return
        kind = self.draw.choice(["ok", "ok", "fail"])
        told = {"group": "g", "generation": self.generations[part], "offset": self.position[part]}
        self.put("commit", part, proc=self.owner[part], type=kind, **told)
        if kind == "ok":
            self.committed[part] = self.position[part]

    def finish(self) -> list[Op]:
        for part in range(PARTITIONS):
            if not self.owner[part]:
                self.owner[part] = "z"
                self.generation += 1
                self.put("claim", part, proc="z", group="g", generation=self.generation, offset=0)
            while self.position[part] < len(self.logs[part]):
                self.poll(part, 100)
            log = self.logs[part]
            at = [offset for offset, value in enumerate(log) if value >= 0]
            everything = {"values": pack(log[offset] for offset in at), "offsets": pack(at)}
            self.put("assign", part, proc="last", offset=0)
            self.put("poll", part, proc="last", **everything)
            self.put("watermark", part, offset=len(log))
            for broker in COPIES:
                self.put("replica_read", part, broker=broker, **everything)
        return [Op("header", version=VERSION, linearizable=True), *self.ops]


def correct(seed: int, steps: int) -> list[Op]:
    run = Run(random.Random(seed))
    run.send()
    for _ in range(steps):
        run.draw.choice([run.send, run.send, run.poll, run.poll, run.commit, run.claim, run.control])()
    while not any(op.f == "send" and op.type == "ok" for op in run.ops):
        run.send()
    return run.finish()


def judged(ops: list[Op]) -> Verdict:
    return check(lambda: ops)


# -- one wrong thing ---------------------------------------------------------------------------------
# Each takes a correct history and returns a wrong one, or None where there is nothing to spoil.

Spoiler = Callable[[random.Random, list[Op]], list[Op] | None]


def pick(draw: random.Random, ops: list[Op], f: str, enough: int = 1) -> int | None:
    found = [n for n, op in enumerate(ops) if op.f == f and op.type == "ok" and len(expand(op.values)) >= enough]
    return draw.choice(found) if found else None


def changed(ops: list[Op], at: int, values: list[int], offsets: list[int]) -> list[Op]:
    return [*ops[:at], msgspec.structs.replace(ops[at], values=pack(values), offsets=pack(offsets)), *ops[at + 1 :]]


def acked(ops: list[Op]) -> set[int]:
    return {value for op in ops if op.f == "send" and op.type == "ok" for value in expand(op.values)}


def forget_on_a_copy(draw: random.Random, ops: list[Op]) -> list[Op] | None:
    at = pick(draw, ops, "replica_read")
    if at is None:
        return None
    values, offsets = expand(ops[at].values), expand(ops[at].offsets)
    mine = [n for n, value in enumerate(values) if value in acked(ops)]
    if not mine:
        return None
    gone = draw.choice(mine)
    return changed(ops, at, values[:gone] + values[gone + 1 :], offsets[:gone] + offsets[gone + 1 :])


def forget_for_everybody(draw: random.Random, ops: list[Op]) -> list[Op] | None:
    gone = draw.choice(sorted(acked(ops)))
    out = []
    for op in ops:
        if op.f in ("poll", "replica_read") and gone in expand(op.values):
            pairs = zip(expand(op.values), expand(op.offsets), strict=True)
            kept = [(value, offset) for value, offset in pairs if value != gone]
            op = msgspec.structs.replace(op, values=pack(v for v, _ in kept), offsets=pack(o for _, o in kept))
        out.append(op)
    return out


def leave_out_of_a_poll(draw: random.Random, ops: list[Op]) -> list[Op] | None:
    at = pick(draw, ops, "poll", 3)
    if at is None:
        return None
    values, offsets = expand(ops[at].values), expand(ops[at].offsets)
    gone = draw.randrange(1, len(values) - 1)
    return changed(ops, at, values[:gone] + values[gone + 1 :], offsets[:gone] + offsets[gone + 1 :])


def another_value(draw: random.Random, ops: list[Op]) -> list[Op] | None:
    at = pick(draw, ops, draw.choice(["poll", "replica_read"]))
    if at is None:
        return None
    values, offsets = expand(ops[at].values), expand(ops[at].offsets)
    values[draw.randrange(len(values))] = draw.choice([1_000_000, *sorted(acked(ops) - set(values))])
    return changed(ops, at, values, offsets)


def another_offset(draw: random.Random, ops: list[Op]) -> list[Op] | None:
    at = pick(draw, ops, draw.choice(["poll", "replica_read", "send"]))
    if at is None:
        return None
    values, offsets = expand(ops[at].values), expand(ops[at].offsets)
    offsets[draw.randrange(len(offsets))] += draw.choice([1, 5, 70_000])
    return changed(ops, at, values, offsets)


def swapped(draw: random.Random, ops: list[Op]) -> list[Op] | None:
    at = pick(draw, ops, draw.choice(["poll", "replica_read", "send"]), 2)
    if at is None:
        return None
    values, offsets = expand(ops[at].values), expand(ops[at].offsets)
    first = draw.randrange(len(values) - 1)
    values[first], values[first + 1] = values[first + 1], values[first]
    return changed(ops, at, values, offsets)


def stored_twice(draw: random.Random, ops: list[Op]) -> list[Op] | None:
    at = pick(draw, ops, "replica_read")
    assert at is not None
    values, offsets = expand(ops[at].values), expand(ops[at].offsets)
    return changed(ops, at, [*values, draw.choice(values)], [*offsets, offsets[-1] + 1])


def refused_after_all(draw: random.Random, ops: list[Op]) -> list[Op] | None:
    at = pick(draw, ops, "send")
    assert at is not None
    return [*ops[:at], msgspec.structs.replace(ops[at], type="fail", offsets=[]), *ops[at + 1 :]]


def poll_twice(draw: random.Random, ops: list[Op]) -> list[Op] | None:
    at = pick(draw, ops, "poll")
    return None if at is None else [*ops[: at + 1], ops[at], *ops[at + 1 :]]


def old_acknowledgement(draw: random.Random, ops: list[Op]) -> list[Op] | None:
    """The last of a partition's acknowledgements was over before the first send of it began."""
    mine = [n for n, op in enumerate(ops) if op.f == "send" and op.type == "ok" and op.partition == 0]
    if len(mine) < 2:
        return None
    late = msgspec.structs.replace(ops[mine[-1]], t0=1, t1=2)
    return [*ops[: mine[-1]], late, *ops[mine[-1] + 1 :]]


def zombie(draw: random.Random, ops: list[Op]) -> list[Op] | None:
    claims = [op for op in ops if op.f == "claim" and op.generation > 1]
    if not claims:
        return None
    late = draw.choice(claims)
    told = {"proc": "zombie", "group": "g", "generation": late.generation - 1, "offset": 0}
    return [*ops, Op("commit", topic="t", partition=late.partition, t0=ops[-1].t1 + 1, t1=ops[-1].t1 + 2, **told)]


def commit_beyond(draw: random.Random, ops: list[Op]) -> list[Op] | None:
    claims = [op for op in ops if op.f == "claim"]
    top = max(op.offset or 0 for op in ops if op.f == "watermark")
    last = max((op for op in claims if op.partition == claims[-1].partition), key=lambda op: op.generation)
    told = {"proc": last.proc, "group": "g", "generation": last.generation, "offset": top + 1}
    return [*ops, Op("commit", topic="t", partition=last.partition, t0=ops[-1].t1 + 1, t1=ops[-1].t1 + 2, **told)]


def stale_claim(draw: random.Random, ops: list[Op]) -> list[Op] | None:
    """The group turns out to have committed more before somebody claimed where the commit said."""
    claims = [n for n, op in enumerate(ops) if op.f == "claim" and op.offset]
    if not claims:
        return None
    at = draw.choice(claims)
    return [*ops[:at], msgspec.structs.replace(ops[at], offset=(ops[at].offset or 0) - 1), *ops[at + 1 :]]


SPOILERS: list[Spoiler] = [
    forget_on_a_copy,
    forget_for_everybody,
    leave_out_of_a_poll,
    another_value,
    another_offset,
    swapped,
    stored_twice,
    refused_after_all,
    poll_twice,
    old_acknowledgement,
    zombie,
    commit_beyond,
    stale_claim,
]
seeds = st.integers(0, 2**32)


@settings(max_examples=200, deadline=None)
@given(seed=seeds, steps=st.integers(0, 60))
def test_a_correct_run_is_clean(seed: int, steps: int) -> None:
    verdict = judged(correct(seed, steps))
    assert verdict.good, verdict.explain()


@settings(max_examples=400, deadline=None)
@given(seed=seeds, steps=st.integers(0, 60), spoiler=st.sampled_from(SPOILERS))
def test_one_wrong_thing_is_found(seed: int, steps: int, spoiler: Spoiler) -> None:
    wrong = spoiler(random.Random(seed), correct(seed, steps))
    if wrong is not None:
        assert not judged(wrong).good, spoiler.__name__


def test_every_spoiler_finds_something_to_spoil() -> None:
    for spoiler in SPOILERS:
        assert any(spoiler(random.Random(seed), correct(seed, 40)) for seed in range(20)), spoiler.__name__
