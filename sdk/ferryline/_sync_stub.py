"""Writes ``sync.pyi``: the types of `ferryline.sync`, from the signatures of the asynchronous classes.

``python -m ferryline._sync_stub`` rewrites the file; a test compares it with what would be written.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any, get_overloads

from ferryline import client
from ferryline._mirrored import ASYNC_CLASSES, PLAIN_CLASSES, public_members

WIDTH = 120
STUB = Path(__file__).with_name("sync.pyi")
_HEAD = '''"""Types of ferryline.sync. Written by ``python -m ferryline._sync_stub``; do not edit."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from datetime import datetime
from typing import Any, Generic, Self, TypeVar, overload

from ferryline.access_admin import AuditRecords, NewKey, PrincipalInfo, Whoami
from ferryline.admin import BrokerInfo, ClusterInfo, TopicInfo
from ferryline.consumer import Position
from ferryline.dead_letters import DeadLetter, Progress, Redrive
from ferryline.message import Described, Headers, Message, RecordMetadata, TopicPartition
from ferryline.options import Where
from ferryline.protocol.access import Grant, Quota
from ferryline.protocol.errors import FerrylineError
from ferryline.protocol.exchanges import ExchangeMeta
from ferryline.protocol.metadata import TopicMeta
from ferryline.queue_admin import QueuePart, Redriven, StoredRecord
from ferryline.record_checks import HeadersLike
from ferryline.retry import RetryLike
from ferryline.subscription import Handler
from ferryline.tokens import TokenLike

T = TypeVar("T")
V = TypeVar("V")
'''
_REPLACED = (
    (r"\bAsyncIterator\b", "Iterator"),
    (r"\bAsyncGenerator\[(\w+), None\]", r"Iterator[\1]"),
    (r"\bRecordFuture\b", "Future[RecordMetadata]"),
    (r"\basyncio\.Future\b", "Future"),
)


def render() -> str:
    """The text of the stub."""
    parts = [_HEAD]
    parts.append(_function("", "connect", client.connect) + "\n")
    parts.extend(_class(cls) for cls in ASYNC_CLASSES)
    return "\n".join(parts)


def _class(cls: Any) -> str:
    generic = "(Generic[T])" if getattr(cls, "__parameters__", ()) else ""
    lines = [f"class {cls.__name__}{generic}:"]
    if hasattr(cls, "__aenter__"):
        entered, left = _returned(cls.__aenter__), _returned(cls.__aexit__)
        itself = entered.split("[")[0] == cls.__name__
        lines.append(f"    def __enter__(self) -> {'Self' if itself else entered}: ...")
        lines.append(f"    def __exit__(self, *exc: object) -> {left}: ...")
    if hasattr(cls, "__anext__"):
        lines.append("    def __iter__(self) -> Self: ...")
        lines.append(f"    def __next__(self) -> {_returned(cls.__anext__)}: ...")
    if hasattr(cls, "__await__"):
        lines.append("    def wait(self) -> None: ...")
    plain = PLAIN_CLASSES.get(cls, {})
    for name, kind in plain.items():
        lines.append("    @property")
        lines.append(f"    def {name}(self) -> {kind}: ...")
    for name, member in public_members(cls):
        if name in plain:
            continue
        if isinstance(member, property):
            lines.append("    @property")
            member = member.fget
        overloads = get_overloads(member)
        for overload in overloads:
            lines.append("    @overload")
            lines.append(_function("    ", name, overload))
        if not overloads:
            lines.append(_function("    ", name, member))
    return "\n".join(lines) + "\n"


def _returned(function: Any) -> str:
    return _cleaned(str(inspect.signature(function).return_annotation))


def _function(indent: str, name: str, function: Any) -> str:
    """One definition, laid out as the formatter would."""
    parameters, returns = _signature(function)
    flat = f"{indent}def {name}({', '.join(parameters)}) -> {returns}: ..."
    if len(flat) <= WIDTH:
        return flat
    inner = f"{indent}    {', '.join(parameters)}"
    if len(inner) > WIDTH:
        inner = "\n".join(f"{indent}    {parameter}," for parameter in parameters)
    return f"{indent}def {name}(\n{inner}\n{indent}) -> {returns}: ..."


def _signature(function: Any) -> tuple[list[str], str]:
    signature = inspect.signature(function)
    parameters = [
        parameter.replace(default=parameter.default if _simple(parameter.default) else ...)
        for parameter in signature.parameters.values()
    ]
    found: list[str] = []
    kinds = inspect.Parameter
    for parameter in parameters:
        if parameter.kind is kinds.KEYWORD_ONLY and not any(text.startswith("*") for text in found):
            found.append("*")
        found.append(_cleaned(str(parameter)))
    return found, _cleaned(str(signature.return_annotation))


def _cleaned(text: str) -> str:
    text = text.replace("'", "").replace("Ellipsis", "...")
    for pattern, replacement in _REPLACED:
        text = re.sub(pattern, replacement, text)
    return text


def _simple(default: object) -> bool:
    return default is inspect.Parameter.empty or default is None or isinstance(default, (bool, int, float))


if __name__ == "__main__":
    STUB.write_text(render())
