"""A process that writes to a real disk is killed with -9 in the middle: what it flushed is there, whole."""

from __future__ import annotations

import multiprocessing
import random
from multiprocessing.connection import Connection
from pathlib import Path

from ferryline.protocol.messages import LOG_OK
from ferryline.protocol.records import read_header
from ferryline_broker.log.model import LogConfig
from ferryline_broker.log.replica_store import ReplicaStore
from ferryline_broker.log.storage import FileStorage
from unit.log_builders import TOPIC, batch, contents, headers_of

CONFIG = LogConfig(segment_bytes=20_000, segment_ms=-1, retention_ms=-1)
ROUNDS = 5
STEPS = 400  # of a life that is not cut short


def _write(root: str, told: Connection, seed: int) -> None:
    """Append, flush, checkpoint and cut, telling the flushed end after each flush, until killed."""
    rng = random.Random(seed)
    store = ReplicaStore.open(FileStorage(root), "", TOPIC, 0, CONFIG)
    store.snapshot_producers = lambda: b"table"
    log = store.records
    store.persist_epoch(seed)
    told.send(("open", log.log_end))
    for _ in range(STEPS):
        data = bytearray()
        offset = log.log_end
        for _ in range(rng.randint(1, 4)):
            one = batch(offset, epoch=seed, value=b"x" * rng.randint(0, 500))
            data += one
            offset = read_header(one).next_offset
        log.append(data, headers_of(data))
        if rng.random() < 0.5:
            told.send(("flushed", log.flush()))
        if rng.random() < 0.1:
            store.write_checkpoint(log.flushed_end, 0)
        if rng.random() < 0.05:
            goal = max(log.log_start, log.log_end - rng.randint(1, 30))
            told.send(("cut", goal))  # told before: from now on only what is below is sure
            log.truncate(goal)
    told.recv()  # comes never: the other side kills


def test_what_was_flushed_survives_kill_9(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    rng = random.Random(3)
    for seed in range(1, ROUNDS + 1):
        mine, theirs = context.Pipe()
        process = context.Process(target=_write, args=(str(tmp_path), theirs, seed))
        process.start()
        theirs.close()
        sure = 0
        try:
            for _ in range(rng.randint(1, STEPS // 3)):
                what, offset = mine.recv()
                sure = min(sure, offset) // 3 * 3 if what == "cut" else offset
        finally:
            process.kill()
            process.join(30)
        while True:  # what it said between our last look and its end
            try:
                what, offset = mine.recv()
                sure = min(sure, offset) // 3 * 3 if what == "cut" else offset
            except EOFError:
                break
        mine.close()
        storage = FileStorage(str(tmp_path))
        store = ReplicaStore.open(storage, "", TOPIC, 0, CONFIG)
        assert store.recovery.log_state == LOG_OK, store.recovery
        assert store.seen_epoch == seed
        assert store.records.log_end >= sure
        found = contents(store.records, bytes_max=50_000)
        assert [read_header(one).base_offset for one in found] == list(range(0, store.records.log_end, 3))
        store.close()
        storage.close()
