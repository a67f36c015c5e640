"""Spoil the files of a copy in every way and see what happens: `python -m tests.integration.flip_campaign`.

Each flip takes a copy that a broker has left behind (several segments, epochs and a snapshot, acknowledged up to its
end), does one thing to its files while it is closed or open, and goes on with the product's own recovery, reader,
scrubber and audit. It must be **detected**, or **harmless**: the copy still holds what it held, or comes back shorter
and gets the rest from the other copy. A copy that serves a wrong byte, that differs without anybody noticing, or that
lacks something acknowledged after it was fetched again, breaks the run. Exit status 1 then.

One JSON line for each run is appended to ``benchmarks/results/flip-ledger.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ferryline.protocol.errors import CorruptBatch, FerrylineError
from ferryline.protocol.messages import LOG_OK, RECORDS, STATE
from ferryline.protocol.records import encode_batch, read_header, split_batches
from ferryline_broker.core.producers import ProducerTable
from ferryline_broker.digests import Walk
from ferryline_broker.log.files import FileStorage
from ferryline_broker.log.model import LogConfig
from ferryline_broker.log.partition_log import PartitionLog
from ferryline_broker.log.replica_store import LOGS, ReplicaStore, quarantine
from ferryline_broker.log.scrubber import Scrubber

LEDGER = Path(__file__).resolve().parents[2] / "benchmarks/results/flip-ledger.jsonl"
TOPIC = "ab" * 16
FOLDER = f"partitions/{TOPIC}-0"
TEMPLATES = 12
READ_BYTES = 3_000
BROKEN = ("wrong bytes served", "silent", "acknowledged lost", "crashed")

Truth = tuple[list[bytes], list[bytes]]  # the batches of each log


@dataclass
class Template:
    """A copy as a broker left it, one of its earlier states, and what it holds."""

    now: Path
    before: Path
    truth: Truth
    config: LogConfig
    checkpointed: tuple[int, int]  # log ends when the checkpoint was written
    seen_epoch: int
    expired: int  # batches of the records log that retention had removed by then; older copies may still hold them


def build(folder: Path, seed: int) -> Template:
    """A replica with history: several epochs, rolls, retention now and then, and a tail above the checkpoint."""
    draw = random.Random(f"template {seed}")
    flush = "replicated" if seed % 3 == 2 else "fsync"
    config = LogConfig(segment_bytes=draw.choice([4_000, 9_000, 40_000]), segment_ms=-1, retention_ms=-1, flush=flush)
    storage = FileStorage(str(folder / "now"))
    store = ReplicaStore.open(storage, "", TOPIC, 0, config)
    table, epoch, checkpointed = ProducerTable(), 1, (0, 0)
    store.persist_epoch(epoch)
    batches = draw.randint(30, 120)
    for number in range(batches):
        if draw.random() < 0.08:
            epoch += draw.randint(1, 3)
            store.persist_epoch(epoch)
        for log in (RECORDS, STATE):
            if log == RECORDS or draw.random() < 0.4:
                _append(store.logs[log], draw, epoch, number, table if log == RECORDS else None)
        if draw.random() < 0.1:
            checkpointed = store.flush()
            store.write_checkpoint(*checkpointed)
        if number == batches // 2:
            store.flush()
            store.write_producer_snapshot(table.snapshot())
            shutil.copytree(folder / "now", folder / "before")
    truth = (_contents(store.records), _contents(store.state))
    if seed % 4 == 1 and len(store.records.segments) > 3:
        store.records.advance_start(store.records.segments[1].next_offset)
    store.flush()
    if seed % 2:
        checkpointed = (store.records.log_end, store.state.log_end)
        store.write_checkpoint(*checkpointed)  # a clean stop
    meta = store.recovery  # nothing was found wrong while it was written
    assert meta.log_state == LOG_OK, meta
    expired = len(truth[RECORDS]) - len(_contents(store.records))
    store.close()
    return Template(folder / "now", folder / "before", truth, config, checkpointed, epoch, expired)


def _append(log: PartitionLog, draw: random.Random, epoch: int, number: int, table: ProducerTable | None) -> None:
    rows = [(b"%d" % row, draw.randbytes(draw.choice([0, 20, 200])), []) for row in range(draw.randint(1, 9))]
    data = encode_batch(
        rows, base_offset=log.log_end, epoch=epoch, timestamp_ms=number, producer=(7, 0, number), codec="none"
    )
    header = read_header(data)
    log.append(data, [(0, header)])
    if table is not None:
        table.observe(header)


def _contents(log: PartitionLog) -> list[bytes]:
    found: list[bytes] = []
    offset = log.log_start
    while offset < log.log_end:
        data = log.read(offset, READ_BYTES, log.log_end)
        for at, header in split_batches(data):
            found.append(data[at : at + header.size])
            offset = header.next_offset
    return found


# -- what is done to files ---------------------------------------------------------------------------

Deed = Callable[[random.Random, Template, Path, Path], str]  # (chance, template, folder of the copy, file) -> what


def _flip(draw: random.Random, _: Template, __: Path, path: Path) -> str:
    data = bytearray(path.read_bytes())
    if not data:
        return _lengthen(draw, _, __, path)
    for _number in range(draw.choice([1, 1, 1, 2, 5])):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    _overwrite(path, data)
    return "flip"


def _flip_in_a_header(draw: random.Random, template: Template, folder: Path, path: Path) -> str:
    """Where no batch CRC looks: base offset, length, epoch, magic; or in the CRC itself."""
    data = bytearray(path.read_bytes())
    try:
        batches = split_batches(bytes(data), verify=False)
    except CorruptBatch:
        batches = []
    if path.suffix != ".log" or not batches:
        return _flip(draw, template, folder, path)
    data[draw.choice(batches)[0] + draw.randrange(21)] ^= 1 << draw.randrange(8)
    _overwrite(path, data)
    return "flip in a header"


def _garble(draw: random.Random, _: Template, __: Path, path: Path) -> str:
    data = bytearray(path.read_bytes())
    at = draw.randrange(len(data) + 1)
    piece = draw.choice([bytes(512), draw.randbytes(draw.randint(1, 600))])
    data[at : at + len(piece)] = piece[: len(data) - at]
    _overwrite(path, data)
    return "garble"


def _truncate(draw: random.Random, _: Template, __: Path, path: Path) -> str:
    with path.open("r+b") as file:
        file.truncate(draw.randrange(path.stat().st_size + 1))
    return "truncate"


def _lengthen(draw: random.Random, _: Template, __: Path, path: Path) -> str:
    with path.open("ab") as file:
        file.write(draw.choice([bytes(700), draw.randbytes(700)]))
    return "lengthen"


def _remove(draw: random.Random, _: Template, __: Path, path: Path) -> str:
    path.unlink()
    return "remove"


def _restore_file(draw: random.Random, template: Template, folder: Path, path: Path) -> str:
    old = template.before / path.relative_to(folder)
    if not old.exists():
        return _remove(draw, template, folder, path)
    _overwrite(path, bytearray(old.read_bytes()))
    return "old file"


def _restore_all(_: random.Random, template: Template, folder: Path, __: Path) -> str:
    shutil.rmtree(folder)
    shutil.copytree(template.before, folder)
    return "old copy"


def _swap(draw: random.Random, template: Template, folder: Path, path: Path) -> str:
    """Two files of one kind change places."""
    others = [one for one in sorted(path.parent.glob(f"*{path.suffix}")) if one != path and one.is_file()]
    if not others:
        return _flip(draw, template, folder, path)
    other = draw.choice(others)
    mine, theirs = path.read_bytes(), other.read_bytes()
    _overwrite(path, bytearray(theirs))
    _overwrite(other, bytearray(mine))
    return "swap"


def _overwrite(path: Path, data: bytearray) -> None:
    with path.open("r+b") as file:  # the same file, so that whoever has it open sees it
        file.write(data)
        file.truncate(len(data))


STOPPED: list[tuple[Deed, int]] = [
    (_flip, 30), (_flip_in_a_header, 25), (_garble, 10), (_truncate, 15), (_lengthen, 5), (_remove, 10),
    (_restore_file, 8), (_restore_all, 3), (_swap, 4),
]  # fmt: skip
RUNNING: list[tuple[Deed, int]] = [
    (_flip, 35), (_flip_in_a_header, 30), (_garble, 10), (_truncate, 15), (_lengthen, 3), (_remove, 7)
]  # fmt: skip


def spoil(draw: random.Random, template: Template, folder: Path, deeds: list[tuple[Deed, int]]) -> tuple[str, str]:
    """Do one thing to one file, mostly of the logs; (what, to which kind of file)."""
    files = sorted(path for path in (folder / FOLDER).rglob("*") if path.is_file())
    logs = [path for path in files if path.suffix == ".log"]
    path = draw.choice(logs if draw.random() < 0.6 else files)
    (deed,) = draw.choices([deed for deed, _ in deeds], [weight for _, weight in deeds])
    kind = path.suffix[1:] or path.name.partition("-")[0]
    return deed(draw, template, folder, path), kind


# -- what comes of it --------------------------------------------------------------------------------


class Served:
    """What readers get, with the checks that clients and secondaries make themselves; anything else is a wrong byte."""

    def __init__(self, truth: Truth) -> None:
        self._truth = [{read_header(data).base_offset: data for data in batches} for batches in truth]
        self.wrong = ""

    def read(self, log: PartitionLog, number: int) -> str:
        """Read everything; how it was noticed that something is wrong, "" if it was not."""
        offset, end = log.log_start, min(log.log_end, self._end(number))
        while offset < end:
            try:
                data = log.read(offset, READ_BYTES, log.log_end)
            except FerrylineError:
                return "by a read"
            try:
                batches = split_batches(data)
            except CorruptBatch:
                return "by a reader's checksum"
            for at, header in batches:
                if not header.base_offset <= offset < header.next_offset:
                    return "by a reader's position"
                there = self._truth[number].get(header.base_offset)
                found = data[at : at + header.size]
                if there is None or not _same_records(there, found):
                    self.wrong = f"{LOGS[number]} offset {header.base_offset}"
                offset = header.next_offset
            if not batches:
                return "by a read"
        return ""

    def _end(self, number: int) -> int:
        truth = self._truth[number]
        return max((read_header(data).next_offset for data in truth.values()), default=0)


def _same_records(there: bytes, found: bytes) -> bool:
    """Equal but for the epoch, which tells replicas something and readers nothing."""
    return there[:12] == found[:12] and there[16:] == found[16:]


def audit(log: PartitionLog, truth: list[bytes], ends_at: int) -> str:
    """What a walk over the disk, and the comparison with the other copy, notice."""
    walk = Walk(log, log.log_start, min(log.log_end, ends_at), 2**40, producer=Walk.ALL)
    for _ in walk.steps():
        pass
    if walk.found.wrong is not None:
        return "by the audit"
    known = {header.base_offset: header for header in map(read_header, truth)}
    differs = any(known.get(header.base_offset) != header for header in walk.found.batches)
    return "by comparing copies" if differs else ""


def scrub(log: PartitionLog) -> str:
    """A whole round of the scrubber."""
    scrubber = Scrubber(log)
    while not scrubber.rounds:
        if scrubber.step() is not None:
            return "by the scrubber"
    return ""


def noticed(store: ReplicaStore, served: Served, truth: Truth) -> str:
    """How somebody notices that this copy is not what it should be; "" if nobody does."""
    if store.recovery.log_state != LOG_OK:
        return "at start"
    for number in (RECORDS, STATE):
        if how := served.read(store.logs[number], number):
            return how
    for number in (RECORDS, STATE):
        if how := scrub(store.logs[number]) or audit(store.logs[number], truth[number], end_of(truth[number])):
            return how
    return ""


def end_of(batches: list[bytes]) -> int:
    return read_header(batches[-1]).next_offset if batches else 0


class Case:
    """One flip. ``outcome`` is how it ended, ``story`` what was done."""

    def __init__(self, template: Template, draw: random.Random, folder: Path) -> None:
        self.template, self.draw, self.folder = template, draw, folder
        self.served = Served(template.truth)
        self.what = self.kind = self.outcome = self.story = ""
        self.running = draw.random() < 0.4

    def run(self) -> None:
        """Spoil, look, mend, and look whether everything acknowledged is there."""
        shutil.copytree(self.template.now, self.folder)
        self.storage = FileStorage(str(self.folder))
        how = self._while_running() if self.running else self._spoil(STOPPED)
        store = self._open()
        how = how or self._judge(store)
        if self.served.wrong:
            how = "wrong bytes served"
        self.outcome = how
        self._mend(store, whole=how in ("harmless", "shorter"))
        if how not in BROKEN and not self._complete():
            self.outcome = "acknowledged lost"
        self.story = f"{self.what} of {self.kind} {'under a running' if self.running else 'of a stopped'} broker"

    def _spoil(self, deeds: list[tuple[Deed, int]]) -> str:
        self.what, self.kind = spoil(self.draw, self.template, self.folder, deeds)
        return ""

    def _open(self) -> ReplicaStore:
        return ReplicaStore.open(self.storage, "", TOPIC, 0, self.template.config)

    def _while_running(self) -> str:
        """The broker has the files open, has perhaps read and scrubbed them, and writes a checkpoint afterwards."""
        store, truth = self._open(), self.template.truth
        assert store.recovery.log_state == LOG_OK, store.recovery
        if self.draw.random() < 0.5:
            assert noticed(store, Served(truth), truth) == "", "nothing was done yet"
        self._spoil(RUNNING)
        how = noticed(store, self.served, truth)
        try:
            store.write_checkpoint(store.records.log_end, store.state.log_end)
        except FerrylineError:
            pass
        store.close()
        return how

    def _judge(self, store: ReplicaStore) -> str:
        template = self.template
        if how := noticed(store, self.served, template.truth):
            return how
        old = self.what in ("old file", "old copy")
        if store.seen_epoch < template.seen_epoch and not old:
            return "silent"
        short = False
        for log, batches, checkpointed in zip(store.logs, template.truth, template.checkpointed, strict=True):
            if log.log_end < end_of(batches):
                short = True
                if log.log_end < checkpointed and not old:
                    return "silent"  # trusted as flushed, gone, and nobody says so
        return "shorter" if short else "harmless"

    def _mend(self, store: ReplicaStore, *, whole: bool) -> None:
        """Fetch from the other copy what is missing: the tail, or everything after the files were set aside."""
        if not whole:
            store.close()
            quarantine(self.storage, "", TOPIC, 0, self.outcome)
            store = self._open()
            assert store.recovery.log_state == LOG_OK, store.recovery
        store.persist_epoch(self.template.seen_epoch)  # as before anything is done in an epoch
        for number, log in enumerate(store.logs):
            kept = self._kept(number)
            if kept and (not whole or log.log_end < read_header(kept[0]).base_offset):
                log.reset(read_header(kept[0]).base_offset)  # as a secondary that is too far behind (rule F6)
            for data in kept:
                header = read_header(data)
                if header.base_offset >= log.log_end:
                    log.append(data, [(0, header)])
        store.flush()
        store.close()

    def _complete(self) -> bool:
        store = self._open()
        try:
            found = (_contents(store.records), _contents(store.state))
        finally:
            store.close()
        for number, mine in enumerate(found):
            kept = self._kept(number)
            if kept and mine[-len(kept) :] != kept:
                return False
        return True

    def _kept(self, number: int) -> list[bytes]:
        """What the other copy still has."""
        return self.template.truth[number][self.template.expired if number == RECORDS else 0 :]


# -- the campaign ------------------------------------------------------------------------------------


def campaign(first: int, flips: int, folder: Path) -> tuple[Counter[str], Counter[str], list[str]]:
    """(outcomes, what was done, stories of what broke)."""
    templates: dict[int, Template] = {}
    outcomes: Counter[str] = Counter()
    deeds: Counter[str] = Counter()
    broken: list[str] = []
    for seed in range(first, first + flips):
        number = seed % TEMPLATES
        if number not in templates:
            templates[number] = build(folder / f"template-{number}", number)
        case = Case(templates[number], random.Random(seed), folder / "copy")
        try:
            case.run()
        except Exception as error:
            case.outcome = "crashed"
            case.story = f"{case.what} of {case.kind}: {type(error).__name__}: {error}"
        shutil.rmtree(folder / "copy", ignore_errors=True)
        outcomes[case.outcome] += 1
        deeds[f"{case.what}, {'running' if case.running else 'stopped'}"] += 1
        if case.outcome in BROKEN:
            broken.append(f"seed {seed}: {case.outcome}: {case.story}")
    return outcomes, deeds, broken


def commit_id() -> str:
    """What was tested; a plus sign where the tree had changes."""
    root = LEDGER.parents[2]

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=False).stdout.strip()

    return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "services", "sdk") else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--flips", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1, help="the first one")
    parser.add_argument("--folder", type=Path, help="where the copies lie meanwhile, e.g. /dev/shm")
    parser.add_argument("--no-ledger", action="store_true")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ferryline-flips-", dir=options.folder) as folder:
        outcomes, deeds, broken = campaign(options.seed, options.flips, Path(folder))
    bad = sum(outcomes[name] for name in BROKEN)
    line = {
        "first_seed": options.seed,
        "flips": options.flips,
        "commit": commit_id(),
        "seconds": round(time.monotonic() - began),
        "broken": bad,
        "outcomes": dict(sorted(outcomes.items())),
        "deeds": dict(sorted(deeds.items())),
    }
    for name, count in outcomes.most_common():
        sys.stdout.write(f"{count:8,}  {name}\n")
    for story in broken[:20]:
        sys.stdout.write(f"BROKEN {story}\n")
    sys.stdout.write(f"{options.flips - bad} of {options.flips} were detected or harmless\n")
    if not options.no_ledger:
        with LEDGER.open("a") as ledger:
            ledger.write(json.dumps(line) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
