"""`ferryline cluster`: health, partitions and in-sync sets, from the metadata that every node serves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ferryline.cli.failures import FAILED, NOT_FOUND, Failed
from ferryline.cli.invocation import of
from ferryline.protocol.metadata import RESTORING

if TYPE_CHECKING:
    from ferryline.cli.settings import Settings
    from ferryline.protocol.metadata import ClusterMetadata, PartitionMeta

app = typer.Typer(no_args_is_help=True, help="Health, partitions and in-sync sets.")

ONLINE, MOVING, UNDER_REPLICATED, READ_ONLY, OFFLINE = "online", "moving", "under-replicated", "read-only", "offline"
RESTORED = "restoring"  # from a backup, and not led by anybody before that has ended
PARTITION_COLUMNS = ["topic", "partition", "state", "primary", "epoch", "replicas", "in_sync", "out_of_sync"]


async def metadata_of(settings: Settings) -> ClusterMetadata:
    """The cluster's records as the first node that answers has them."""
    from ferryline.cli.connection import connected

    async with connected(settings) as client:
        return client.routing.cluster


def state_of(part: PartitionMeta) -> str:
    """One word for how a partition does."""
    if part.recovery_epoch == RESTORING:
        return RESTORED
    if not part.primary:
        return OFFLINE
    if len(part.isr) < part.min_isr:
        return READ_ONLY
    settled = [broker for broker in part.replicas if broker not in part.adding]
    if any(broker not in part.isr for broker in settled):
        return UNDER_REPLICATED
    return MOVING if part.adding or part.removing else ONLINE


def partition_row(part: PartitionMeta, topic: str) -> dict[str, Any]:
    """A partition as every output form prints it."""
    return {
        "topic": topic,
        "partition": part.partition,
        "state": state_of(part),
        "primary": part.primary or None,
        "epoch": part.epoch,
        "replicas": list(part.replicas),
        "in_sync": list(part.isr),
        "out_of_sync": [broker for broker in part.replicas if broker not in part.isr],
        "min_isr": part.min_isr,
        "adding": list(part.adding),
        "removing": list(part.removing),
    }


def all_partitions(cluster: ClusterMetadata) -> list[dict[str, Any]]:
    """Rows of all partitions, by topic name."""
    topics = sorted(cluster.topics.values(), key=lambda topic: topic.name)
    return [partition_row(part, topic.name) for topic in topics for part in cluster.partitions_of(topic.id)]


@app.command()
def health(ctx: typer.Context) -> None:
    """One look: brokers, partitions, what is missing. Exit status 1 when records cannot be written everywhere."""
    from ferryline.cli.connection import run

    invocation = of(ctx)
    cluster = run(metadata_of(invocation.settings))
    states = [row["state"] for row in all_partitions(cluster)]
    fenced = sorted(broker.id for broker in cluster.brokers.values() if broker.fenced)
    broken = states.count(OFFLINE) + states.count(READ_ONLY) + states.count(RESTORED)
    degraded = states.count(UNDER_REPLICATED) + len(fenced)
    invocation.output.one(
        {
            "health": "broken" if broken else "degraded" if degraded else "good",
            "cluster": cluster.cluster_id,
            "coordinators": list(cluster.coordinators),
            "brokers": len(cluster.brokers),
            "fenced_brokers": fenced,
            "topics": len(cluster.topics),
            "partitions": len(states),
            "moving": states.count(MOVING),
            "under_replicated": states.count(UNDER_REPLICATED),
            "read_only": states.count(READ_ONLY),
            "offline": states.count(OFFLINE),
            "restoring": states.count(RESTORED),
            "revision": cluster.revision,
            "feature_level": cluster.feature_level,
        }
    )
    if broken:
        raise Failed(f"{broken} partitions refuse records", FAILED, remedy="ferryline doctor says more.")


@app.command()
def partitions(
    ctx: typer.Context,
    topic: Annotated[str | None, typer.Option(help="Only of this topic.")] = None,
    troubled: Annotated[bool, typer.Option("--troubled", help="Only those that are not fully in sync.")] = False,
) -> None:
    """Every partition with its primary, epoch and in-sync set.

    Example: ferryline cluster partitions --troubled
    """
    from ferryline.cli.connection import run

    invocation = of(ctx)
    cluster = run(metadata_of(invocation.settings))
    if topic is not None and cluster.topic(topic) is None:
        raise Failed(f"topic {topic!r} does not exist", NOT_FOUND, code="UNKNOWN_TOPIC")
    rows = [
        row
        for row in all_partitions(cluster)
        if topic in (None, row["topic"]) and not (troubled and row["state"] == ONLINE)
    ]
    empty = "all partitions are fully in sync" if troubled else "no partitions"
    invocation.output.rows(rows, columns=PARTITION_COLUMNS, empty=empty)


