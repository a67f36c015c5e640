"""REST of committed offsets: where log groups stand, and moving a group that has no members.

``GET /v1/groups/{group}/offsets?topic=``
``PUT /v1/groups/{group}/offsets``    {"offsets": [{"topic", "partition", "offset": 7, "start", "end"}], "dry_run"}

Any broker answers for the whole cluster: it asks the primaries of partitions that it does not lead. A group is moved
only while the coordinator knows of no members, because they would go on where they are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import aiohttp
from aiohttp import web

from ferryline.protocol.access import READ, TOPIC
from ferryline.protocol.errors import (
    Conflict,
    CoordinatorUnavailable,
    FerrylineError,
    InternalError,
    OffsetOutOfRange,
    PrimaryNotAvailable,
    RequestTimedOut,
    UnknownGroup,
    from_info,
)
from ferryline.protocol.frames import Kind, decode_header
from ferryline.protocol.limits import FRAME_ENTRIES_MAX, check_name, check_range
from ferryline.protocol.messages import (
    ANY_GENERATION,
    Commit,
    CommitEntry,
    Committed,
    CommittedAnswer,
    CommittedResult,
)
from ferryline.protocol.metadata import NO_BROKER, TopicMeta
from ferryline_broker.core.events import Key
from ferryline_broker.driver import PartitionDriver
from ferryline_broker.groups import GroupHandler
from ferryline_broker.node_sessions import NodeSessions
from ferryline_broker.rest_models import OffsetIn, OffsetsIn
from ferryline_broker.rest_queues import RestAsker
from ferryline_broker.rest_shared import leads
from ferryline_broker.view import ClusterView
from ferryline_service.access.caller import UNCHECKED
from ferryline_service.access.gate import CALLER
from ferryline_service.errors import read_json
from ferryline_service.tls import TlsFiles

_ASK_S = 10.0
_COORDINATOR_S = 5.0
Found = CommittedResult | FerrylineError


class Members:
    """Asks the coordinators whether a group has members."""

    def __init__(self, http: aiohttp.ClientSession, tls: TlsFiles, view: ClusterView, known: Sequence[str]) -> None:
        self._http = http
        self._tls = tls
        self._view = view
        self._known = known  # until the metadata names them

    async def count(self, group: str) -> int:
        """Raises CoordinatorUnavailable."""
        for url in self._view.metadata.coordinators or self._known:
            try:
                async with self._http.get(
                    f"{url.rstrip('/')}/v1/groups/{group}",
                    ssl=self._tls.client,
                    timeout=aiohttp.ClientTimeout(total=_COORDINATOR_S),
                ) as response:
                    if response.status == 404:
                        return 0
                    if response.status == 200:
                        return len((await response.json())["members"])
            except (aiohttp.ClientError, OSError, TimeoutError):
                continue  # it is away, or on standby: another one knows
        raise CoordinatorUnavailable("no coordinator says whether the group has members; nothing was changed")


class OffsetsApi:
    """Handlers of the routes above."""

    def __init__(
        self,
        driver: PartitionDriver,
        view: ClusterView,
        groups: GroupHandler,
        sessions: NodeSessions,
        members: Members,
    ) -> None:
        self._driver = driver
        self._view = view
        self._groups = groups
        self._sessions = sessions
        self._members = members

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/groups/{group}/offsets", self.get_offsets),
            web.put("/v1/groups/{group}/offsets", self.put_offsets),
        ]

    async def get_offsets(self, request: web.Request) -> web.Response:
        """Where a log group stands: every partition in which it has committed, of one topic or of all."""
        group = check_name(request.match_info["group"], "group")
        wanted = request.query.get("topic")
        caller = request.get(CALLER, UNCHECKED)
        if wanted is not None:
            topics = [self._view.topic_named(wanted)]
            caller.check(READ, TOPIC, topics[0].name)
        else:
            topics = [topic for topic in self._all_topics() if caller.may(READ, TOPIC, topic.name)]
        keys = [(topic.id, number) for topic in topics for number in range(topic.config.partitions)]
        found = await self._committed(group, keys)
        shown, errors = [], []
        for key in keys:
            one = found[key]
            if isinstance(one, FerrylineError):
                errors.append(self._error(key, one))
            elif one.offset >= 0 or one.generation:
                shown.append(self._shown(key, one))
        if not shown and not errors:
            raise UnknownGroup(f"group {group} has committed nothing here", group=group)
        answer = {"group": group, "offsets": shown, "errors": errors}
        return web.json_response(answer, status=207 if errors else 200)

    async def put_offsets(self, request: web.Request) -> web.Response:
        """Move a group without members, each partition by itself; one outcome for each, in order."""
        group = check_name(request.match_info["group"], "group")
        asked = OffsetsIn.model_validate(await read_json(request))
        keys = [self._key(entry, index) for index, entry in enumerate(asked.offsets)]
        if len(set(keys)) != len(keys):
            raise Conflict("offsets: a partition is named twice", field="offsets")
        if count := await self._members.count(group):
            raise Conflict(f"group {group} has {count} members; stop them first", group=group, members=count)
        before = await self._committed(group, keys)
        after: dict[Key, Found] = {}
        wanted: dict[Key, CommitEntry] = {}
        for key, entry in zip(keys, asked.offsets, strict=True):
            try:
                wanted[key] = _target(key, entry, before[key])
            except FerrylineError as error:
                after[key] = error
        if not asked.dry_run:
            after.update(await self._commit(group, wanted))
        results = [self._moved(key, before[key], wanted.get(key), after.get(key)) for key in keys]
        failed = any("error" in result for result in results)
        shown = {"group": group, "dry_run": asked.dry_run, "results": results}
        return web.json_response(shown, status=207 if failed else 200)

    # -- asking -------------------------------------------------------------------------------------

    async def _committed(self, group: str, keys: Sequence[Key]) -> dict[Key, Found]:
        async def here(led: list[Key]) -> CommittedAnswer:
            with RestAsker() as asker:
                self._groups.ask_committed(asker, 0, Committed(group, list(led)))
                return await _answered(asker)

        async def there(broker: int, led: list[Key]) -> CommittedAnswer:
            frame = await self._sessions.request(broker, Kind.COMMITTED, Committed(group, list(led)), timeout_s=_ASK_S)
            return decode_header(frame.header, CommittedAnswer)

        return await self._everywhere(keys, here, there)

    async def _commit(self, group: str, wanted: dict[Key, CommitEntry]) -> dict[Key, Found]:
        def ask(led: list[Key]) -> Commit:
            return Commit(group, "", [wanted[key] for key in led])

        async def here(led: list[Key]) -> CommittedAnswer:
            with RestAsker() as asker:
                self._groups.ask_commit(asker, 0, ask(led), ANY_GENERATION)
                return await _answered(asker)

        async def there(broker: int, led: list[Key]) -> CommittedAnswer:
            frame = await self._sessions.request(broker, Kind.COMMIT, ask(led), timeout_s=_ASK_S)
            return decode_header(frame.header, CommittedAnswer)

        return await self._everywhere(list(wanted), here, there)

    async def _everywhere(self, keys: Sequence[Key], here: Any, there: Any) -> dict[Key, Found]:
        """Ask whoever leads each partition, all of them at once; what fails fails for its partitions only."""
        found: dict[Key, Found] = {}
        by_leader: dict[int, list[Key]] = {}
        for key in keys:
            part = self._view.metadata.partition(*key)
            if leads(self._driver, key):
                by_leader.setdefault(0, []).append(key)
            elif part is None or part.primary == NO_BROKER:
                found[key] = PrimaryNotAvailable("the partition has no primary")
            else:
                by_leader.setdefault(part.primary, []).append(key)
        asked = [
            (broker, led[at : at + FRAME_ENTRIES_MAX])
            for broker, led in by_leader.items()
            for at in range(0, len(led), FRAME_ENTRIES_MAX)
        ]
        outcomes = await asyncio.gather(
            *(there(broker, led) if broker else here(led) for broker, led in asked), return_exceptions=True
        )
        for (_, led), outcome in zip(asked, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                error = outcome if isinstance(outcome, FerrylineError) else InternalError(type(outcome).__name__)
                found.update(dict.fromkeys(led, error))
                continue
            for result in outcome.results:
                found[result.topic_id, result.partition] = from_info(result.error) if result.error else result
        return found

    # -- inside -------------------------------------------------------------------------------------

    def _all_topics(self) -> list[TopicMeta]:
        return sorted(self._view.metadata.topics.values(), key=lambda topic: topic.name)

    def _key(self, entry: OffsetIn, index: int) -> Key:
        topic = self._view.topic_named(entry.topic)
        check_range(entry.partition, f"offsets.{index}.partition", 0, topic.config.partitions - 1)
        return (topic.id, entry.partition)

    def _named(self, key: Key) -> dict[str, Any]:
        topic = self._view.topic(key[0])
        return {"topic": topic.name if topic is not None else key[0], "partition": key[1]}

    def _shown(self, key: Key, one: CommittedResult) -> dict[str, Any]:
        return {
            **self._named(key),
            "offset": one.offset if one.offset >= 0 else None,
            "metadata": one.metadata,
            "generation": one.generation,
            "log_start": one.log_start,
            "high_watermark": one.high_watermark,
            "lag": one.lag if one.lag >= 0 else one.high_watermark - max(one.offset, one.log_start),
        }

    def _error(self, key: Key, error: FerrylineError) -> dict[str, Any]:
        told = {"code": error.code, "detail": error.message, "retriable": error.retriable, "definite": error.definite}
        return {**self._named(key), "error": told}

    def _moved(self, key: Key, before: Found, wanted: CommitEntry | None, after: Found | None) -> dict[str, Any]:
        if isinstance(after, FerrylineError):
            return self._error(key, after)
        assert isinstance(before, CommittedResult)
        assert wanted is not None
        return {**self._named(key), "before": before.offset if before.offset >= 0 else None, "offset": wanted.offset}


def _target(key: Key, entry: OffsetIn, before: Found) -> CommitEntry:
    """Raises what keeps the group from standing there."""
    if isinstance(before, FerrylineError):
        raise before
    low, high = before.log_start, before.high_watermark
    offset = {"start": low, "end": high}[entry.offset] if isinstance(entry.offset, str) else entry.offset
    if offset > high:
        raise OffsetOutOfRange(f"offset: {offset} is beyond {high}", log_start=low, high_watermark=high)
    return CommitEntry(*key, ANY_GENERATION, offset, entry.metadata, True)


async def _answered(asker: RestAsker) -> CommittedAnswer:
    answer: CommittedAnswer
    try:
        async with asyncio.timeout(_ASK_S):
            answer, _ = await asker.answered
    except TimeoutError:
        raise RequestTimedOut(f"no answer within {_ASK_S:g} s") from None
    return answer
