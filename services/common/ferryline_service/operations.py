"""What a document says of one route beyond its path: parameters, body, answers. Services hold one table of these.

The table is the contract: the document is made from it (`openapi`), requests are checked against it (`contract`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import BaseModel

from ferryline_service.schemas import Schema

JSON = "application/json"


@dataclass(frozen=True)
class Parameter:
    """One parameter of the query string, or a header. ``several``: it may stand more than once."""

    name: str
    schema: Schema
    text: str
    required: bool = False
    several: bool = False


@dataclass(frozen=True)
class Answer:
    """What one status carries. ``media``: media type -> schema; none: no content."""

    media: Mapping[str, Schema] = field(default_factory=dict)
    text: str = "Done."
    headers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Operation:
    """``body``: None takes no body. ``optional``: no body says as much as ``{}``. ``raw``: media type of a body that
    is not JSON. ``problems``: statuses of refusals beyond those that every route may answer with. ``public``: no token.
    """

    answers: Mapping[int, Answer]
    body: type[BaseModel] | None = None
    optional: bool = False
    raw: str = ""
    query: tuple[Parameter, ...] = ()
    headers: tuple[Parameter, ...] = ()
    problems: tuple[int, ...] = ()
    public: bool = False
    example: object = None


Operations = Mapping[tuple[str, str], Operation]


def answer(schema: Schema, *headers: str) -> Answer:
    """JSON of that schema."""
    return Answer({JSON: schema}, headers=headers)
