"""What a handler takes, by the annotations of its parameters. Pure.

=====================================  ==========================================================
annotation                             what it gets
=====================================  ==========================================================
``fl.Message[T]``, ``fl.QueueMessage``  the record, with key, headers and so on
``fl.Headers``                         its headers
``fl.Context``                         the app, the attempt, whether the worker is stopping
a type given to ``app.provide``        what its factory makes
the first other one (of a subscriber)  the value, as that type
any other one (of a task)              the argument of that name
=====================================  ==========================================================
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Collection
from typing import Any

import msgspec

from ferryline.app.context import Context
from ferryline.message import Described, Headers
from ferryline.protocol.errors import InvalidArgument

VALUE, MESSAGE, HEADERS, CONTEXT, PROVIDED, ARGUMENT = "value", "message", "headers", "context", "provided", "argument"
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
_NO_VALUE = object()


class Parameter(msgspec.Struct, frozen=True):
    """One parameter: what it is to get, and as which type."""

    name: str
    source: str
    type: Any


class Signature(msgspec.Struct, frozen=True):
    """All parameters that get something. ``value``: the type of values; ``returns``: of results."""

    parameters: list[Parameter]
    value: Any
    returns: Any

    def named(self, source: str) -> list[Parameter]:
        """Those that get this."""
        return [parameter for parameter in self.parameters if parameter.source == source]


def read_signature(function: Callable[..., Any], what: str, provided: Collection[Any], *, task: bool) -> Signature:
    """The signature of a handler. Raises InvalidArgument, naming the parameter that nobody can provide."""
    hints = hints_of(function, what)
    found: list[Parameter] = []
    value: Any = _NO_VALUE
    of_message: Any = _NO_VALUE
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in _VARIADIC:
            raise InvalidArgument(f"{what}: parameter {parameter}: give each a name of its own", field=name)
        if name not in hints:
            if parameter.default is not parameter.empty and not task:
                continue
            raise InvalidArgument(f"{what}: parameter {name!r} has no annotation, which says what it gets", field=name)
        kind = hints[name]
        source = _source_of(kind, provided)
        if source == MESSAGE:
            of_message = next(iter(typing.get_args(kind)), of_message)
        elif not source and task:
            source = ARGUMENT
        elif not source and value is _NO_VALUE:
            source, value = VALUE, kind
        elif not source:
            if parameter.default is not parameter.empty:
                continue
            raise _nobody(what, name, kind)
        if source in (VALUE, ARGUMENT) and (part := unparseable(kind, nested_models=task)):
            raise _nobody(what, name, kind, part)
        found.append(Parameter(name, source, kind))
    if not task and value is _NO_VALUE:
        value = bytes if of_message is _NO_VALUE else of_message
        if part := unparseable(value, nested_models=False):
            raise InvalidArgument(f"{what}: values cannot be parsed as {part}")
    if of_message is not _NO_VALUE and of_message is not Any and not task and of_message != value:
        raise InvalidArgument(f"{what}: the value is {named(value)}, but the message has {named(of_message)}")
    return Signature(found, value, hints.get("return", Any))


def hints_of(function: Callable[..., Any], what: str) -> dict[str, Any]:
    """Annotations, resolved. Raises InvalidArgument where one names what is not there at run time."""
    target = function if inspect.isroutine(function) else type(function).__call__
    try:
        return typing.get_type_hints(target, include_extras=True)
    except (NameError, TypeError, AttributeError) as error:
        raise InvalidArgument(f"{what}: its annotations cannot be resolved: {error}") from error


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling it gives something to await."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def named(kind: Any) -> str:
    """A type as a user wrote it."""
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")


def unparseable(kind: Any, *, nested_models: bool) -> str:
    """The part of a type that JSON cannot be parsed as; "" when all can. ``nested_models``: pydantic's may be parts."""
    if kind in (bytes, str, Any, None) or hasattr(kind, "model_validate_json"):
        return ""
    if hasattr(kind, "decode") and hasattr(kind, "encode") and not isinstance(kind, type):
        return ""  # a Serializer
    try:
        info = msgspec.inspect.type_info(kind)
    except TypeError as error:
        return f"{named(kind)} ({error})"
    return _custom_part(info, set(), nested_models)


def _custom_part(info: Any, seen: set[int], nested_models: bool) -> str:
    if id(info) in seen:
        return ""
    seen.add(id(info))
    if isinstance(info, msgspec.inspect.CustomType):
        return "" if nested_models and hasattr(info.cls, "model_validate") else named(info.cls)
    if isinstance(info, (list, tuple)):
        parts: list[Any] = list(info)
    elif isinstance(info, (msgspec.inspect.Type, msgspec.inspect.Field)):
        parts = [getattr(info, name) for name in info.__struct_fields__ if name not in ("cls", "default", "tag")]
    else:
        return ""
    return next((found for part in parts if (found := _custom_part(part, seen, nested_models))), "")


def _source_of(kind: Any, provided: Collection[Any]) -> str:
    if kind in provided:
        return PROVIDED
    origin = typing.get_origin(kind) or kind
    if isinstance(origin, type):
        if issubclass(origin, Described):
            return MESSAGE
        if issubclass(origin, Headers):
            return HEADERS
        if issubclass(origin, Context):
            return CONTEXT
    return ""


def _nobody(what: str, name: str, kind: Any, part: str = "") -> InvalidArgument:
    why = f"no value can be parsed as {part}" if part else "the value goes to the parameter before it"
    return InvalidArgument(
        f"{what}: nobody can provide parameter {name!r}: {named(kind)}; {why}. `app.provide({named(kind)}, factory)` "
        "would, or a default",
        field=name,
    )
