"""A subscriber: a function that is called for the records of a topic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from ferryline.app.handler import Handler
from ferryline.app.providers import Providers
from ferryline.protocol.errors import InvalidArgument
from ferryline.protocol.limits import check_name, check_range
from ferryline.protocol.metadata import ON_DEAD_PARK, TopicConfig
from ferryline.queues.options import PREFETCH_MAX
from ferryline.retry import Retry

CONCURRENCY_MAX = 10_000


class Subscriber(Handler):
    """Made by ``@app.subscriber``."""

    def __init__(
        self,
        function: Callable[..., Any],
        topic: str,
        *,
        group: str,
        concurrency: int | None,
        prefetch: int | None,
        retry: Retry | None,
        timeout: float | None,
        ordering: str,
        lease: float,
        start: str,
        value: Any,
    ) -> None:
        name = getattr(function, "__name__", type(function).__name__)
        super().__init__(function, name=name, retry=retry, timeout=timeout)
        self.topic = check_name(topic)
        self.group = check_name(group, "group")
        self.concurrency = None if concurrency is None else check_range(concurrency, "concurrency", 1, CONCURRENCY_MAX)
        self.prefetch = None if prefetch is None else check_range(prefetch, "prefetch", 1, PREFETCH_MAX)
        self.ordering = ordering
        self.lease = lease
        self.start = start
        self._value = value

    def resolve(self, providers: Providers) -> None:
        """As of `Handler`; the type of values is what ``value`` says, else the annotation."""
        super().resolve(providers)
        if self._value is not None:
            self.signature = msgspec.structs.replace(self.signature, value=self._value)

    def check_topic(self, config: TopicConfig) -> None:
        """Raises InvalidArgument when the topic's own policy does not allow what ``retry`` asks for.

        The policy belongs to all groups of the topic, so it is not changed from here.
        """
        retry = self.retry
        if retry is None:
            return
        allowed = config.retry
        if retry.attempts > allowed.attempts:
            raise InvalidArgument(
                f"{self.what}: retry: {retry.attempts} attempts, but topic {self.topic} allows {allowed.attempts}; "
                f"`ferryline topic alter {self.topic} --retry-attempts {retry.attempts}` changes that",
                field="retry",
            )
        if retry.on_dead == ON_DEAD_PARK and allowed.on_dead != ON_DEAD_PARK:
            raise InvalidArgument(f"{self.what}: retry: on_dead: topic {self.topic} does not park", field="retry")
        if retry.dead_letters is not None and retry.dead_letters != allowed.dead_letters:
            raise InvalidArgument(
                f"{self.what}: retry: dead_letters: those of topic {self.topic} go to "
                f"{allowed.dead_letters or self.topic + '.dlq'}",
                field="retry",
            )
