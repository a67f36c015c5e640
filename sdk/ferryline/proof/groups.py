"""What groups promise: K1 to K7. One committer for each claim, commits that never fall, nothing left out.

Feed it every line about groups, and polls; call `finish` after the judge of records has seen everything.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from ferryline.proof.findings import Findings, listed, seconds
from ferryline.proof.history import FAIL, OK, Op, together
from ferryline.proof.lanes import Lane, Marks
from ferryline.proof.records import RecordJudge

NOT_KNOWN = -2


@dataclass(frozen=True, slots=True)
class Moment:
    """A claim, commit or look: when, by whom, under which claim, at which offset (-1: none, or NOT_KNOWN)."""

    t0: int
    t1: int
    proc: str
    claim: int
    offset: int
    type: str = OK


@dataclass
class Share:
    """One partition of one group."""

    lane: Lane
    claims: list[Moment] = field(default_factory=list)
    commits: list[Moment] = field(default_factory=list)
    looks: list[Moment] = field(default_factory=list)
    resets: list[tuple[int, int]] = field(default_factory=list)
    processed: Marks = field(default_factory=Marks)
    start: int = -1  # lowest position the group ever read from; -1: none known
    pending: dict[str, Moment] = field(default_factory=dict)  # claims whose start is not known before the first poll


@dataclass
class Group:
    """Membership as its members saw it."""

    shares: dict[int, Share] = field(default_factory=dict)
    views: dict[str, list[Op]] = field(default_factory=dict)
    calms: list[Op] = field(default_factory=list)


class GroupJudge:
    """Judges groups."""

    def __init__(self, findings: Findings, records: RecordJudge) -> None:
        self.findings = findings
        self._records = records
        self._groups: dict[str, Group] = {}

    def note(self, op: Op) -> None:
        """A line with a group."""
        group = self._groups.setdefault(op.group, Group())
        if op.f == "view":
            group.views.setdefault(op.proc, []).append(op)
        elif op.f == "calm":
            group.calms.append(op)
        else:
            lane = self._records.lane(op)
            share = group.shares.get(lane.number)
            if share is None:
                share = group.shares[lane.number] = Share(lane)
            self._share(share, op)

    def _share(self, share: Share, op: Op) -> None:
        claim = op.claim_epoch if op.claim_epoch >= 0 else op.generation
        offset = op.offset if op.offset is not None else NOT_KNOWN
        moment = Moment(op.t0, op.t1, op.proc, claim, offset, op.type)
        if op.f == "claim" and op.type == OK:
            if op.offset is None or op.offset < 0:
                share.pending[op.proc] = moment
            else:
                share.pending.pop(op.proc, None)
                share.claims.append(moment)
                self._starts(share, offset)
        elif op.f == "commit":
            self.findings.fact("commits", 1)
            share.commits.append(moment)
        elif op.f == "committed":
            share.looks.append(moment)
        elif op.f == "reset":
            share.resets.append((op.t0, op.t1))
        elif op.f == "assign" and op.offset is not None:
            self._starts(share, offset)
        elif op.f == "poll":
            self._polled(share, op)

    def _polled(self, share: Share, op: Op) -> None:
        for _, offset, count in together(op.values, op.offsets):
            claimed = share.pending.pop(op.proc, None)
            if claimed is not None:
                share.claims.append(Moment(claimed.t0, claimed.t1, op.proc, claimed.claim, offset))
            self._starts(share, offset)
            again = share.processed.set(offset, count)
            if again:
                self.findings.add("redelivered", again)

    @staticmethod
    def _starts(share: Share, offset: int) -> None:
        share.start = offset if share.start < 0 else min(share.start, offset)

    # -- the end -------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Judge."""
        for name in sorted(self._groups):
            group = self._groups[name]
            for number in sorted(group.shares):
                share = group.shares[number]
                share.claims += share.pending.values()
                share.resets.sort()
                where = f"{name}: {share.lane.name}"
                self._committers(share, where)
                self._zombies(share, where)
                self._rising(share, where)
                self._beyond(share, where)
                if self._records.drained:
                    self._processed(share, where)
            self._converged(name, group)
            if group.shares:
                self.findings.fact("group partitions", len(group.shares))
                self.findings.fact("claims", sum(len(share.claims) for share in group.shares.values()))

    def _committers(self, share: Share, where: str) -> None:
        """K1, first half: a claim belongs to one member."""
        owners: dict[int, set[str]] = {}
        for moment in (*share.claims, *accepted(share.commits)):
            if moment.claim >= 0:
                owners.setdefault(moment.claim, set()).add(moment.proc)
        for claim in sorted(owners):
            if len(owners[claim]) > 1:
                told = f"{where}, claim {claim}: {listed(sorted(owners[claim]))}"
                self.findings.add("K1 two committers", 1, told)

    def _zombies(self, share: Share, where: str) -> None:
        """K1, second half, and K4: a commit begun after a later claim was granted must be refused for certain."""
        ends = sorted(share.claims, key=lambda moment: moment.t1)
        newest: list[Moment] = []
        for claim in ends:
            newest.append(claim if not newest or claim.claim > newest[-1].claim else newest[-1])
        times = [claim.t1 for claim in ends]
        for commit in share.commits:
            before = bisect_right(times, commit.t0 - 1)
            if not before or not 0 <= commit.claim < newest[before - 1].claim:
                continue
            later = newest[before - 1]
            told = (
                f"{where}: {commit.proc} committed {commit.offset} under claim {commit.claim} at {seconds(commit.t0)}; "
                f"{later.proc} had claim {later.claim} since {seconds(later.t1)}"
            )
            kind = {OK: "K1 zombie commit", FAIL: "zombie refused"}.get(commit.type, "zombie unknown")
            self.findings.add(kind, 1, told, commit.t1)

    def _rising(self, share: Share, where: str) -> None:
        """K2 and K3: whatever begins after an accepted commit has ended is not below it, but for resets."""
        commits = accepted(share.commits)
        for kind, later in (
            ("K2 commit went back", [*commits, *share.looks]),
            ("K3 stale start", [claim for claim in share.claims if claim.offset != NOT_KNOWN]),
        ):
            for bucket, best, moment in self._below(share, commits, later):
                if kind.startswith("K3") and moment.offset < 0 and bucket:
                    continue  # after a reset a start from the policy is right
                told = (
                    f"{where}: {best.proc} committed {best.offset} at {seconds(best.t1)}, then {moment.proc} "
                    f"{'began at' if kind.startswith('K3') else 'had'} {moment.offset} at {seconds(moment.t0)}"
                )
                self.findings.add(kind, 1, told, moment.t1)

    @staticmethod
    def _below(share: Share, commits: list[Moment], later: list[Moment]) -> Iterator[tuple[int, Moment, Moment]]:
        """(resets before, best, moment) of each moment below the best commit that ended before it, since a reset."""
        begins = [t0 for t0, _ in share.resets]

        def bucket(moment: Moment) -> int:
            resets = bisect_right(begins, moment.t1)
            overlaps = resets and max(t1 for _, t1 in share.resets[:resets]) > moment.t0
            return -1 if overlaps else resets

        ended: dict[int, list[Moment]] = {}
        for commit in sorted(commits, key=lambda moment: moment.t1):
            ended.setdefault(bucket(commit), []).append(commit)
        at: dict[int, tuple[int, Moment | None]] = {}
        for moment in sorted(later, key=lambda moment: moment.t0):
            mine = bucket(moment)
            if mine < 0:
                continue
            index, best = at.get(mine, (0, None))
            row = ended.get(mine, [])
            while index < len(row) and row[index].t1 < moment.t0:
                best = row[index] if best is None or row[index].offset > best.offset else best
                index += 1
            at[mine] = (index, best)
            if best is not None and moment.offset < best.offset:
                yield mine, best, moment

    def _beyond(self, share: Share, where: str) -> None:
        """K7: nobody commits what is not there yet, by the watermarks told and by what was sent only later."""
        acks = share.lane.acks
        sent = sorted(zip(acks["t0"], acks["low"], strict=True))
        lowest = 2**62
        floor: list[int] = []  # floor[i]: least offset among sends from number i on
        for _, low in reversed(sent):
            lowest = min(lowest, low)
            floor.append(lowest)
        floor.reverse()
        begins = [t0 for t0, _ in sent]
        for commit in accepted(share.commits):
            after = bisect_right(begins, commit.t1)
            told = f"{where}: {commit.proc} committed {commit.offset} at {seconds(commit.t1)}"
            if after < len(sent) and floor[after] < commit.offset:
                more = f"; offset {floor[after]} was sent later"
                self.findings.add("K7 commit beyond watermark", 1, told + more, commit.t1)
            elif 0 <= share.lane.high < commit.offset:
                more = f"; the watermark never passed {share.lane.high}"
                self.findings.add("K7 commit beyond watermark", 1, told + more, commit.t1)

    def _processed(self, share: Share, where: str) -> None:
        """K6: everything acknowledged from the group's start on was given to a member."""
        if share.start < 0 or not (share.claims or share.processed.pages):
            return
        for offset in share.lane.acked.missing(share.processed):
            if offset >= max(share.start, share.lane.start):
                told = f"{where} offset {offset}, value {share.lane.value_at(offset)}"
                self.findings.add("K6 not processed", 1, told)

    def _converged(self, name: str, group: Group) -> None:
        """K5: at the end of each calm, the members' last views own every partition once, in one generation."""
        for calm in group.calms:
            last: dict[str, Op] = {}
            for proc in sorted(group.views):
                seen = [view for view in group.views[proc] if view.t1 <= calm.t1]
                if seen and max(seen, key=lambda view: view.t1).generation >= 0:
                    last[proc] = max(seen, key=lambda view: view.t1)
            generations = sorted({view.generation for view in last.values()})
            owned = [part for view in last.values() for part in view.owned]
            wrong = [f"{topic}/{part} has no owner" for topic, part in sorted(set(calm.owned) - set(owned))]
            wrong += [f"{topic}/{part} has two owners" for topic, part in doubled(owned)]
            if len(generations) > 1:
                wrong.append(f"generations {listed(generations)}")
            if wrong:
                told = f"{name} at {seconds(calm.t1)}: {listed(wrong[:5])}"
                self.findings.add("K5 no convergence", 1, told, calm.t1)


def accepted(commits: Iterable[Moment]) -> list[Moment]:
    """Commits that were answered with yes."""
    return [commit for commit in commits if commit.type == OK]


def doubled(parts: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """What occurs more than once."""
    return sorted({part for part in parts if parts.count(part) > 1})
