"""The coordinator's metrics: counters fed by notes of the core, gauges read from its state when asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ferryline.protocol.metadata import NO_BROKER
from ferryline_coordinator.core.coordinator import CoordinatorCore
from ferryline_coordinator.core.events import Note
from ferryline_coordinator.views import under_replicated
from ferryline_service.histogram import Buckets, Histograms
from ferryline_service.metrics import ServiceMetrics

GROUPS_MAX = 1_000  # shown by name, the first ones in order; all others are `OTHERS`
OTHERS = "(others)"

# Notes of the core -> name of the counter and what it counts.
_COUNTED = {
    "elected": ("elections", "Primaries elected, or lost without a successor"),
    "fenced": ("fencings", "Brokers fenced"),
    "registered": ("registrations", "Broker registrations accepted"),
    "isr_changed": ("isr_changes", "Changes of in-sync sets asked for by primaries"),
    "excluded": ("exclusions", "Replicas excluded for lost or damaged data"),
    "frozen": ("freezes", "Times that elections were frozen because the store was behind the brokers"),
    "unclean_recovery": ("unclean_recoveries", "Recoveries that may have lost records"),
    "move_started": ("moves_started", "Replica moves begun"),
    "move_finished": ("moves_finished", "Replica moves finished"),
    "move_cancelled": ("moves_cancelled", "Replica moves given up"),
    "group_sessions_ended": ("group_sessions_ended", "Group members whose session ended in silence"),
}


class CoordinatorMetrics(ServiceMetrics):
    """`ServiceMetrics` plus what only a coordinator knows."""

    def __init__(self, core: Callable[[], CoordinatorCore | None]) -> None:
        super().__init__("coordinator")
        self.notes: dict[str, int] = dict.fromkeys(_COUNTED, 0)
        self.isr_shrinks = self.isr_expands = 0
        self.commit_seconds = Buckets()
        self.active: Callable[[], bool] = lambda: False
        self.terms_lost: Callable[[], int] = lambda: 0
        self.deposed: Callable[[], int] = lambda: 0
        text = "One commit of the store, with everything that was decided since the last"
        self.registry.register(Histograms({"ferryline_store_commit_seconds": (text, self.commit_seconds)}))
        self.registry.register(_State(self, core))

    def noted(self, note: Note) -> None:
        if note.name in self.notes:
            self.notes[note.name] += note.fields.get("count", 1)
        if note.name == "isr_changed":
            before, after = len(note.fields["before"]), len(note.fields["after"])
            self.isr_shrinks += after < before
            self.isr_expands += after > before


class _State(Collector):
    def __init__(self, metrics: CoordinatorMetrics, core: Callable[[], CoordinatorCore | None]) -> None:
        self._metrics = metrics
        self._core = core

    def collect(self) -> Iterator[Metric]:
        for note, (name, documentation) in _COUNTED.items():
            yield CounterMetricFamily(f"ferryline_{name}", documentation, value=self._metrics.notes[note])
        metrics = self._metrics
        shrinks = "In-sync sets that became smaller, as primaries asked"
        yield CounterMetricFamily("ferryline_isr_shrinks", shrinks, value=metrics.isr_shrinks)
        expands = "In-sync sets that became larger"
        yield CounterMetricFamily("ferryline_isr_expands", expands, value=metrics.isr_expands)
        active = metrics.active()
        yield GaugeMetricFamily("ferryline_coordinator_active", "1: this coordinator is the active one", value=active)
        lost = "Times that this coordinator had to give primaryship up"
        yield CounterMetricFamily("ferryline_primaryships_lost", lost, value=metrics.terms_lost())
        deposed = "Coordinators that this one deposed because their processes were gone"
        yield CounterMetricFamily("ferryline_coordinators_deposed", deposed, value=metrics.deposed())
        core = self._core()
        if core is None or not core.founded or not active:
            return  # a standby's picture is old: the active one tells
        state = core.state
        parts = [record.meta for record in state.parts.values()]
        brokers = [record.meta for record in state.brokers.values()]
        primaries = GaugeMetricFamily("ferryline_primaries", "Partitions led, by broker", labels=["broker"])
        replicas = GaugeMetricFamily("ferryline_replicas", "Replicas held, by broker", labels=["broker"])
        running = GaugeMetricFamily("ferryline_broker_running", "1 while the broker serves", labels=["broker"])
        for broker in brokers:
            running.add_metric([str(broker.id)], not broker.fenced)
            primaries.add_metric([str(broker.id)], state.led.get(broker.id, 0))
            replicas.add_metric([str(broker.id)], len(state.held.get(broker.id, ())))
        yield from (running, primaries, replicas, _members(core))
        missing = sum(under_replicated(part) for part in parts)
        gauges = {
            "brokers_registered": ("Brokers that are registered", len(brokers)),
            "brokers_running": ("Brokers that serve", sum(not broker.fenced for broker in brokers)),
            "topics": ("Topics", len(state.topics)),
            "partitions": ("Partitions", len(parts)),
            "partitions_in_sync": ("Partitions with all copies in sync", len(parts) - missing),
            "partitions_under_replicated": ("Partitions with a copy missing", missing),
            "partitions_offline": ("Partitions without primary", sum(part.primary == NO_BROKER for part in parts)),
            "partitions_moving": ("Partitions that move", sum(bool(p.adding or p.removing) for p in parts)),
            "partitions_frozen": ("Partitions that need recovery", sum(r.frozen for r in state.parts.values())),
            "consumers": ("Group members", core.groups.members()),
            "groups": ("Groups", len(state.groups)),
            "metadata_revision": ("Revision of the metadata", state.revision),
            "coordinator_epoch": ("Epoch of this coordinator", core.coord_epoch),
            "metadata_polls": ("Metadata requests that wait for a change", core.polls.parked),
        }
        for name, (documentation, value) in gauges.items():
            yield GaugeMetricFamily(f"ferryline_{name}", documentation, value=value)


def _members(core: CoordinatorCore) -> Metric:
    """How many members each group of log consumers has."""
    family = GaugeMetricFamily("ferryline_group_members", "Consumers in a group", labels=["group"])
    rest = 0
    for number, (name, group) in enumerate(sorted(core.state.groups.items())):
        if number < GROUPS_MAX:
            family.add_metric([name], len(group.members))
        else:
            rest += len(group.members)
    if rest:
        family.add_metric([OTHERS], rest)
    return family
