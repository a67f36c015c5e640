"""`ferryline explain`: one answer to where a record is and why it is not delivered."""

from __future__ import annotations

import re
import time
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ferryline.cli.failures import NOT_FOUND, UNAVAILABLE, Failed
from ferryline.cli.invocation import of
from ferryline.cli.offsets import parse_time_ms
from ferryline.cli.quantities import show_time
from ferryline.cli.queue import last_line, shown
from ferryline.cli.settings import UsageError

if TYPE_CHECKING:
    from ferryline.client import Client
    from ferryline.message import Message
    from ferryline.protocol.metadata import TopicMeta

_PLACE = re.compile(r"\A([A-Za-z0-9._-]{1,200})/(\d{1,5})/(\d{1,18})\Z")
LETTERS_MAX = 100_000  # dead letters that are looked through for a copy


def app(
    ctx: typer.Context,
    what: Annotated[
        str, typer.Argument(metavar="TOPIC/PARTITION/OFFSET|ID", help="A place, or an id of the sender's.")
    ],
    group: Annotated[
        list[str] | None, typer.Option("--group", "-g", help="Only these queue groups; repeatable.")
    ] = None,
    topic: Annotated[
        list[str] | None, typer.Option("--topic", "-t", help="Look for the id in these topics only; repeatable.")
    ] = None,
    since: Annotated[
        str, typer.Option(metavar="TIME", help="Look for the id from then on only: -1h, or an ISO time.")
    ] = "",
) -> None:
    """Where a record is, for everybody who reads it: committed, on which brokers, and what each group makes of it.

    For a queue group: available, leased (to whom, which attempt, what went wrong before), waiting behind another record
    of its key, delayed, parked, on its way to the dead letters, or settled; and why nobody gets it. For a consumer
    group: whether it has committed past it. Its copy among the dead letters is looked for, too. A record that was
    sent with an id is found by that: the topics are read for it, all of them unless some are named.

    Examples:

      ferryline explain orders/3/1047

      ferryline explain invoice-2026-17 --topic orders --since=-2h
    """
    from ferryline.cli.connection import connected, run

    found = None if topic else _PLACE.match(what)
    since_ms = parse_time_ms(since, int(time.time() * 1000)) if since else 0
    if not what:
        raise UsageError("say which record: TOPIC/PARTITION/OFFSET, or the id that it was sent with")
    invocation = of(ctx)

    async def act() -> list[dict[str, Any]]:
        async with connected(invocation.settings) as client:
            if found:
                place = found.group(1), int(found.group(2)), int(found.group(3))
                return [await explain(client, *place, group)]
            return await explain_id(client, what, topic or [], since_ms, group)

    told = run(act())
    if not invocation.output.for_people:
        if found:
            invocation.output.one(told[0])
        else:
            invocation.output.rows(told)
        return
    for number, one in enumerate(told):
        if number:
            typer.echo()
        readers = one.pop("groups")
        invocation.output.one(one)
        typer.echo()
        invocation.output.rows(
            ({"group": name, "state": says["state"], "because": sentence(says)} for name, says in readers.items()),
            empty="nobody reads this topic",
        )


async def explain_id(
    client: Client, identity: str, topics: list[str], since_ms: int, groups: list[str] | None
) -> list[dict[str, Any]]:
    """Everything about each record with this id. Raises Failed when there is none, saying since when there is none."""
    from ferryline.cli.lookup import find, not_found

    named = topics or sorted(meta.name for meta in client.routing.cluster.topics.values())
    found = await find(client, identity, named, since_ms)
    if not found.places:
        text, status = not_found(identity, named, found), UNAVAILABLE if found.unread else NOT_FOUND
        raise Failed(text, status, code="UNKNOWN_MESSAGE", remedy="a place is written TOPIC/PARTITION/OFFSET")
    return [await explain(client, *place, groups) for place in found.places]


async def explain(client: Client, topic: str, partition: int, offset: int, groups: list[str] | None) -> dict[str, Any]:
    """Everything that the cluster can say about one record. Raises Failed when there is no such place."""
    from ferryline.cli.lookup import complete_since, moment
    from ferryline.positions import look_up
    from ferryline.protocol.metadata import NO_BROKER

    meta = await client.learn_topic(topic)
    if partition >= meta.config.partitions:
        raise Failed(f"{topic} has partitions 0..{meta.config.partitions - 1}", NOT_FOUND, code="UNKNOWN_PARTITION")
    key = (meta.id, partition)
    told: dict[str, Any] = {"place": f"{topic}/{partition}/{offset}", "record": "retained"}
    part = client.routing.cluster.partition(*key)
    if part is not None:
        told |= {"primary": part.primary or None, "in_sync": list(part.isr), "replicas": list(part.replicas)}
    if part is not None and part.primary == NO_BROKER:
        holders = ", ".join(f"broker {broker}" for broker in part.isr or part.elr or part.replicas)
        told["record"] = f"not known: the partition has no primary; what is committed is on {holders}"
        return told | {"groups": {}}
    ends = (await look_up(client, {key: "end"}, client.timeout))[key]
    message = None
    if offset >= ends.high_watermark:
        told["record"] = f"not there: the committed end is {ends.high_watermark}"
    elif offset < ends.log_start:
        since = moment(await complete_since(client, meta, partition))
        told["record"] = f"not in the retained log since {since}: it begins at offset {ends.log_start}"
    else:
        message = await _read(client, topic, partition, offset)
        if message is None:
            told["record"] = "not a record: a mark of the broker's own"
        else:
            told |= _described(message)
    told["groups"] = await _readers(client, meta, partition, offset, groups)
    if message is not None:
        told |= await _by_its_headers(client, message)
    copy = await _copy(client, meta, partition, offset, told.get("produced_ms"))
    if copy:
        told["dead_letter"] = copy
    return told


