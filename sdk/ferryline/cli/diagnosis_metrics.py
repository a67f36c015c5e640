"""What `ferryline doctor` reads out of /metrics: disks, descriptors, copies, groups, queues, dead letters. Pure but for
`scrape`."""

from __future__ import annotations

import http.client
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from ferryline.cli.diagnosis import FAIL, OK, WARN, Finding, get
from ferryline.cli.quantities import show_size

FDS_MIN = 4096  # a broker holds one for each session, and some for each partition that is written
FDS_SHARE_MAX = 0.8
FLUSH_S_MAX = 0.1  # on the average; a disk that is fit for the purpose takes a hundredth of it
FLUSHES_MIN = 5
DISK_BYTES_MIN, DISK_SHARE_MIN = 2 * 1024**3, 0.10  # twice the reserve at which brokers refuse records
FAR_BEHIND_S = 300.0
MANUAL = "docs/operations.md"
_SAMPLE = re.compile(r"\A([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')

Sample = tuple[str, dict[str, str], float]


def parse(text: str) -> list[Sample]:
    """Samples of the text format: (name, labels, value)."""
    found = []
    for line in text.splitlines():
        match = _SAMPLE.match(line)
        if match and not line.startswith("#"):
            labels = {name: value for name, value in _LABEL.findall(match.group(2) or "")}
            found.append((match.group(1), labels, float(match.group(3))))
    return found


def scrape(url: str, ca: Path | None, token: str) -> tuple[list[Sample], int]:
    """Samples of one service, and the HTTP status; 0 for no answer."""
    try:
        status, _, body = get(url, "/metrics", ca, token)
    except (OSError, http.client.HTTPException):
        return [], 0
    return (parse(body.decode(errors="replace")), 200) if status == 200 else ([], status)


def total(samples: Iterable[Sample], name: str, by: str = "", **labels: str) -> dict[str, float]:
    """Sums of a metric by one label ("": of all), for samples with these labels."""
    sums: dict[str, float] = {}
    for sample, has, value in samples:
        if sample == name and all(has.get(label) == wanted for label, wanted in labels.items()):
            key = has.get(by, "")
            sums[key] = sums.get(key, 0.0) + value
    return sums


def one(samples: Iterable[Sample], name: str, default: float = 0.0) -> float:
    return next((value for sample, _, value in samples if sample == name), default)


def check_broker(what: str, samples: list[Sample]) -> list[Finding]:
    """One broker's process, disk and copies."""
    found = [*_disk(what, samples), *_process(what, samples)]
    stopped = total(samples, "ferryline_partition_replicas", "role").get("stopped", 0)
    if stopped:
        remedy = "Its log says why. Damaged copies: ferryline verify --repair."
        found.append(Finding(FAIL, what, f"{stopped:.0f} of its copies have stopped", remedy))
    flushes, spent = one(samples, "ferryline_flush_seconds_count"), one(samples, "ferryline_flush_seconds_sum")
    if flushes >= FLUSHES_MIN and spent / flushes > FLUSH_S_MAX:
        remedy = f"Every acknowledgement waits for it: give the data a faster disk, or flush=replicated; see {MANUAL}."
        found.append(Finding(WARN, what, f"its disk takes {spent / flushes * 1000:.0f} ms for a flush", remedy))
    return found or [Finding(OK, what, "disk, descriptors and copies are in order")]


def _disk(what: str, samples: list[Sample]) -> list[Finding]:
    free, size = one(samples, "ferryline_disk_free_bytes", -1), one(samples, "ferryline_disk_total_bytes")
    if free < 0 or not size:
        return []
    room = f"{show_size(int(free))} of {show_size(int(size))} are free"
    remedy = f"Free space, shorten retention (ferryline topic alter), or add a broker; see {MANUAL}, Disk filling."
    if one(samples, "ferryline_disk_full"):
        return [Finding(FAIL, what, f"its disk is full, records are refused: {room}", remedy)]
    if free < DISK_BYTES_MIN or free / size < DISK_SHARE_MIN:
        return [Finding(WARN, what, f"its disk is nearly full: {room}", remedy)]
    return []


def _process(what: str, samples: list[Sample]) -> list[Finding]:
    most, used = one(samples, "process_max_fds"), one(samples, "process_open_fds")
    if not most:
        return []
    remedy = (
        "Raise the limit: LimitNOFILE= in the unit, nofile in the container's ulimits, or ulimit -n; 65536 is good."
    )
    if used / most > FDS_SHARE_MAX:
        return [Finding(FAIL, what, f"it has {used:.0f} of {most:.0f} file descriptors in use", remedy)]
    if most < FDS_MIN:
        return [Finding(WARN, what, f"it may open only {most:.0f} file descriptors", remedy)]
    return []


def check_traffic(samples: list[Sample], members: Mapping[str, float], letters: Collection[str]) -> list[Finding]:
    """Groups, queues and dead letters of the whole cluster. ``members``: consumers by group. ``letters``: topics that
    hold dead letters."""
    found: list[Finding] = []
    behind = total(samples, "ferryline_group_lag_records", "group")
    late: dict[str, float] = {}
    for name, labels, value in samples:
        if name == "ferryline_group_lag_seconds":
            late[labels["group"]] = max(value, late.get(labels["group"], 0.0))
    for group, lag in sorted(behind.items()):
        since = f"{lag:,.0f} records behind, the oldest for {late.get(group, 0):.0f} s"
        if lag and not members.get(group):
            remedy = f"Start its consumers, or: ferryline group delete {group}"
            found.append(Finding(WARN, f"group {group}", f"has no members and is {since}", remedy))
        elif lag and late.get(group, 0) > FAR_BEHIND_S:
            remedy = f"More consumers (up to one a partition), or faster ones: ferryline group describe {group}"
            found.append(Finding(WARN, f"group {group}", f"is far behind: {since}", remedy))
    return [*found, *_queues(samples), *_dead_letters(samples, letters)]


def _queues(samples: list[Sample]) -> list[Finding]:
    found = []
    queues = sorted({(has["topic"], has["group"]) for name, has, _ in samples if name == "ferryline_queue_records"})
    for topic, group in queues:
        states = total(samples, "ferryline_queue_records", "state", topic=topic, group=group)
        what = f"queue {topic}/{group}"
        if states.get("parked"):
            remedy = f"See why, and send them on: ferryline dlq list {topic} --group {group}; ferryline dlq redrive"
            found.append(Finding(WARN, what, f"{states['parked']:.0f} parked records: their keys stand still", remedy))
        live = sum(total(samples, "ferryline_queue_receivers", topic=topic, group=group).values())
        if states.get("ready") and not live:
            remedy = f"Start its receivers, or: ferryline queue delete {topic} {group}"
            found.append(Finding(WARN, what, f"{states['ready']:.0f} records wait and nobody receives", remedy))
    return found


def _dead_letters(samples: list[Sample], letters: Collection[str]) -> list[Finding]:
    found = []
    for topic, count in sorted(total(samples, "ferryline_dead_letter_records", "topic").items()):
        if count and topic in letters:
            remedy = f"What went wrong stands in them: ferryline dlq list {topic.removesuffix('.dlq')}"
            found.append(Finding(WARN, f"topic {topic}", f"up to {count:,.0f} dead letters", remedy))
    return found
