"""JSON Schemas of what a service answers, and types of models that say in the schema what the core checks.

A limit that a core checks by itself, with an error that names it, stands in the schema only (`told`): the two places
cannot disagree about what is refused, since only one refuses.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import msgspec.inspect
from pydantic import WithJsonSchema

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
ASKED_FLAG: Schema = {"type": "string", "enum": ["true", "false", "1", "0"]}  # in a query
WHOLE: Schema = {"type": "integer"}
COUNT: Schema = {"type": "integer", "minimum": 0}
REAL: Schema = {"type": "number"}
ANY: Schema = {"type": "object"}
BYTES: Schema = {
    "oneOf": [
        {"type": "string"},
        {
            "type": "object",
            "required": ["base64"],
            "properties": {"base64": {"type": "string", "contentEncoding": "base64"}},
            "additionalProperties": False,
        },
    ]
}
NAME_SCHEMA: Schema = {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,200}$"}
Name = Annotated[str, WithJsonSchema(NAME_SCHEMA)]


def one_of(*values: str) -> Schema:
    """Text that is one of these."""
    return {"type": "string", "enum": list(values)}


def nullable(schema: Schema) -> Schema:
    """That, or null."""
    return {"anyOf": [schema, {"type": "null"}]}


def several(schema: Schema) -> Schema:
    """A list of these."""
    return {"type": "array", "items": schema}


def table(schema: Schema) -> Schema:
    """An object with any names, and these as values."""
    return {"type": "object", "additionalProperties": schema}


def shape(optional: dict[str, Schema] | None = None, /, **fields: Schema) -> Schema:
    """An object with exactly these fields; those in ``optional`` may be missing."""
    return {
        "type": "object",
        "required": list(fields),
        "properties": {**fields, **(optional or {})},
        "additionalProperties": False,
    }


def told(low: int, high: int) -> dict[str, Any]:
    """Limits for the schema of a field; whoever decides checks them."""
    return {"json_schema_extra": {"minimum": low, "maximum": high}}


def component(name: str) -> Schema:
    """A reference to a schema of the document."""
    return {"$ref": f"#/components/schemas/{name}"}


def of_struct(cls: type[msgspec.Struct], **instead: Schema) -> Schema:
    """A protocol struct as JSON with the names of its fields; ``instead`` of what the types say, or beyond it."""
    info = msgspec.inspect.type_info(cls)
    assert isinstance(info, msgspec.inspect.StructType), cls
    return shape(**{one.name: _of_type(one.type) for one in info.fields} | instead)


def _of_type(info: msgspec.inspect.Type) -> Schema:
    kinds = msgspec.inspect
    if isinstance(info, kinds.StructType):
        return of_struct(info.cls)
    if isinstance(info, kinds.ListType | kinds.VarTupleType):
        return several(_of_type(info.item_type))
    if isinstance(info, kinds.IntType):
        return WHOLE
    return FLAG if isinstance(info, kinds.BoolType) else TEXT  # bytes as base64
