"""REST of queues: what receivers do by frames, for people with curl and programs without a client.

``POST   /v1/queues/{topic}/{group}/receive``  {"records", "wait_ms", "lease_ms", "member", "ordering", ...}
``POST   /v1/queues/{topic}/{group}/settle``   {"entries": [{"receipt", "action", "delay_ms", "reason", "detail"}, ...]}
``POST   /v1/queues/{topic}/{group}/keep``     {"member", "receipts", "partition"}
``POST   /v1/queues/{topic}/{group}/purge``, ``/pause``, ``/resume``, ``/redrive``
``GET    /v1/queues/{topic}/{group}/stats?partition=``, ``/peek?partition=&offset=&count=``
``GET    /v1/queues/{topic}/{group}/explain?partition=&offset=``
``DELETE /v1/queues/{topic}/{group}?partition=``

A request concerns the partitions that this broker leads, and the answer names the others and their primaries; 421 where
it leads none, or not the one that was asked for. The state is the same as that of receivers on sessions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from aiohttp import web

from ferryline.protocol.errors import (
    ErrorInfo,
    FerrylineError,
    InvalidArgument,
    NotPrimary,
    ShuttingDown,
    from_info,
)
from ferryline.protocol.limits import OFFSET_MAX, check_name, check_range
from ferryline.protocol.metadata import TopicMeta
from ferryline.protocol.queue_messages import (
    ACTIONS,
    Keep,
    KeepEntry,
    QueueAsk,
    Receive,
    Settle,
    SettleAnswer,
    SettleEntry,
)
from ferryline.protocol.records import DecodedRecord, decode_batch
from ferryline_broker.core.events import Bytes, Key
from ferryline_broker.driver import PartitionDriver
from ferryline_broker.queue_frames import QueueHandler
from ferryline_broker.receipts import Named, named_by, receipt_of
from ferryline_broker.rest_models import KeepIn, PurgeIn, ReceiveIn, RedriveIn, SelectIn, SettleIn
from ferryline_broker.rest_shared import elsewhere, leads, query_int, raw_bytes, shown_bytes
from ferryline_broker.view import ClusterView
from ferryline_service.access.caller import UNCHECKED
from ferryline_service.access.gate import CALLER
from ferryline_service.errors import read_json

ANSWER_BYTES = 4 * 1024 * 1024  # of records in one answer, about, over all partitions
_PEEK_MAX = 1_000


class RestAsker:
    """One request that waits for its answer, in the place of a session. ``answered``: header and payload.

    ``request``: None for one whose answer is worth having although its client has gone.
    """

    def __init__(self, request: web.Request | None = None) -> None:
        self._request = request
        self.caller = UNCHECKED if request is None else request.get(CALLER, UNCHECKED)
        self.close_callbacks: list[Callable[[Any], None]] = []
        self.answered: asyncio.Future[tuple[Any, list[Bytes]]] = asyncio.get_running_loop().create_future()

    @property
    def closed(self) -> bool:
        if self._request is None:
            return False
        transport = self._request.transport
        return transport is None or transport.is_closing()

    def answer(
        self, kind: int, correlation: int, header: Any, parts: Sequence[Bytes] = (), *, more: bool = False
    ) -> None:
        if not self.answered.done():
            self.answered.set_result((header, list(parts)))

    def flush(self) -> None:
        return

    def __enter__(self) -> RestAsker:
        return self

    def __exit__(self, *_: object) -> None:
        callbacks, self.close_callbacks = self.close_callbacks, []
        for callback in callbacks:
            callback(self)


class QueueApi:
    """Handlers of the routes above; the work is `QueueHandler`'s."""

    def __init__(self, driver: PartitionDriver, view: ClusterView, handler: QueueHandler) -> None:
        self._driver = driver
        self._view = view
        self._handler = handler
        self._stopping = False

    def routes(self) -> list[web.RouteDef]:
        queue = "/v1/queues/{topic}/{group}"
        return [
            web.post(f"{queue}/receive", self.receive),
            web.post(f"{queue}/settle", self.settle),
            web.post(f"{queue}/keep", self.keep),
            web.get(f"{queue}/peek", self.peek),
            web.post(f"{queue}/purge", self.purge),
            web.post(f"{queue}/pause", self.pause),
            web.post(f"{queue}/resume", self.resume),
            web.post(f"{queue}/redrive", self.redrive),
            web.get(f"{queue}/stats", self.stats),
            web.get(f"{queue}/explain", self.explain),
            web.delete(queue, self.delete),
        ]

    def close(self) -> None:
        """Refuse what comes; who waits is answered by the handler of queues."""
        self._stopping = True

    # -- handlers -----------------------------------------------------------------------------------

    async def receive(self, request: web.Request) -> web.Response:
        """Lease records; each comes with the receipt that settles it."""
        topic, group = self._queue(request)
        asked = ReceiveIn.model_validate(await _body(request))
        keys, others = self._split(topic, asked.partition)
        ask = Receive(
            group, asked.member, keys, asked.records, max(1, ANSWER_BYTES // len(keys)), asked.lease_ms, asked.wait_ms,
            asked.ordering, asked.start, asked.strict,
        )  # fmt: skip
        with RestAsker(request) as asker:
            self._handler.ask_receive(asker, 0, ask)
            answer, parts = await asker.answered
        records: list[dict[str, Any]] = []
        errors: list[tuple[int, ErrorInfo]] = []
        payloads = iter(parts)
        for delivery in answer.deliveries:
            if delivery.error is not None:
                errors.append((delivery.partition, delivery.error))
                continue
            found = decode_batch(next(payloads))
            for record, offset, attempts in zip(found, delivery.offsets, delivery.attempts, strict=True):
                receipt = receipt_of(delivery, asked.member, offset)
                shown = {"partition": delivery.partition, "offset": offset, "attempts": attempts, "receipt": receipt}
                records.append({**shown, **_shown(record)})
        if errors and not records:
            raise self._error(errors[0][1])
        told = [{"partition": partition, "error": self._shown_error(info)} for partition, info in errors]
        return web.json_response({"records": records, "errors": told, "elsewhere": others})

    async def settle(self, request: web.Request) -> web.Response:
        """Acknowledge, fail, reject, release or extend; one outcome for each receipt, in order."""
        topic, group = self._queue(request)
        asked = SettleIn.model_validate(await _body(request))
        outcomes: list[dict[str, Any]] = [{} for _ in asked.entries]
        together: dict[tuple[Any, ...], list[tuple[int, int]]] = {}  # what one entry of a frame can say -> who says it
        for index, entry in enumerate(asked.entries):
            try:
                if entry.action not in ACTIONS:
                    raise InvalidArgument(f"action: {entry.action[:32]!r} is not one of {', '.join(ACTIONS)}")
                named = _named(entry.receipt, topic)
            except InvalidArgument as error:
                message = f"entries.{index}.{error.message}"
                outcomes[index] = self._failed(InvalidArgument(message, field=f"entries.{index}").info())
                continue
            said = (named.member, *named.lease, entry.action, entry.delay_ms, entry.reason, entry.detail)
            together.setdefault(said, []).append((index, named.offset))
        by_member: dict[str, list[tuple[SettleEntry, list[tuple[int, int]]]]] = {}
        for (member, topic_id, partition, epoch, lease, mac, *rest), told in together.items():
            offsets = [offset for _, offset in told]
            settled = SettleEntry(topic_id, partition, epoch, lease, mac, rest[0], offsets, *rest[1:])
            by_member.setdefault(member, []).append((settled, told))
        for member, entries in by_member.items():
            answer = await self._settle(request, Settle(group, member, [entry for entry, _ in entries]))
            for result in answer.results:
                for index, offset in entries[result.index][1]:
                    if result.error is not None:
                        outcomes[index] = self._failed(result.error)
                    else:
                        outcomes[index] = {"outcome": _outcome(offset, result.stale, result.settled)}
        failed = any(outcome["outcome"] == "error" for outcome in outcomes)
        return web.json_response({"results": outcomes}, status=207 if failed else 200)

    async def keep(self, request: web.Request) -> web.Response:
        """Say what a member still holds: everything else that is leased to it is free at once."""
        topic, group = self._queue(request)
        asked = KeepIn.model_validate(await _body(request))
        keys, others = self._split(topic, asked.partition)
        held: dict[Key, set[int]] = {key: set() for key in keys}
        for index, receipt in enumerate(asked.receipts):
            named = _named(receipt, topic, f"receipts.{index}")
            key = (named.topic_id, named.partition)
            if named.member != asked.member:
                raise InvalidArgument(f"receipts.{index}: it is of member {named.member!r}", field="receipts")
            if key in held:
                held[key].add(named.number)
            elif asked.partition is None:
                raise elsewhere(self._view, *key)
        ask = Keep(group, asked.member, [KeepEntry(*key, sorted(leases)) for key, leases in held.items()])
        with RestAsker(request) as asker:
            self._handler.ask_keep(asker, 0, ask)
            answer, _ = await asker.answered
        shown: list[dict[str, Any]] = []
        for result in sorted(answer.results, key=lambda one: one.index):
            partition = keys[result.index][1]
            shown.append({"partition": partition, "kept": len(held[keys[result.index]])})
            if result.error is not None:
                shown[-1] = {"partition": partition, "error": self._shown_error(result.error)}
        return self._answer(shown, [one.error for one in answer.results], others)

    async def peek(self, request: web.Request) -> web.Response:
        """Records that are not settled, from an offset on; nothing is leased."""
        offset = query_int(request, "offset", -1, -1, OFFSET_MAX)
        count = query_int(request, "count", 100, 1, _PEEK_MAX)
        return await self._look(request, "peek", _partition(request), offset=offset, count=count)

    async def stats(self, request: web.Request) -> web.Response:
        """How many records are ready, leased, delayed, parked."""
        return await self._look(request, "stats", _partition(request))

    async def explain(self, request: web.Request) -> web.Response:
        """Where one record is and what it waits for. Partition and offset must be given."""
        for name in ("partition", "offset"):
            if name not in request.query:
                raise InvalidArgument(f"{name}: missing", field=name)
        offset = query_int(request, "offset", 0, 0, OFFSET_MAX)
        return await self._look(request, "explain", _partition(request), offset=offset)

    async def purge(self, request: web.Request) -> web.Response:
        """Settle everything that is there now, unread."""
        asked = PurgeIn.model_validate(await _body(request))
        return await self._look(request, "purge", asked.partition, dry_run=asked.dry_run)

    async def pause(self, request: web.Request) -> web.Response:
        """Lease nothing until resumed; what is leased can be settled."""
        return await self._look(request, "pause", SelectIn.model_validate(await _body(request)).partition)

    async def resume(self, request: web.Request) -> web.Response:
        """Lease again."""
        return await self._look(request, "resume", SelectIn.model_validate(await _body(request)).partition)

    async def redrive(self, request: web.Request) -> web.Response:
        """Make parked records available again, in place."""
        asked = RedriveIn.model_validate(await _body(request))
        return await self._look(
            request, "redrive", asked.partition, offset=asked.offset, count=asked.count,
            key=raw_bytes(asked.key, "key"), reason=asked.reason, dry_run=asked.dry_run,
        )  # fmt: skip

    async def delete(self, request: web.Request) -> web.Response:
        """Forget the group: its start, leases and parked records."""
        return await self._look(request, "delete", _partition(request))

    # -- inside -------------------------------------------------------------------------------------

    def _queue(self, request: web.Request) -> tuple[TopicMeta, str]:
        if self._stopping:
            raise ShuttingDown("this broker is stopping")
        group = check_name(request.match_info["group"], "group")
        return self._view.topic_named(request.match_info["topic"]), group

    def _split(self, topic: TopicMeta, partition: int | None) -> tuple[list[Key], list[dict[str, Any]]]:
        """The partitions that are meant and led here, and where the others are. Raises NotPrimary if there is none."""
        count = topic.config.partitions
        wanted = range(count) if partition is None else [check_range(partition, "partition", 0, count - 1)]
        led: list[Key] = []
        others: list[dict[str, Any]] = []
        errors: list[FerrylineError] = []
        for number in wanted:
            if leads(self._driver, (topic.id, number)):
                led.append((topic.id, number))
                continue
            errors.append(error := elsewhere(self._view, topic.id, number))
            known: dict[str, Any] = {
                name: error.details[name] for name in ("primary", "primary_url") if name in error.details
            }
            others.append({"partition": number, "code": error.code, **known})
        if not led:
            error = next((one for one in errors if isinstance(one, NotPrimary)), errors[0])
            if len(others) > 1:
                error.details["elsewhere"] = others
            raise error
        return led, others

    async def _settle(self, request: web.Request, ask: Settle) -> SettleAnswer:
        with RestAsker(request) as asker:
            self._handler.ask_settle(asker, 0, ask)
            answer: SettleAnswer
            answer, _ = await asker.answered
        return answer

    async def _look(self, request: web.Request, op: str, partition: int | None, **fields: Any) -> web.Response:
        topic, group = self._queue(request)
        keys, others = self._split(topic, partition)
        with RestAsker(request) as asker:
            self._handler.ask_queue(asker, 0, QueueAsk(group, op, keys, **fields))
            answer, parts = await asker.answered
        payloads = iter(parts)
        shown: list[dict[str, Any]] = []
        for result in answer.results:
            if result.error is not None:
                shown.append({"partition": result.partition, "error": self._shown_error(result.error)})
                continue
            details = dict(result.details)
            if op == "peek":
                offsets = details.pop("offsets")
                records = decode_batch(next(payloads)) if offsets else []
                details["records"] = [
                    {"offset": offset, **_shown(record)} for offset, record in zip(offsets, records, strict=True)
                ]
            shown.append({"partition": result.partition, **details})
        return self._answer(shown, [result.error for result in answer.results], others)

    def _answer(
        self, shown: list[dict[str, Any]], errors: list[ErrorInfo | None], others: list[dict[str, Any]]
    ) -> web.Response:
        """200, or 207 when some partitions failed. Raises the first error when all of them did."""
        failed = [error for error in errors if error is not None]
        if failed and len(failed) == len(errors):
            raise self._error(failed[0])
        return web.json_response({"partitions": shown, "elsewhere": others}, status=207 if failed else 200)

    def _error(self, info: ErrorInfo) -> FerrylineError:
        """The error, with the primary's address if it names one."""
        error = from_info(info)
        broker = self._view.broker(error.details.get("primary", 0))
        if broker is not None:
            error.details["primary_url"] = broker.external
        return error

    def _shown_error(self, info: ErrorInfo) -> dict[str, Any]:
        error = self._error(info)
        return {
            "code": error.code,
            "detail": error.message,
            "retriable": error.retriable,
            "definite": error.definite,
            "details": error.details,
        }

    def _failed(self, info: ErrorInfo) -> dict[str, Any]:
        return {"outcome": "error", "error": self._shown_error(info)}


async def _body(request: web.Request) -> Any:
    """The body as JSON; nothing at all says as much as ``{}``."""
    return await read_json(request) if request.body_exists else {}


def _partition(request: web.Request) -> int | None:
    return query_int(request, "partition", 0, 0, OFFSET_MAX) if "partition" in request.query else None


def _named(text: str, topic: TopicMeta, field: str = "receipt") -> Named:
    named = named_by(text)
    if named is None:
        raise InvalidArgument(f"{field}: not a receipt", field=field)
    if named.topic_id != topic.id:
        raise InvalidArgument(f"{field}: not of this topic", field=field)
    return named


def _outcome(offset: int, stale: list[int], settled: list[int]) -> str:
    return "stale" if offset in stale else "settled" if offset in settled else "done"


def _shown(record: DecodedRecord) -> dict[str, Any]:
    return {
        "timestamp_ms": record.timestamp,
        "key": shown_bytes(record.key),
        "value": shown_bytes(record.value),
        "headers": {name: shown_bytes(value) for name, value in record.headers},
    }
