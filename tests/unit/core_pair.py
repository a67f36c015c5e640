"""Two or more replicas of one partition wired by hand: perfect network, disks that flush when told to."""

from __future__ import annotations

from typing import Any

import msgspec

from ferryline.protocol import records
from ferryline.protocol.messages import RECORDS, STATE, AlterIsr, AlterIsrResult
from ferryline.protocol.metadata import FLUSH_FSYNC, PartitionMeta
from ferryline_broker.core import events as ev
from ferryline_broker.core.partition import LogOpened, OpenedReplica, PartitionCore, ReplicaConfig
from ferryline_broker.core.producers import ProducerTable

KEY = ("a" * 32, 0)


def part(primary: int, epoch: int, version: int, isr: tuple[int, ...], **changes: Any) -> PartitionMeta:
    base = PartitionMeta(KEY[0], KEY[1], (1, 2), primary, epoch, version, isr, min_isr=1, flush=FLUSH_FSYNC)
    return msgspec.structs.replace(base, **changes)


def batch(count: int = 1, producer: tuple[int, int, int] = (-1, -1, -1), value: bytes = b"v") -> bytearray:
    return records.encode_batch([(b"k", value, []) for _ in range(count)], producer=producer)


class Disk:
    """Batches of both logs as (header, bytes); `flush_now` False keeps flushes pending."""

    def __init__(self) -> None:
        self.logs: list[list[tuple[records.BatchHeader, bytes]]] = [[], []]
        self.flushed_to = [0, 0]
        self.seen_epoch = 0

    def end(self, log: int) -> int:
        return self.logs[log][-1][0].next_offset if self.logs[log] else 0


