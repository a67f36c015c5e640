"""Timings and bounds of the coordinator's core, in ms and counts. The service's settings fill them in."""

from __future__ import annotations

from dataclasses import dataclass

from ferryline.protocol.access import AccessPolicy


@dataclass(frozen=True, slots=True)
class CoreConfig:
    """Times follow replication.md, section 8; each may be shortened in tests as long as the relations hold."""

    heartbeat_ms: int = 500  # told to brokers
    fence_ms: int = 3_000  # silence after which a broker is fenced (T_fence)
    probe_ms: int = 300  # a probe without answer after this long has failed
    replacement_ms: int = 30_000  # a lost replica is replaced after this long
    balance_ms: int = 1_000  # how often placement is looked at
    preferred_ms: int = 5_000  # a returned broker gets its primaries back after being up and in sync for this long
    handover_retry_ms: int = 2_000  # a primary that was asked to hand over is asked again after this long
    moves_max: int = 10  # replicas that are catching up to move, at a time
    handovers_max: int = 8  # primaries that are asked to hand over, at a time
    changes_max: int = 20_000  # changed records kept for deltas; who is older gets everything
    parked_max: int = 20_000  # metadata requests that wait
    coordinators: tuple[str, ...] = ()  # URLs told to everybody
    recovery: str = "wait"  # for partitions without candidate: "wait" for an operator, or "balanced" on its own
    group_heartbeat_ms: int = 3_000  # told to members
    group_unsettled_ms: int = 250  # ... while partitions change hands
    session_ms_min: int = 500
    session_ms_max: int = 3_600_000
    members_max: int = 10_000  # of one group
    groups_max: int = 10_000
    brokers_max: int = 1_000
    topics_max: int = 10_000
    exchanges_max: int = 1_000
    bindings_max: int = 1_000  # of one exchange
    exchange_bytes_max: int = 1024 * 1024  # all exchanges with their bindings, encoded: one answer tells all of them
    partitions_max: int = 100_000  # of the cluster, times replication
    access: AccessPolicy | None = None  # what the access file says; None: everybody may do everything
    access_bytes_max: int = 3 * 1024 * 1024  # a policy, encoded: it is told in the header of one frame

    def __post_init__(self) -> None:
        if self.fence_ms < 2 * self.heartbeat_ms:
            raise ValueError(f"fence_ms: {self.fence_ms} is below two heartbeats of {self.heartbeat_ms} ms")
        if self.probe_ms >= self.fence_ms:
            raise ValueError(f"probe_ms: {self.probe_ms} is not below fence_ms {self.fence_ms}")
        if self.recovery not in ("wait", "balanced"):
            raise ValueError(f"recovery: {self.recovery!r} is neither 'wait' nor 'balanced'")
