"""Questions to the primaries of partitions: split by broker, repeated until answered or the deadline has come.

Only for requests that may be repeated without harm: positions, claims, commits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ferryline.core.retry import Backoff, Jitter, told_ms
from ferryline.protocol.errors import (
    ConnectionFailed,
    DeadlineExceeded,
    ErrorInfo,
    FerrylineError,
    InternalError,
    PrimaryNotAvailable,
    RequestTimedOut,
    UnknownTopic,
    from_info,
)
from ferryline.protocol.metadata import NO_BROKER

if TYPE_CHECKING:
    from ferryline.client import Client

ATTEMPT_S = 5.0  # one try at one broker; a slower answer than this means trouble, and the request may be repeated

Key = tuple[str, int]


class _Result(Protocol):
    @property
    def topic_id(self) -> str: ...
    @property
    def partition(self) -> int: ...
    @property
    def error(self) -> ErrorInfo | None: ...


class _Answer(Protocol):
    @property
    def results(self) -> list[Any]: ...


A = TypeVar("A", bound=_Answer)


async def ask_primaries(
    client: Client,
    kind: int,
    keys: Iterable[Key],
    header: Callable[[list[Key]], Any],
    answer: type[A],
    *,
    timeout: float,
    payloads: dict[Key, memoryview] | None = None,
) -> dict[Key, Any]:
    """One result or FerrylineError for each key, within ``timeout`` seconds. Never raises for a single key.

    ``payloads`` takes what came with the results, as long as their ``size`` says.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    backoff, jitter = Backoff(10, 300), Jitter(id(header))
    outcomes: dict[Key, Any] = {}
    errors: dict[Key, FerrylineError] = {}
    pending = list(dict.fromkeys(keys))
    failures = 0
    while pending:
        left = deadline - loop.time()
        if left <= 0:
            break
        changed = client.watch.change()
        await _round(client, kind, pending, header, answer, min(left, ATTEMPT_S), outcomes, errors, payloads)
        pending = [key for key in pending if key not in outcomes]
        if not pending:
            break
        failures += 1
        client.watch.refresh()
        told = max((errors[key] for key in pending if key in errors), key=told_ms, default=None)
        pause = min(deadline - loop.time(), backoff.pause_ms(failures, jitter.next(), told) / 1000)
        if pause > 0 and told_ms(told):
            await asyncio.sleep(pause)
        elif pause > 0:
            await client.watch.wait_for(changed, pause)
    for key in pending:
        outcomes[key] = _late(errors.get(key), timeout)
    return outcomes


def _late(last: FerrylineError | None, timeout: float) -> FerrylineError:
    cause = f"; last error: {last}" if last is not None else ""
    error: FerrylineError
    if last is None or last.definite:
        error = DeadlineExceeded(f"no answer from the primary within {timeout:g} s{cause}")
    else:
        error = RequestTimedOut(f"no answer from the primary within {timeout:g} s{cause}")
    error.__cause__ = last
    return error


async def _round(
    client: Client,
    kind: int,
    keys: list[Key],
    header: Callable[[list[Key]], Any],
    answer: type[A],
    timeout: float,
    outcomes: dict[Key, Any],
    errors: dict[Key, FerrylineError],
    payloads: dict[Key, memoryview] | None,
) -> None:
    """Ask each broker once; what may be asked again stays without outcome, with its error noted."""
    by_broker: dict[int, list[Key]] = {}
    for key in keys:
        by_broker.setdefault(client.routing.route(key).broker, []).append(key)

    async def ask(broker: int, asked: list[Key]) -> None:
        try:
            if broker == NO_BROKER:
                raise PrimaryNotAvailable("the partition has no primary at the moment")
            session = await client.connections.session(broker, timeout=timeout)
            found, payload = await session.request(kind, header(asked), answer, timeout=timeout)
        except FerrylineError as error:
            for key in asked:
                _note(client, key, error, outcomes, errors)
            return
        for result in found.results:
            key = (result.topic_id, result.partition)
            if payloads is not None:
                payloads[key], payload = payload[: result.size], payload[result.size :]
            if result.error is None:
                outcomes[key] = result
            else:
                _note(client, key, from_info(result.error), outcomes, errors)
        for key in asked:
            if key not in outcomes and key not in errors:
                outcomes[key] = InternalError("the broker did not answer for this partition")

    await asyncio.gather(*(ask(broker, asked) for broker, asked in sorted(by_broker.items())))


def _note(
    client: Client,
    key: Key,
    error: FerrylineError,
    outcomes: dict[Key, Any],
    errors: dict[Key, FerrylineError],
) -> None:
    if "primary" in error.details:
        client.routing.hint(key, error.details.get("primary"), error.details.get("epoch"))
    if not client.routing.exists(key):
        outcomes[key] = UnknownTopic(f"partition {key[1]} of topic {key[0]} does not exist any more")
    elif error.retriable or error.refresh_metadata or isinstance(error, (ConnectionFailed, DeadlineExceeded)):
        errors[key] = error
    else:
        outcomes[key] = error
