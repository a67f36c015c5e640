"""What a run looks like: the configuration that is asked for, and the weather that its seed draws.

Swarm testing: every seed switches whole classes of faults off and draws its own rates and times for the others, so that
rare combinations get seeds in which nothing else hides them.
"""

from __future__ import annotations

import random

import msgspec

from ferryline.protocol.metadata import FLUSH_FSYNC, FLUSH_REPLICATED
from tests.simulation.weather import Mischief


class Config(msgspec.Struct, frozen=True):
    """One row of the matrix, written ``2/1/fsync``, or ``2/1/fsync/queues``."""

    replication: int
    min_isr: int
    flush: str
    queues: bool = False

    @property
    def name(self) -> str:
        return f"{self.replication}/{self.min_isr}/{self.flush}{'/queues' * self.queues}"


ALL = tuple(
    Config(replication, min_isr, flush)
    for replication, min_isr in ((2, 1), (2, 2), (3, 2))
    for flush in (FLUSH_FSYNC, FLUSH_REPLICATED)
)


QUEUES = tuple(msgspec.structs.replace(config, queues=True) for config in ALL)
QUEUES_SHARE = 0.35  # of the seeds of a campaign over all configurations


def config_of(configs: list[Config], seed: int) -> Config:
    """Whose turn it is; of all six, for a share of the seeds with queues."""
    config = configs[seed % len(configs)]
    if configs == list(ALL) and random.Random(f"queues or not {seed}").random() < QUEUES_SHARE:
        return msgspec.structs.replace(config, queues=True)
    return config


def parse_configs(text: str) -> list[Config]:
    """``all``, ``queues`` (all with queues), or names separated by commas. Raises ValueError naming what is unknown."""
    if text in ("all", "queues"):
        return list(ALL if text == "all" else QUEUES)
    known = {config.name: config for config in ALL + QUEUES}
    found = []
    for name in text.split(","):
        if name not in known:
            raise ValueError(f"configuration {name!r} is none of {', '.join(known)}")
        found.append(known[name])
    return found


FAULTS = (
    "kill",  # kill -9: what was written stays
    "kill_mid_step",  # the same between two effects of one step
    "power_cut",  # what was not synced is lost, wholly or in part
    "power_cut_all",  # of all brokers at the same moment
    "kill_all",
    "pause",  # SIGSTOP, SIGCONT
    "stop",  # SIGTERM: hand over, then leave; started again later
    "cut_pair",  # no frames between two hosts
    "cut_one_way",
    "isolate",  # one host from all others
    "end_sessions",  # resets
    "false_probe",  # the coordinator takes a healthy broker for dead
    "coordinator_kill",  # between any two effects, so before or after a commit
    "coordinator_pause",
    "zombie",  # the coordinator stands still while a successor takes over, then goes on
    "lose_disk",  # a broker comes back with an empty disk
    "foreign_disk",  # a broker comes back under its number with another disk
    "write_error",
    "sync_error",
    "disk_full",
    "slow_disk",
    "grow",  # more partitions
    "move",  # replicas of a partition go elsewhere
    "drain",  # a broker is asked to give everything up; later it is not any more
    "add_broker",
    "producer_joins",  # with a burst, so that the first batches of an unknown producer meet changes
    "consumer_dies",
    "consumer_joins",
    "recreate",  # the topic is deleted, and another one gets its name
    "rot",  # a bit of a batch flips on one disk
    "wall_jump",  # the wall clock of one broker is set, by seconds or by months
    "producer_pause",
    "consumer_pause",  # long enough to lose its partitions, then it goes on as if nothing was
)


# Fields of the weather that perturb by themselves, without a fault of the tape: shrinking sets them to 0.
RATES = frozenset(("loss", "double", "session_loss", "slow", "slow_flush", "drift", "unknown", "ambush"))


