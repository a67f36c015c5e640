"""What handlers take, by annotation; how arguments and results travel; what is provided."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Any, Optional

import msgspec
import pydantic
import pytest

import ferryline as fl
from ferryline.app.arguments import Arguments, Results
from ferryline.app.providers import Providers
from ferryline.app.signatures import Signature, read_signature
from ferryline.protocol.errors import InvalidArgument, SerializationFailed


class Order(msgspec.Struct):
    id: int
    lines: list[Order] = []  # a type may hold itself


@dataclasses.dataclass
class Point:
    x: int


class Model(pydantic.BaseModel):
    n: int


class Database:
    pass


def read(function: Any, *provided: Any, task: bool = False) -> Signature:
    return read_signature(function, "it", provided, task=task)


def sources(signature: Signature) -> dict[str, str]:
    return {parameter.name: parameter.source for parameter in signature.parameters}


# -- subscribers ---------------------------------------------------------------------------------------


def test_each_parameter_gets_what_its_annotation_says() -> None:
    async def handle(
        order: Order, message: fl.Message[Order], headers: fl.Headers, context: fl.Context, db: Database
    ) -> None: ...

    signature = read(handle, Database)
    assert signature.value is Order
    assert sources(signature) == {
        "order": "value", "message": "message", "headers": "headers", "context": "context", "db": "provided",
    }  # fmt: skip


def test_the_order_of_parameters_does_not_matter() -> None:
    def handle(context: fl.Context, message: fl.QueueMessage[int], n: int) -> None: ...

    assert (sources(read(handle))["n"], read(handle).value) == ("value", int)


@pytest.mark.parametrize("kind", [bytes, str, Order, Point, Model, dict, list[Order], int | None, datetime, Any])
def test_values_may_be_of_every_type_that_parses(kind: Any) -> None:
    def handle(value): ...  # type: ignore[no-untyped-def]

    handle.__annotations__ = {"value": kind}
    assert read(handle).value == kind


def test_without_a_value_the_message_says_the_type() -> None:
    def whole(message: fl.Message[Order]) -> None: ...
    def plain(message: fl.Message) -> None: ...  # type: ignore[type-arg]
    def nothing() -> None: ...

    assert [read(one).value for one in (whole, plain, nothing)] == [Order, bytes, bytes]


def test_what_has_a_default_and_no_source_keeps_its_default() -> None:
    def handle(order: Order, limit: int = 5, *, other=None) -> None: ...  # type: ignore[no-untyped-def]

    assert sources(read(handle)) == {"order": "value"}


def two_values(order: Order, limit: int) -> None: ...
def no_source(order: Order, db: Database) -> None: ...
def database_alone(db: Database) -> None: ...
def database_inside(dbs: dict[str, list[Database]]) -> None: ...
def no_annotation(order) -> None: ...  # type: ignore[no-untyped-def]
def many(*orders: Order) -> None: ...
def more(order: Order, **rest: Any) -> None: ...
def only_by_position(order: Order, /) -> None: ...
def unknown_name(order: Missing) -> None: ...  # type: ignore[name-defined]  # noqa: F821
def another_type(order: Order, message: fl.Message[Point]) -> None: ...
def message_of_database(message: fl.Message[Database]) -> None: ...


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (two_values, "'limit': int"),
        (no_source, "'db': Database"),
        (database_alone, r"'db': Database; .*app.provide\(Database"),
        (database_inside, "parsed as Database"),
        (no_annotation, "'order' has no annotation"),
        (many, r"\*orders"),
        (more, r"\*\*rest"),
        (only_by_position, "order"),
        (unknown_name, "Missing"),
        (another_type, "the value is Order, but the message has Point"),
        (message_of_database, "parsed as Database"),
    ],
)
def test_what_nobody_can_provide_is_refused_by_name(function: Any, named: str) -> None:
    with pytest.raises(InvalidArgument, match=named):
        read(function)


def test_an_object_with_a_call_is_a_handler_too() -> None:
    class Callable:
        async def __call__(self, order: Order) -> None: ...

    assert read(Callable()).value is Order


# -- arguments -----------------------------------------------------------------------------------------


def call(
    url: str, order: Order, at: datetime, model: Model, points: Optional[list[Point]] = None,  # noqa: UP045
    *, width: int = 800, data: bytes = b"", context: fl.Context,
) -> str:  # fmt: skip
    return url


def codec(function: Any = call) -> Arguments:
    return Arguments("task call", function, read(function, task=True))


NOW = datetime(2026, 5, 1, tzinfo=UTC)


def test_arguments_arrive_as_they_were_given() -> None:
    data = codec().encode(
        ("u", Order(1, [Order(2)]), NOW), {"model": Model(n=3), "points": [Point(4)], "data": b"\0\xff"}
    )
    assert codec().decode(data) == {
        "url": "u", "order": Order(1, [Order(2)]), "at": NOW, "model": Model(n=3), "points": [Point(4)],
        "data": b"\0\xff",
    }  # fmt: skip


def test_a_default_is_left_to_whoever_runs_it() -> None:
    data = codec().encode(("u", Order(1), NOW, Model(n=1)), {})
    assert set(msgspec.json.decode(data)) == {"url", "order", "at", "model"}
    assert "width" not in codec().decode(data)


GOOD = ("u", Order(1), NOW, Model(n=1))


@pytest.mark.parametrize(
    ("args", "kwargs", "named"),
    [
        (GOOD[:3], {}, "'model'"),
        (GOOD, {"color": 1}, "'color'"),
        (GOOD, {"url": "v"}, "multiple values"),
        (GOOD, {"context": None}, "'context'"),
        ((1, *GOOD[1:]), {}, "url"),
        (GOOD, {"width": "8"}, "width"),
        (GOOD, {"width": 8.5}, "width"),
        (GOOD, {"width": object()}, "object"),
        (("u", {"id": "x"}, NOW, Model(n=1)), {}, "order.id"),
        (("u", Order(1), NOW, {"n": "x"}), {}, "n"),
    ],
)
def test_a_call_that_the_function_would_not_take_is_refused_when_it_is_submitted(
    args: tuple[Any, ...], kwargs: dict[str, Any], named: str
) -> None:
    with pytest.raises(InvalidArgument, match=named):
        codec().encode(args, kwargs)


@pytest.mark.parametrize("data", [None, b"", b"{}", b"[]", b"nonsense", b'{"url": 1}', b'{"url": "u", "more": 1}'])
def test_a_record_that_does_not_fit_is_refused_when_it_is_run(data: bytes | None) -> None:
    with pytest.raises(SerializationFailed, match="task call"):
        codec().decode(data)


def test_results_travel_as_what_the_function_returns() -> None:
    for kind, value in [(Order, Order(1)), (Model, Model(n=2)), (None, None), (Any, {"a": [1]}), (bytes, b"\xff")]:
        results = Results("task call", kind)
        assert results.decode(results.encode(value)) == value


@pytest.mark.parametrize(("kind", "value"), [(int, "1"), (Any, object()), (Order, None), (None, 1)])
def test_a_result_of_another_type_is_refused(kind: Any, value: Any) -> None:
    with pytest.raises(SerializationFailed, match="its result"):
        Results("task call", kind).encode(value)


# -- declaring -----------------------------------------------------------------------------------------


def test_a_task_that_cannot_be_called_by_json_is_refused_at_start() -> None:
    app = fl.App()

    @app.task(queue="q")
    def one(db: Database) -> None: ...

    with pytest.raises(InvalidArgument, match=r"task one: .*'db': Database"):
        app.check()


def test_a_result_that_is_not_json_is_refused_at_start() -> None:
    app = fl.App()

    @app.task(queue="q")
    def one() -> Database:
        return Database()

    with pytest.raises(InvalidArgument, match="Database is not JSON"):
        app.check()


@pytest.mark.parametrize("name", ["key", "delay", "priority", "id"])
def test_options_of_submit_are_no_names_of_parameters(name: str) -> None:
    app = fl.App()
    scope: dict[str, Any] = {}
    exec(f"def one({name}: int) -> None: ...", scope)
    app.task(queue="q")(scope["one"])
    with pytest.raises(InvalidArgument, match=f"'{name}' is an option of submit"):
        app.check()


def test_two_tasks_of_one_name_are_refused() -> None:
    app = fl.App()
    app.task(queue="q")(two_values)
    with pytest.raises(InvalidArgument, match="two_values"):
        app.task(queue="other")(two_values)
    app.task(queue="other", name="another")(two_values)


def test_what_is_scheduled_needs_no_arguments() -> None:
    app = fl.App()
    app.schedule("@daily")(two_values)
    with pytest.raises(InvalidArgument, match="'order' has no default"):
        app.check()


def test_a_schedule_is_one_of_two_kinds() -> None:
    app = fl.App()
    for options in ({}, {"cron": "@daily", "every": 5}):
        with pytest.raises(InvalidArgument, match="either"):
            app.schedule(**options)  # type: ignore[arg-type]
    task = app.task(queue="q")(call)
    with pytest.raises(InvalidArgument, match="where the task is declared"):
        app.schedule("@daily", timeout=5)(task)


async def test_an_app_that_is_not_connected_says_so() -> None:
    app = fl.App()
    task = app.task(queue="q")(call)
    for attempt in (lambda: app.client, lambda: app.producer):
        with pytest.raises(fl.errors.ClientClosed, match="async with"):
            attempt()
    with pytest.raises(fl.errors.ClientClosed, match="async with"):
        await task.submit()


def test_a_job_of_several_queues_needs_the_name_of_its_queue() -> None:
    app = fl.App()
    app.task(queue="one")(two_values)
    app.task(queue="two")(call)
    with pytest.raises(InvalidArgument, match="one, two"):
        app.job("chosen")
    with pytest.raises(InvalidArgument, match="one, two"):
        app.job("chosen", queue="three")


def test_calling_a_task_runs_the_function() -> None:
    assert fl.App().task(queue="q", name="double")(lambda n: 2 * n)(4) == 8


# -- providers -----------------------------------------------------------------------------------------


class Made:
    """Remembers what was made and cleaned up, in order."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def plain(self) -> str:
        self.told.append("plain")
        return "a"

    async def later(self) -> int:
        self.told.append("later")
        return 1

    def managed(self) -> Iterator[float]:
        self.told.append("managed")
        yield 1.5
        self.told.append("managed ends")

    async def managed_later(self, headers: fl.Headers) -> AsyncIterator[list[Any]]:
        self.told.append("managed later")
        yield [headers]
        self.told.append("managed later ends")


