"""OpenTelemetry traces from `send` to the handler, by W3C trace context in record headers. Off until `enable`.

    import ferryline as fl
    fl.tracing.enable()             # needs opentelemetry-api; spans go to the program's tracer provider

A sent record gets a PRODUCER span and carries it as ``traceparent``; working on it, by `QueueMessage.processing` or in
a worker, is a CONSUMER span in the same trace, and the current one meanwhile, so that what a handler sends follows. For
records of a log: ``with fl.tracing.processing(message):``. `Producer.send_nowait` makes no span; give it
``headers=fl.tracing.inject()``.

Names and attributes follow OpenTelemetry's conventions for messaging. Keys and values of records are not among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ferryline.protocol.errors import InvalidArgument
from ferryline.record_checks import HeadersLike, pairs_of

if TYPE_CHECKING:
    from ferryline.message import Message
    from ferryline.queues.message import QueueMessage

Pairs = list[tuple[str, bytes | None]]
active: Tracing | None = None  # asked by whoever sends or works on a record; None costs nothing more than the question


class Tracing:
    """Makes the spans. Use `enable`."""

    def __init__(self, provider: Any = None) -> None:
        try:
            from opentelemetry import context, propagate, trace
        except ImportError:
            raise InvalidArgument(
                "tracing: opentelemetry-api is not installed: pip install 'ferryline[tracing]'", field="tracing"
            ) from None
        self._trace, self._context, self._propagate = trace, context, propagate
        self._tracer = trace.get_tracer("ferryline", tracer_provider=provider)

    @contextmanager
    def sending(self, topic: str, headers: HeadersLike | None) -> Iterator[Pairs]:
        """A span around sending one record; yields the headers with the trace in them."""
        about = _about(topic, "send")
        with self._tracer.start_as_current_span(
            f"send {topic}", kind=self._trace.SpanKind.PRODUCER, attributes=about
        ) as span:
            yield self.injected(headers)
            span.set_attribute("messaging.operation.outcome", "committed")

    @contextmanager
    def processing(self, message: Message[Any] | QueueMessage[Any]) -> Iterator[Any]:
        """A span around the work on a record, in the trace that its headers name."""
        carrier = {name: value.decode("latin-1") for name, value in message.headers.items() if value is not None}
        about = _about(message.topic, "process")
        about["messaging.destination.partition.id"] = str(message.partition)
        about["ferryline.offset"] = message.offset
        if (attempt := getattr(message, "delivery_count", None)) is not None:
            about["ferryline.delivery_count"] = attempt
        with self._tracer.start_as_current_span(
            f"process {message.topic}",
            context=self._propagate.extract(carrier, context=self._context.Context()),
            kind=self._trace.SpanKind.CONSUMER,
            attributes=about,
        ) as span:
            yield span

    def injected(self, headers: HeadersLike | None) -> Pairs:
        """``headers`` with the current trace in them, in place of one that they had."""
        carrier: dict[str, str] = {}
        self._propagate.inject(carrier)
        given = [] if headers is None else [pair for pair in pairs_of(headers) if pair[0] not in carrier]
        return [*given, *((name, text.encode()) for name, text in carrier.items())]

    def failed(self, error: BaseException) -> None:
        """Say on the current span that the work failed: a worker catches what its handler raises."""
        span = self._trace.get_current_span()
        span.record_exception(error)
        span.set_status(self._trace.StatusCode.ERROR, f"{type(error).__name__}: {error}"[:200])


def enable(tracer_provider: Any = None) -> None:
    """Trace from now on, in this process, with ``tracer_provider`` or the program's own. Raises InvalidArgument when
    opentelemetry-api is not installed."""
    global active
    active = Tracing(tracer_provider)


def disable() -> None:
    """Trace no more. Headers of records that come are left as they are."""
    global active
    active = None


def inject(headers: HeadersLike | None = None) -> Pairs:
    """``headers`` with the current trace in them, for what is sent without a span; as they are while tracing is off."""
    if active is not None:
        return active.injected(headers)
    return [] if headers is None else list(pairs_of(headers))


@contextmanager
def processing(message: Message[Any] | QueueMessage[Any]) -> Iterator[None]:
    """Around the work on a record of a log, or on one whose settling is the caller's: a span while tracing is on."""
    if active is None:
        yield
        return
    with active.processing(message):
        yield


def _about(topic: str, operation: str) -> dict[str, Any]:
    return {
        "messaging.system": "ferryline",
        "messaging.destination.name": topic,
        "messaging.operation.name": operation,
        "messaging.operation.type": operation,
    }