class Weather(msgspec.Struct):
    """What one seed draws. Times in ms unless the name says otherwise; probabilities are per frame or per event."""

    brokers: int
    partitions: int
    producers: int
    members: int
    produce_gap_ms: int
    duration_ms: int
    # network
    ordered: dict[str, bool]
    loss: float
    double: float
    session_loss: float
    delay_us: int
    slow: float
    slow_us: int
    late_us: int
    session_patience_ms: int
    drift: float
    # disks
    flush_us: int
    slow_flush: float
    slow_flush_us: int
    real_log: bool
    holes: bool  # a power cut may keep later pages and lose earlier ones
    # times of the product
    lag_max_ms: int
    fence_ms: int
    handover_ms: int
    fetch_wait_ms: int
    metadata_wait_ms: int
    snapshot_bytes: int
    # faults
    ambush: float  # per proposal, flush of a primary, truncation and promotion: something happens just then
    fault_gap_ms: int
    fault_ms: int
    weights: dict[str, float]
    # see weather.py
    profile: str = ""
    mischief: Mischief = msgspec.field(default_factory=Mischief)
    # what the world does besides
    chores_ms: int = 0  # how often brokers look at retention and scrub; 0: never
    retention_ms: int = -1
    retention_bytes: int = -1
    unknown: float = 0.0  # commits of the coordinator after which nobody knows whether they were written


def draw(rng: random.Random, config: Config, *, real_log: bool = False) -> Weather:
    """The weather of a seed."""

    def some(*choices: int) -> int:
        return choices[int(rng.random() * len(choices))]

    def maybe(probability: float, value: float) -> float:
        return value if rng.random() < probability else 0.0

    weights = {name: rng.random() ** 2 if rng.random() < 0.55 else 0.0 for name in FAULTS}
    for common in ("kill", "power_cut", "pause", "cut_pair", "cut_one_way"):
        weights[common] *= 3
    for rare in (
        "power_cut_all",
        "kill_all",
        "lose_disk",
        "foreign_disk",
        "grow",
        "move",
        "drain",
        "add_broker",
        "recreate",
        "rot",
    ):
        weights[rare] *= 0.4
    for churn in ("consumer_dies", "consumer_joins", "consumer_pause"):
        weights[churn] *= 1.5
    lossy = rng.random() < 0.75
    return Weather(
        brokers=config.replication + some(0, 0, 0, 1, 1, 2),
        partitions=some(1, 1, 2, 3),
        producers=some(1, 2, 2, 3),
        members=some(0, 1, 2, 2, 3),
        produce_gap_ms=some(40, 100, 250, 600),
        duration_ms=some(12_000, 22_000, 36_000),
        ordered={"replica": rng.random() < 0.4, "coordinator": rng.random() < 0.5},
        loss=some(2, 5, 12) / 100 if lossy else 0.0,
        double=some(2, 5, 12) / 100 if lossy else 0.0,
        session_loss=maybe(0.6, 0.01 * rng.random()),
        delay_us=some(200, 1_000, 3_000, 20_000),
        slow=maybe(0.9, 0.2 + 0.7 * rng.random()),
        slow_us=some(2_000, 10_000, 50_000, 500_000),
        late_us=some(5_000, 100_000, 2_000_000),
        session_patience_ms=some(1_000, 3_000, 10_000),
        drift=0.01,
        flush_us=some(200, 1_000, 8_000),
        slow_flush=maybe(0.7, 0.4 * rng.random()),
        slow_flush_us=some(20_000, 200_000, 3_000_000),
        real_log=real_log,
        holes=rng.random() < 0.3,
        lag_max_ms=some(1_500, 4_000, 10_000),
        fence_ms=some(1_500, 3_000, 3_000),
        handover_ms=some(100, 300, 1_000),
        fetch_wait_ms=some(500, 2_000, 5_000),
        metadata_wait_ms=some(1_000, 5_000, 30_000),
        snapshot_bytes=some(600, 4_000, 1 << 20),
        ambush=maybe(0.5, 0.12 * rng.random()),
        fault_gap_ms=some(100, 250, 600, 2_000),
        fault_ms=some(200, 800, 2_500, 6_000),
        weights=weights,
        chores_ms=some(300, 1_000, 2_500),
        retention_ms=some(-1, -1, 3_000, 8_000),
        retention_bytes=some(-1, -1, 500, 2_000),
        unknown=maybe(0.4, 0.06 * rng.random()),
    )
