"""What the partitions of this broker show at a scrape, with what takes more than a look at their cores: ages, which are
read from the log, and whose dead letters a topic holds, which the metadata says."""

from __future__ import annotations

from itertools import islice

from ferryline.protocol.dead_letters import dead_letters_of
from ferryline.protocol.errors import FerrylineError
from ferryline.protocol.messages import RECORDS
from ferryline_broker.clock import wall_ms
from ferryline_broker.core.events import Key
from ferryline_broker.driver import PartitionDriver
from ferryline_broker.hosted import HostedReplica
from ferryline_broker.partition_metrics import PartitionGauges
from ferryline_broker.view import ClusterView

REDRIVE_GROUP = "dead-letters"  # what it has settled was redriven; the name is the client's, too
_MARKS_MAX = 16  # beginnings of epochs, one after the other, before the first record
_READS_MAX = 500  # of batch headers at one scrape; a record that is first for long is looked at once


class Gauges:
    """Call it at a scrape."""

    def __init__(self, partitions: PartitionDriver, view: ClusterView) -> None:
        self._partitions = partitions
        self._view = view
        self._times: dict[tuple[Key, str], tuple[int, int]] = {}  # first record of a group -> (offset, its time)
        self._position = (-1, -1)
        self._origins: dict[str, str] = {}
        self._reads = 0

    def __call__(self) -> list[PartitionGauges]:
        self._reads = 0
        origins, now = self._origins_now(), wall_ms()
        known, self._times = self._times, {}
        return [self._of(hosted, origins, known, now) for hosted in self._partitions.replicas.values()]

    def _of(
        self, hosted: HostedReplica, origins: dict[str, str], known: dict[tuple[Key, str], tuple[int, int]], now: int
    ) -> PartitionGauges:
        shown = hosted.gauges()
        primary = hosted.core.primary
        if primary is None or hosted.broken:
            return shown
        for group, at in shown.groups.items():
            shown.summed_ages_s[group] = self._age_s(hosted, group, max(at, shown.log_start), known, now)
        starts = primary.queues.starts() if primary.queues is not None else {}
        for group, at in starts.items():
            shown.queue_ages_s[group] = self._age_s(hosted, group, max(at, shown.log_start), known, now)
        shown.origin = origins.get(shown.topic)
        if shown.origin is not None:
            redriven = shown.queues.get(REDRIVE_GROUP)
            retained = shown.high_watermark - shown.log_start - shown.marks
            shown.letters = retained if redriven is None else redriven["unsettled"]
        return shown

    def _age_s(
        self, hosted: HostedReplica, group: str, offset: int, known: dict[tuple[Key, str], tuple[int, int]], now: int
    ) -> float:
        """How long ago the record at ``offset`` was sent; 0 where there is none. By its sender's clock."""
        if offset >= hosted.core.high_watermark[RECORDS]:
            return 0.0
        key = (hosted.key, group)
        found = known.get(key)
        if (found is None or found[0] != offset) and self._reads < _READS_MAX:
            self._reads += 1
            found = _time_at(hosted, offset)
        if found is None:
            return 0.0
        self._times[key] = found
        if found[1] <= 0:  # its sender said no time
            return 0.0
        return max(0, now - found[1]) / 1000

    def _origins_now(self) -> dict[str, str]:
        """Topic of dead letters -> topic that they come from, "" where there are several."""
        if self._position != self._view.position:
            self._position, self._origins = self._view.position, {}
            for topic in self._view.metadata.topics.values():
                target = dead_letters_of(topic.name, topic.config.retry)
                if target != topic.name:
                    self._origins[target] = "" if target in self._origins else topic.name
        return self._origins


def _time_at(hosted: HostedReplica, offset: int) -> tuple[int, int] | None:
    """(offset, time) of the first batch from there on that holds records, if there is one close by."""
    try:
        for header in islice(hosted.logs[RECORDS].batch_headers(offset), _MARKS_MAX):
            if not header.is_control:
                return offset, header.base_timestamp
    except FerrylineError:  # whoever reads the records finds it, and says so
        return None
    return None