class Pair:
    """Runs cores until nothing is left to deliver. Effects of interest are kept in ``done``."""

    def __init__(self, brokers: tuple[int, ...] = (1, 2), config: ReplicaConfig | None = None) -> None:
        self.config = config or ReplicaConfig()
        self.disks = {b: Disk() for b in brokers}
        self.now = 1_000
        self.cores = {b: self._core(b) for b in brokers}
        self.live = {b: 10 + b for b in brokers}
        self.done: list[tuple[int, ev.Effect]] = []
        self.cut: set[int] = set()
        self.fenced: set[int] = set()
        self.hold_flush: set[int] = set()
        self.inbox: list[tuple[int, ev.Event]] = []

    def _core(self, broker: int) -> PartitionCore:
        opened = OpenedReplica(0, (LogOpened(), LogOpened()), ProducerTable())
        return PartitionCore(KEY, broker, self.config, opened)

    def restart(self, broker: int, watermark: tuple[int, int] = (0, 0)) -> None:
        disk = self.disks[broker]
        table = ProducerTable()
        for header, _ in disk.logs[RECORDS]:
            table.observe(header)
        logs = []
        for log in (RECORDS, STATE):
            starts: dict[int, int] = {}
            for header, _ in disk.logs[log]:
                starts.setdefault(header.epoch, header.base_offset)
            logs.append(LogOpened(0, disk.end(log), sorted(starts.items()), watermark[log]))
        opened = OpenedReplica(disk.seen_epoch, (logs[0], logs[1]), table)
        self.cores[broker] = PartitionCore(KEY, broker, self.config, opened)
        self.live[broker] += 100

    def meta(self, meta: PartitionMeta, *brokers: int) -> None:
        for broker in brokers or tuple(self.cores):
            live = {b: e for b, e in self.live.items() if b not in self.fenced}
            self.send(broker, ev.MetaReceived(meta, self.live[broker], 1, live))
        self.run()

    def send(self, broker: int, event: ev.Event) -> None:
        self.inbox.append((broker, event))

    def tell(self, broker: int, event: ev.Event) -> list[ev.Effect]:
        before = len(self.done)
        self.send(broker, event)
        self.run()
        return [effect for _, effect in self.done[before:]]

    def tick(self, by_ms: int) -> None:
        self.now += by_ms
        for broker in self.cores:
            self.send(broker, ev.Tick())
        self.run()

    def run(self) -> None:
        for _ in range(10_000):
            if not self.inbox:
                return
            broker, event = self.inbox.pop(0)
            effects = self.cores[broker].handle(event, self.now)
            for effect in effects:
                self._do(broker, effect)
        raise AssertionError("the cores never come to rest")

    def _do(self, broker: int, effect: ev.Effect) -> None:
        disk = self.disks[broker]
        self.done.append((broker, effect))
        match effect:
            case ev.Append(log, data, headers):
                for at, header in headers:
                    disk.logs[log].append((header, bytes(data[at : at + header.size])))
            case ev.Flush(log):
                if broker not in self.hold_flush:
                    disk.flushed_to[log] = disk.end(log)
                    self.send(broker, ev.Flushed(log, disk.end(log)))
            case ev.Truncate(log, offset):
                disk.logs[log] = [b for b in disk.logs[log] if b[0].next_offset <= offset]
            case ev.PersistEpoch(epoch):
                disk.seen_epoch = epoch
            case ev.ReplayState():
                entries = [
                    (record.offset, header.epoch, record.value or b"")
                    for header, raw in disk.logs[STATE]
                    if not header.is_control
                    for record in records.decode_batch(raw)
                ]
                self.inbox.insert(0, (broker, ev.StateReplayed(entries)))
            case ev.RebuildProducers():
                table = ProducerTable()
                for header, _ in disk.logs[RECORDS]:
                    table.observe(header)
                self.inbox.insert(0, (broker, ev.ProducersRebuilt(table)))
            case ev.SendFetch(to, fetch):
                if not {broker, to} & self.cut:
                    self.send(to, ev.FetchReceived(1, broker, self.live[broker], fetch))
            case ev.SendProgress(to, progress):
                if not {broker, to} & self.cut:
                    self.send(to, ev.ProgressReceived(1, broker, self.live[broker], progress))
            case ev.AwaitPassEnd():
                self.send(broker, ev.PassEnded())
            case ev.SendData(_, to, data, reads):
                if not {broker, to} & self.cut:
                    batches = tuple(self._read(disk, log, read) for log, read in enumerate(reads))
                    self.send(to, ev.DataReceived(broker, data, (batches[0], batches[1])))
            case _:
                pass

    def _read(self, disk: Disk, log: int, read: tuple[int, int, int] | None) -> ev.LogBatches:
        out, headers = b"", []
        if read is not None:
            for header, raw in disk.logs[log]:
                if read[0] <= header.base_offset < read[1]:
                    headers.append((len(out), header))
                    out += raw
        return ev.LogBatches(out, headers)

    # -- looking ------------------------------------------------------------------------------------

    def effects(self, kind: type[ev.Effect], broker: int | None = None) -> list[Any]:
        return [e for b, e in self.done if isinstance(e, kind) and broker in (None, b)]

    def produce(self, broker: int, token: int, data: bytearray | None = None, timeout_ms: int = 30_000) -> None:
        data = data if data is not None else batch()
        self.send(broker, ev.Produced(token, data, records.read_header(data), timeout_ms))
        self.run()

    def answers(self) -> dict[int, ev.Effect]:
        kinds = ev.AnswerProduce | ev.AnswerGroup | ev.AnswerBarrier | ev.Refuse
        found: dict[int, ev.Effect] = {}
        for _, effect in self.done:
            if isinstance(effect, kinds):
                assert effect.token not in found, f"token {effect.token} answered twice"
                found[effect.token] = effect
        return found

    def proposals(self) -> list[AlterIsr]:
        return [e.proposal for e in self.effects(ev.SendAlterIsr)]

    def answer_alter(self, broker: int, proposal: AlterIsr, accepted: bool, meta: PartitionMeta) -> None:
        result = AlterIsrResult(*KEY, proposal.request_id, accepted, 1, meta)
        self.send(broker, ev.AlterIsrAnswered(result))
        self.run()