async def test_what_is_made_for_the_app_is_made_once_and_ends_in_the_opposite_order() -> None:
    made, providers = Made(), Providers()
    for kind, factory in ((str, made.plain), (int, made.later), (float, made.managed), (Made, Made)):
        providers.add(kind, factory, "app")
    providers.resolve()
    await providers.open()
    async with AsyncExitStack() as stack:
        found = [await providers.get(kind, stack, lambda _: {}) for kind in (str, int, float, float)]
        assert isinstance(await providers.get(Made, stack, lambda _: {}), Made)
    assert found == ["a", 1, 1.5, 1.5]
    assert made.told == ["plain", "later", "managed"]
    await providers.close()
    assert made.told[3:] == ["managed ends"]


async def test_what_is_made_for_a_message_ends_with_its_attempt() -> None:
    made, providers = Made(), Providers()
    providers.add(list, made.managed_later, "message")
    providers.resolve()
    await providers.open()
    assert made.told == []
    async with AsyncExitStack() as stack:
        assert await providers.get(list, stack, lambda signature: {"headers": sources(signature)}) == [
            {"headers": "headers"}
        ]
    assert made.told == ["managed later", "managed later ends"]


def takes_a_number(n: int) -> str: ...  # type: ignore[empty-body]
def takes_a_context(context: fl.Context) -> str: ...  # type: ignore[empty-body]


@pytest.mark.parametrize(
    ("factory", "scope", "named"),
    [
        (takes_a_number, "message", "'n'"),
        (takes_a_context, "app", "'context'"),
        (takes_a_context, "session", "session"),
        ("text", "app", "text"),
    ],
)
def test_a_factory_that_cannot_be_called_is_refused(factory: Any, scope: str, named: str) -> None:
    app = fl.App()

    def declare() -> None:
        app.provide(str, factory, scope=scope)
        app.check()

    with pytest.raises(InvalidArgument, match=named):
        declare()


def test_a_type_is_provided_once() -> None:
    app = fl.App()
    app.provide(Database, Database)
    with pytest.raises(InvalidArgument, match="Database is provided already"):
        app.provide(Database, Database)