async def _read(client: Client, topic: str, partition: int, offset: int) -> Message[bytes] | None:
    async with client.consumer(topic, partitions=[partition], start=offset) as consumer:
        found = await consumer.pull(1, 2.0)
        return found[0] if found and found[0].offset == offset else None


def _described(message: Message[bytes]) -> dict[str, Any]:
    return {
        "produced": message.timestamp.isoformat(timespec="milliseconds"),
        "produced_ms": message.timestamp_ms,
        "key": shown(message.key),
        "bytes": len(message.raw or b""),
        "headers": {name: shown(value) for name, value in message.headers.pairs},
    }


async def _by_its_headers(client: Client, message: Message[bytes]) -> dict[str, Any]:
    """Why a queue may have settled it without a receiver: what its sender asked for."""
    from ferryline.cli.lookup import expired, repetition_of

    told: dict[str, Any] = {}
    if at := expired(message, int(time.time() * 1000)):
        told["expired"] = f"{at}: queues deliver it no more"
    if first := await repetition_of(client, message):
        told["repeats"] = f"{first}, which has the same id: queues deliver one of the two"
    return told


async def _readers(
    client: Client, meta: TopicMeta, partition: int, offset: int, groups: list[str] | None
) -> dict[str, dict[str, Any]]:
    """What each queue group, and each consumer group that reads this topic, makes of the record."""
    from ferryline.protocol.errors import UnknownGroup
    from ferryline.queue_admin import groups_of

    found: dict[str, dict[str, Any]] = {}
    for name in groups or sorted(await groups_of(client, meta.name)):
        try:
            found[name] = await client.queue(meta.name, name).explain(partition, offset)
        except UnknownGroup:
            found[name] = {"state": "unknown", "why": "it has never received from this partition"}
    if groups is None:
        found |= await _consumer_groups(client, meta, partition, offset)
    return found


async def _consumer_groups(client: Client, meta: TopicMeta, partition: int, offset: int) -> dict[str, dict[str, Any]]:
    from ferryline.positions import committed
    from ferryline.protocol.errors import FerrylineError

    try:
        known = await client.admin.list_groups()
    except FerrylineError as error:  # the coordinator is away; the queues were asked at the brokers
        return {"consumer groups": {"state": "unknown", "why": str(error)}}
    found: dict[str, dict[str, Any]] = {}
    key = (meta.id, partition)
    for name in sorted(str(group["group"]) for group in known):
        at = (await committed(client, name, [key], client.timeout))[key].offset
        if at >= 0:
            state = "committed past it" if at > offset else "not yet"
            found[name] = {"state": state, "committed": at}
    return found


async def _copy(client: Client, meta: TopicMeta, partition: int, offset: int, since_ms: int | None) -> str:
    """Where the copy among the dead letters stands, and who gave the record up; "" if there is none."""
    from ferryline.protocol.dead_letters import dead_letters_of

    name = dead_letters_of(meta.name, meta.config.retry)
    target = client.routing.topic(name)
    if target is None or name == meta.name:
        return ""
    letters = client.dead_letters(name)
    looked = 0
    async with aclosing(letters.everything(partition % target.config.partitions, since_ms or 0)) as copies:
        async for letter in copies:
            looked += 1
            if (letter.origin_topic, letter.origin_partition, letter.origin_offset) == (meta.name, partition, offset):
                at = letter.record
                return f"{name}/{at.partition}/{at.offset}, given up by {letter.group}: {letter.reason}"
            if looked >= LETTERS_MAX:
                break
    return ""


def sentence(told: dict[str, Any]) -> str:
    """What a person wants to know of a group's answer."""
    parts: list[str] = []
    if told.get("attempts"):
        parts.append(f"attempt {told['attempts']}")
    if "member" in told:
        parts.append(f"with {told['member']} for {show_time(told['leased_for_ms'])}")
        parts.append(f"lease ends in {show_time(max(0, told['lease_ends_in_ms']))}")
    if "behind" in told:
        state = told.get("behind_state")  # brokers of older releases do not say
        front = ", which backs off" if state == "delayed" else f", which is {state}" if state else ""
        parts.append(f"behind offset {told['behind']} of its key{front}")
    if "due_in_ms" in told:
        parts.append(f"due in {show_time(told['due_in_ms'])}")
    if "committed" in told:
        parts.append(f"committed {told['committed']}")
    if told.get("paused"):
        parts.append("the queue is paused")
    if told.get("why"):
        parts.append(str(told["why"]))
    if told.get("history"):
        last = told["history"][-1]
        parts.append(f"attempt {last['attempt']} ended with {last['reason'] or last_line(last['detail'])}")
    return ", ".join(parts)