@app.command("in-sync")
def in_sync(ctx: typer.Context) -> None:
    """Per broker: how many partitions it is primary of, replicates, and follows in sync."""
    from ferryline.cli.connection import run

    invocation = of(ctx)
    cluster = run(metadata_of(invocation.settings))
    parts = list(cluster.partitions.values())
    invocation.output.rows(
        (
            {
                "broker": broker.id,
                "state": broker_state(broker),
                "primary_of": sum(part.primary == broker.id for part in parts),
                "replicas": sum(broker.id in part.replicas for part in parts),
                "in_sync": sum(broker.id in part.isr for part in parts),
                "behind": sum(broker.id in part.replicas and broker.id not in part.isr for part in parts),
            }
            for broker in sorted(cluster.brokers.values(), key=lambda broker: broker.id)
        ),
        empty="no brokers",
    )


def broker_state(broker: Any) -> str:
    """One word for how a broker does."""
    if broker.fenced:
        return "fenced"
    if broker.draining:
        return "draining"
    return "stopping" if broker.stopping else "running"


@app.command()
def upgrade(
    ctx: typer.Context,
    finish: Annotated[
        bool, typer.Option("--finish/--check", help="Say that the upgrade is over; or only look.")
    ] = False,
) -> None:
    """Which release every node runs, and whether the whole cluster can use what is new.

    A rolling upgrade: new programs on one node after the other, brokers first, each restarted when everything is in
    sync again (`rolling-restart`); then --finish. Until then every node may go back to the release before; afterwards
    older ones are refused. Exit status 1 with --check when somebody is behind.

    Example: ferryline cluster upgrade --check && ferryline cluster upgrade --finish
    """
    from ferryline.backup.calls import BackupCalls
    from ferryline.cli.connection import connected, run

    invocation = of(ctx)

    async def act() -> dict[str, Any]:
        async with connected(invocation.settings) as client:
            method, path = ("POST", "/v1/upgrade/finish") if finish else ("GET", "/v1/upgrade")
            found: dict[str, Any] = await BackupCalls(client, 0.0).coordinator(method, path, {} if finish else None)
            return found

    found = run(act())
    own = found["coordinator"]
    rows = [{"node": "coordinator", "running": True, **own}]
    rows += [{"node": f"broker {broker.pop('id')}", **broker} for broker in found["brokers"]]
    for row in rows:
        row["behind"] = row["feature_level"] < own["feature_level"]
    if invocation.output.for_people:
        invocation.output.rows(rows, columns=["node", "running", "feature_level", "behind"])
        level, possible = found["feature_level"], found["possible"]
        more = "; --finish raises it" if possible > level else ""
        invocation.output.done(f"the cluster runs at feature level {level}, and could run at {possible}{more}")
    else:
        invocation.output.one({**found, "brokers": rows[1:]})
    if found["behind"] and not finish:
        raise Failed(f"brokers {', '.join(map(str, found['behind']))} run an older release", FAILED)


@app.command("rolling-restart")
def rolling_restart(
    ctx: typer.Context,
    data_dir: Annotated[Path | None, typer.Option(help="Of the `ferryline up` whose services are restarted.")] = None,
    coordinator: Annotated[bool, typer.Option(help="The coordinators, too, after the brokers.")] = True,
    timeout: Annotated[float, typer.Option("--step-timeout", help="Seconds for each service.")] = 120.0,
) -> None:
    """Restart the services of `ferryline up` on this machine one by one, each when everything is in sync again.

    A broker hands its partitions over before it ends, so clients see retries and no errors. Elsewhere, do the same by
    hand or by your orchestrator: stop one broker (SIGTERM), start it, wait for `ferryline cluster health` to say good.
    """
    from ferryline.cli.connection import run
    from ferryline.cli.rolling import restart_all
    from ferryline.cli.settings import local_data_dir

    invocation = of(ctx)
    root = (data_dir or local_data_dir()).expanduser().absolute()
    done = run(restart_all(invocation.settings, root, coordinator, timeout))
    invocation.output.rows(done, columns=["service", "pid_before", "pid", "seconds"])
