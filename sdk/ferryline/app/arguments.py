"""Arguments and results of tasks, as JSON, checked against the signature at both ends. Never pickle.

The record of a job is an object of its arguments by name. What was not given is left out, so that a default belongs to
whoever runs the task.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import msgspec

from ferryline.app.signatures import ARGUMENT, Signature
from ferryline.protocol.errors import InvalidArgument, SerializationFailed


def _out(value: Any) -> Any:
    """Models of pydantic, which msgspec does not know."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    raise NotImplementedError(f"{type(value).__name__} does not go into JSON")


def _in(kind: type, value: Any) -> Any:
    if hasattr(kind, "model_validate"):
        return kind.model_validate(value)
    raise NotImplementedError(f"{kind.__name__} cannot be made of JSON")


_encoder = msgspec.json.Encoder(enc_hook=_out)


class Arguments:
    """How the arguments of one task travel."""

    def __init__(self, what: str, function: Callable[..., Any], signature: Signature) -> None:
        self._what = what
        own = inspect.signature(function)
        chosen = {parameter.name: parameter.type for parameter in signature.named(ARGUMENT)}
        parameters = [own.parameters[name] for name in chosen]
        self._signature = own.replace(parameters=parameters)
        fields = [
            (one.name, chosen[one.name]) if one.default is one.empty else (one.name, chosen[one.name], msgspec.UNSET)
            for one in parameters
        ]
        try:
            shape = msgspec.defstruct("Arguments", fields, kw_only=True, forbid_unknown_fields=True)
            self._shape: Any = shape
            self._decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(shape, dec_hook=_in)
        except TypeError as error:
            raise InvalidArgument(f"{what}: its arguments cannot travel as JSON: {error}") from error

    @property
    def required(self) -> list[str]:
        """Names of those without a default."""
        return [name for name, one in self._signature.parameters.items() if one.default is one.empty]

    def encode(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
        """The record of a call. Raises InvalidArgument for a call that the function would not take."""
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise InvalidArgument(f"{self._what}: {error}") from error
        try:
            data = _encoder.encode(self._shape(**bound.arguments))
            self._decoder.decode(data)
        except Exception as error:  # of msgspec, or of a model's own validation
            raise InvalidArgument(f"{self._what}: {str(error)[:500]}") from error
        return data

    def decode(self, data: bytes | None) -> dict[str, Any]:
        """The arguments of a record, by name. Raises SerializationFailed."""
        try:
            found = self._decoder.decode(data or b"{}")
        except Exception as error:
            raise SerializationFailed(f"{self._what}: the arguments do not fit: {str(error)[:300]}") from error
        values = ((name, getattr(found, name)) for name in self._signature.parameters)
        return {name: value for name, value in values if value is not msgspec.UNSET}


class Results:
    """How the results of one task travel; ``kind`` is the annotation of what it returns."""

    def __init__(self, what: str, kind: Any) -> None:
        self._what = what
        try:
            self._decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(kind, dec_hook=_in)
        except TypeError as error:
            raise InvalidArgument(f"{what}: its result cannot travel as JSON: {error}") from error

    def encode(self, value: Any) -> msgspec.Raw:
        """Raises SerializationFailed for what is not JSON, or not what the task says that it returns."""
        try:
            data = _encoder.encode(value)
            self._decoder.decode(data)
        except Exception as error:
            raise SerializationFailed(f"{self._what}: its result: {str(error)[:300]}") from error
        return msgspec.Raw(data)

    def decode(self, raw: msgspec.Raw) -> Any:
        """Raises SerializationFailed."""
        try:
            return self._decoder.decode(raw)
        except Exception as error:
            raise SerializationFailed(f"{self._what}: its result does not parse: {str(error)[:300]}") from error
